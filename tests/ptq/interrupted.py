"""Quantizes a small model with a journal, and dies after LAYERS: ``interrupted.py OUT JOURNAL LAYERS METHOD MODEL``."""

import os
import signal
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from ptq_models import Bert, Llama, built, tokens

import lightning_qat as lq


class Deadly(lq.PTQObserver):
    """Kills its process in the middle of a layer's block."""

    def __init__(self, layers):
        self.left = layers

    def layer_done(self, outcome):
        self.left -= 1
        if not self.left:
            os.kill(os.getpid(), signal.SIGKILL)


def main(out, journal, layers, method, model="Llama"):
    torch.set_num_threads(1)
    plan = lq.QuantizationPlan([lq.LayerRule("layers.*", lq.QuantizationConfig("int4", group_size=8))])
    kind = {"Bert": Bert, "Llama": Llama}[model]
    made = lq.quantize_model(built(kind), plan, tokens(), method, journal=journal or None, observer=Deadly(int(layers)))
    lq.save_quantized(made, out)
    torch.save(lq.ptq_report(made).rows(), f"{out}/report.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])

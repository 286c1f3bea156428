"""One of two ranks of gloo as a script: ``python two_ranks.py FOLDER`` writes what it made to ``FOLDER/RANK.pt``."""

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from padded import one_by_one, padded, sentences, tiny_llama
from ptq_models import Llama, Mixture, built, some_rows, tokens

import lightning_qat as lq

PLAN = lq.QuantizationPlan([lq.LayerRule("layers.*", lq.QuantizationConfig("int4", group_size=8), "int8")])


def quantized(batches, *, across_ranks):
    options = lq.PTQOptions(across_ranks=across_ranks)
    made = lq.quantize_model(built(Llama), PLAN, batches, "awq+gptq", options=options)
    return made.state_dict(), lq.ptq_report(made).rows()


def experts(batches, *, across_ranks):
    config, options = lq.QuantizationConfig("int4", group_size=8), lq.PTQOptions(across_ranks=across_ranks)
    made = lq.quantize_model(built(Mixture), config, batches, "awq+gptq", options=options)
    return made.state_dict(), lq.ptq_report(made).rows()


def with_padding(batches, *, across_ranks):
    """Codes, ranges and losses from sentences of which one rank pads its own."""
    plan = lq.QATConfig("int8", bits=4, per_channel=True, activation_observer="min_max")
    options = lq.PTQOptions(across_ranks=across_ranks)
    made = lq.quantize_model(tiny_llama(), plan, batches, "gptq", options=options)
    return made.state_dict(), lq.ptq_report(made).rows()


def sentences_of(rank):
    """Return the batch of a rank and its sentences alone."""
    parts = [sentences(5, 16, 9), sentences(7, 7, 7, seed=2)][rank]
    return [padded(parts)], one_by_one(parts)


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank = int(os.environ["RANK"])
    torch.save(quantized(tokens()[rank::2], across_ranks=True), f"{sys.argv[1]}/{rank}.pt")
    made = experts(some_rows([[0, 1], [2, 1]][rank]), across_ranks=True)
    torch.save(made, f"{sys.argv[1]}/{rank}.experts.pt")
    made = with_padding(sentences_of(rank)[0], across_ranks=True)
    torch.save(made, f"{sys.argv[1]}/{rank}.padded.pt")

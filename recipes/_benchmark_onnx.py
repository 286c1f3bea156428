"""Benchmark group ``onnx``: what onnxruntime makes of our files, against its float32 of the same model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lightning_qat.tasks import load_mobilenet_v2

from ._benchmark_networks import convolutional_network
from ._benchmark_peers import NETWORK_FILES, WEIGHT_ONLY_FILES, Form, Peer, told, working_peers
from ._timing import Case, Results, compared


@dataclass(frozen=True)
class Measured:
    """A model, and what it is run on.

    Args:
        build: makes it.
        shape: of one input.
        batches: how many inputs it is given at once.
        peers: what onnxruntime runs, of which the first is its float32.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batches: tuple[int, ...]
    peers: tuple[Peer, ...]


def _network() -> nn.Module:
    """Return the convolutional network, BatchNorm with statistics of its inputs, as in a trained one."""
    model = convolutional_network()
    with torch.no_grad():
        model(torch.randn(8, 3, 32, 32))
    return model


#: Registry of name -> model. MobileNetV2 is the pretrained one: of random weights 8 bits leave too little to verify.
MODELS: dict[str, Measured] = {
    "conv-bn-relu x6": Measured(_network, (3, 32, 32), (1, 64), NETWORK_FILES),
    "MobileNetV2": Measured(load_mobilenet_v2, (3, 224, 224), (1, 16), NETWORK_FILES),
    "Linear 4096": Measured(lambda: nn.Sequential(nn.Linear(4096, 4096)), (4096,), (1, 32), WEIGHT_ONLY_FILES),
}


def onnx_group(rounds: int, models: Mapping[str, Measured] = MODELS) -> Results:
    """Time onnxruntime's sessions in turn; all have as many threads as PyTorch."""
    results = Results()
    for name, measured in models.items():
        torch.manual_seed(0)
        try:
            model, samples = measured.build().eval(), torch.randn(8, *measured.shape)
        except ModuleNotFoundError as error:
            results += Results(notes=[f"{name} is not timed: {told(error)}"])
            continue
        forms, notes = working_peers(measured.peers, model, samples)
        results += Results(notes=notes)
        baseline = measured.peers[0].name
        for batch in measured.batches if baseline in forms else ():
            x = torch.randn(batch, *measured.shape)
            cases = {peer: _case(form, x) for peer, form in forms.items()}
            timings = compared(f"onnx {name}, batch {batch}", cases, rounds, baseline=baseline)
            results += Results([replace(timing, sqnr_db=forms[timing.name].sqnr_db) for timing in timings])
    return results


def _case(form: Form, x: Tensor) -> Case:
    return lambda: form.run(x)

"""Benchmark group ``train_step``: a training step of a small convolutional network, float and fake-quantized."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import profile

from lightning_qat.transforms import Phase, apply_phase, calibrate, prepare

from ._timing import Timing, compared

CHANNELS = (3, 32, 32, 64, 64, 128, 128)


def convolutional_network() -> nn.Sequential:
    """Return Conv-BN-ReLU six times, pooling and a classifier of ten classes; images are ``[N, 3, 32, 32]``."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(CHANNELS):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(CHANNELS[-1], 10))


def train_step_group(rounds: int, batch: int = 64) -> list[Timing]:
    """Time forward, backward and an SGD step, W8A8 with BatchNorm to be folded, against float.

    Raises:
        RuntimeError: if the prepared network without quantization is not the float network.
    """
    images, labels = torch.randn(batch, 3, 32, 32), torch.randint(0, 10, (batch,))
    models: dict[str, nn.Module] = {"float": convolutional_network()}
    models["lightning_qat, observing"] = _prepared(models["float"], images, Phase())
    models["lightning_qat, frozen"] = _prepared(models["float"], images, Phase(observing=False, frozen=True))
    models |= _peers(images)
    steps = {name: _step(model, images, labels) for name, model in models.items()}
    kept = {name: _kept_bytes(model, images, labels) for name, model in models.items()}
    timings = compared(f"train_step conv-bn-relu x6, batch {batch}", steps, rounds, baseline="float")
    return [replace(timing, kept=kept[timing.name] / kept["float"]) for timing in timings]


def _prepared(model: nn.Module, images: Tensor, phase: Phase) -> nn.Module:
    prepared = prepare(copy.deepcopy(model), "int8")
    calibrate(prepared, [images])
    apply_phase(prepared, Phase(quantizing=False))
    with torch.no_grad():
        if not torch.equal(prepared.eval()(images), model.eval()(images)):
            raise RuntimeError("a prepared network that does not quantize differs from the float network; not timed")
    apply_phase(prepared, phase)
    model.train()
    return prepared.train()


def _step(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return step


def _kept_bytes(model: nn.Module, images: Tensor, labels: Tensor) -> int:
    """Return the memory that a forward pass leaves allocated for its backward pass."""
    F.cross_entropy(model(images), labels).backward()
    with profile(profile_memory=True) as recorded:
        loss = F.cross_entropy(model(images), labels)
    allocated = sum(event.self_cpu_memory_usage for event in recorded.key_averages())
    loss.backward()
    return int(allocated)


def _peers(images: Tensor) -> dict[str, nn.Module]:
    """Return PyTorch's own eager-mode and FX quantization-aware training of the same network, observing."""
    from torch.ao import quantization as ao
    from torch.ao.quantization import quantize_fx

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are deprecated, and what people have
        eager = nn.Sequential(ao.QuantStub(), *convolutional_network(), ao.DeQuantStub()).train()
        triples = [[str(i), str(i + 1), str(i + 2)] for i in range(1, 1 + 3 * (len(CHANNELS) - 1), 3)]
        ao.fuse_modules_qat(eager, triples, inplace=True)
        eager.qconfig = ao.get_default_qat_qconfig("x86")
        ao.prepare_qat(eager, inplace=True)
        mapping = ao.get_default_qat_qconfig_mapping("x86")
        traced = quantize_fx.prepare_qat_fx(convolutional_network().train(), mapping, (images,))
    return {"torch.ao eager": eager, "torch.ao FX": traced}

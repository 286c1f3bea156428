"""Benchmark group ``train_step``: a training step of two small networks, float and fake-quantized."""

from __future__ import annotations

import copy
import itertools
import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_qat.config import PRESETS, QATConfig
from lightning_qat.ops.workspace import release_workspace
from lightning_qat.transforms import Phase, apply_phase, calibrate, defer_ranges, prepare, update_ranges
from lightning_qat.transforms.param_groups import quantization_param_groups

from ._benchmark_networks import (
    BLOCKS,
    CHANNELS,
    FEATURES,
    TOKENS,
    convolutional_network,
    transformer_network,
)
from ._benchmark_peers import silenced, told
from ._memory import kept_bytes, memory_recorded
from ._timing import Results, Timing, compared

#: Ranges move in the forward pass; in a Trainer, as in all other rows of ours, after the batch.
_OWN_LOOP = "lightning_qat, observing, own loop"


def train_step_group(rounds: int, batch: int = 64, sequences: int = 8) -> Results:
    """Time forward, backward and an SGD step, W8A8 with BatchNorm to be folded, against float.

    Raises:
        RuntimeError: if a prepared network without quantization is not the float network.
    """
    images, sequence = torch.randn(batch, 3, 32, 32), torch.randn(sequences, TOKENS, FEATURES)
    peers, notes = _working_peers(images, torch.randint(0, 10, (batch,)))
    measured = _measured(f"conv-bn-relu x6, batch {batch}", convolutional_network(), images, peers, rounds)
    name = f"transformer block {BLOCKS}x{FEATURES}, batch {sequences}x{TOKENS}"
    measured += _measured(name, transformer_network(), sequence, {}, rounds)
    return Results(measured, notes)


def _measured(name: str, model: nn.Module, inputs: Tensor, peers: dict[str, nn.Module], rounds: int) -> list[Timing]:
    labels = torch.randint(0, 10, (len(inputs),))
    models: dict[str, nn.Module] = {"float": model}
    models["lightning_qat, observing"] = _prepared(model, inputs, "int8", Phase())
    models[_OWN_LOOP] = _prepared(model, inputs, "int8", Phase())
    models["lightning_qat, frozen"] = _prepared(model, inputs, "int8", Phase(observing=False, frozen=True))
    learned = replace(PRESETS["int8"], learnable_step_size=True)
    models["lightning_qat, learned scales"] = _prepared(model, inputs, learned, Phase())
    for who, prepared in models.items():
        defer_ranges(prepared, who not in ("float", _OWN_LOOP))
    steps = {who: _step(each, inputs, labels, who != "float") for who, each in models.items()}
    models |= peers
    steps |= {who: _step(peer, inputs, labels, False) for who, peer in peers.items()}
    kept = {who: _kept_bytes(model, inputs, labels) for who, model in models.items()}
    peak = {who: _peak_bytes(model, inputs, labels) for who, model in models.items()}
    timings = compared(f"train_step {name}", steps, rounds, baseline="float")
    return [replace(t, kept=kept[t.name] / kept["float"], peak=peak[t.name] / peak["float"]) for t in timings]


def _prepared(model: nn.Module, images: Tensor, config: str | QATConfig, phase: Phase) -> nn.Module:
    prepared = prepare(copy.deepcopy(model), config)
    calibrate(prepared, [images])
    apply_phase(prepared, Phase(quantizing=False))
    with torch.no_grad():
        if not torch.equal(prepared.eval()(images), model.eval()(images)):
            raise RuntimeError("a prepared network that does not quantize differs from the float network; not timed")
    apply_phase(prepared, phase)
    model.train()
    return prepared.train()


def _step(model: nn.Module, images: Tensor, labels: Tensor, ours: bool) -> Callable[[], None]:
    # Scales have a rate of their own, with which they stay scales: nothing clips their gradients here.
    groups = quantization_param_groups(model, 0.01, 1e-6) if ours else model.parameters()
    optimizer = torch.optim.SGD(groups, lr=0.01)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        if ours:
            update_ranges(model)  # as a Trainer's callback does after each batch

    return step


def _kept_bytes(model: nn.Module, images: Tensor, labels: Tensor) -> int:
    """Return the memory that a forward pass leaves allocated for its backward pass."""
    F.cross_entropy(model(images), labels).backward()
    return kept_bytes(lambda: F.cross_entropy(model(images), labels))


def _peak_bytes(model: nn.Module, images: Tensor, labels: Tensor) -> int:
    """Return the most memory that forward and backward have allocated at any moment, beyond what was before.

    Gradients count, and what is freed on the way; what libraries allocate past PyTorch is not seen.
    """
    model.zero_grad()
    release_workspace()  # what layers hold on to is theirs too
    with memory_recorded() as recorded:
        F.cross_entropy(model(images), labels).backward()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))  # the public form of allocations and frees in their order
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]")
    return max(itertools.accumulate((size for _, size in changes), initial=0))


def _working_peers(images: Tensor, labels: Tensor) -> tuple[dict[str, nn.Module], list[str]]:
    """Return PyTorch's own quantization-aware training of the same network, observing, and why a form is missing."""
    found: dict[str, nn.Module] = {}
    notes = []
    for name, build in {"torch.ao eager": _torch_ao_eager, "torch.ao FX": _torch_ao_fx}.items():
        try:
            with silenced():
                model = build(images)
                F.cross_entropy(model(images), labels).backward()
        except Exception as error:  # noqa: BLE001 - it is deprecated and may go in any way; the table says how
            notes.append(f"{name} is not timed: {told(error)}")
        else:
            found[name] = model
    return found, notes


def _torch_ao_eager(images: Tensor) -> nn.Module:
    from torch.ao import quantization as ao

    eager = nn.Sequential(ao.QuantStub(), *convolutional_network(), ao.DeQuantStub()).train()
    triples = [[str(i), str(i + 1), str(i + 2)] for i in range(1, 1 + 3 * (len(CHANNELS) - 1), 3)]
    ao.fuse_modules_qat(eager, triples, inplace=True)
    eager.qconfig = ao.get_default_qat_qconfig("x86")
    ao.prepare_qat(eager, inplace=True)
    return eager


def _torch_ao_fx(images: Tensor) -> nn.Module:
    from torch.ao import quantization as ao
    from torch.ao.quantization import quantize_fx

    mapping = ao.get_default_qat_qconfig_mapping("x86")
    return quantize_fx.prepare_qat_fx(convolutional_network().train(), mapping, (images,))

"""The parity gate: is the converted model the one that trained, layer by layer and as a whole?

Each converted layer is given the input of the trained layer while the trained model runs, and the two
outputs are compared: what is left is float rounding. Compared end to end, deep networks part much
further, because rounding noise tips activation codes over by whole steps (MobileNetV2: 21 to 30 dB where
every layer is above 100 dB), so the gate stands on the layers, and the outputs are reported.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import itertools
import math
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qat.nn import QATLayer, QuantizedLayer
from lightning_qat.nn.attention import tensors_of
from lightning_qat.nn.norm import norm_factor_and_shift
from lightning_qat.quantizers.input_arrangement import ARRANGEMENT
from lightning_qat.schemes import get_scheme
from lightning_qat.transforms.calibrate import _call
from lightning_qat.transforms.certificate import LayerParity, ParityReport, attach_report
from lightning_qat.transforms.comparison import OutputSums, PowerSums
from lightning_qat.transforms.convert import _float_weight, _norm_of
from lightning_qat.transforms.fuse import trace_folds, undecided_layers
from lightning_qat.transforms.prepare import copy_model, qat_layers
from lightning_qat.transforms.weight_reads import watch_weight_reads

#: Same code and scale: a relative 3e-7. Another code of 16 bits: 3e-5 and more.
_SAME_WEIGHT = 1e-5
_NOTHING = 1e-35  # a folded channel whose factor is 0 or denormal


@dataclass(frozen=True)
class _Pair:
    """A trained layer, the BatchNorm that it takes in, and the converted layer that stands for both."""

    name: str
    trained: QATLayer
    norm: nn.Module | None
    converted: QuantizedLayer

    def changed(self) -> int:
        """Return how many weights and input ranges of the converted layer are not the trained one's.

        Read from the codes, in float32, so that it holds for any dtype: one code off by one among a
        million hardly shows in the outputs.
        """
        weight, quantizer = _float_weight(self.trained), self.trained.weight_quantizer
        fmt, scheme = quantizer.format, get_scheme(quantizer.format.scheme)
        scale, zero_point = quantizer.parameters_for(weight)
        codes = scheme.quantize(weight, scale, zero_point, fmt)
        expected = scheme.dequantize(codes, scheme.effective_scale(scale, fmt), zero_point, fmt, torch.float32)
        if self.norm is not None:
            shape = [1] * weight.dim()
            shape[self.trained.channel_axis] = -1
            expected *= norm_factor_and_shift(self.norm, None)[0].float().view(shape)
        layer, shipped = self.converted, get_scheme(self.converted.weight_format.scheme)
        held = (layer.codes, layer.held_scale(), layer.weight_zero_point, layer.weight_format)
        actual = shipped.dequantize(*held, torch.float32)
        if actual.shape != expected.shape:
            raise ValueError(f"layer {self.name!r} has another shape; converted must come from convert(trained)")
        same = (actual - expected).abs_() <= expected.abs_().mul_(_SAME_WEIGHT).add_(_NOTHING)
        return int(same.numel() - same.count_nonzero()) + self._changed_ranges() + self._changed_arrangement()

    def _changed_arrangement(self) -> int:
        pairs = [(self.trained.weight_quantizer._buffers[n], self.converted._buffers[n]) for n in ARRANGEMENT]
        return sum((a is None) != (b is None) or (a is not None and not torch.equal(a, b)) for a, b in pairs)  # type: ignore[arg-type]

    def _changed_ranges(self) -> int:
        quantizer, layer = self.trained.input_quantizer, self.converted
        if quantizer is None or layer.input_format is None:
            return int((quantizer is None) != (layer.input_format is None))
        if quantizer.format.dynamic:
            return int(quantizer.format != layer.input_format)
        pairs = [(quantizer.scale, layer.input_scale)]
        if not quantizer.format.symmetric:
            pairs.append((quantizer.zero_point, layer.input_zero_point))
        wrong = sum(b is None or not torch.equal(a, b) for a, b in pairs)
        return wrong + int(quantizer.format != layer.input_format)


def _pair_layers(trained: nn.Module, converted: nn.Module) -> list[_Pair]:
    modules, found = dict(converted.named_modules()), []
    decided = dict(qat_layers(trained))
    if undecided_layers(trained):  # it never ran a batch that tells what follows a layer: conversion traced a copy too
        replica = copy_model(trained)
        trace_folds(replica)
        decided = dict(qat_layers(replica))
    for name, layer in qat_layers(trained):
        other = modules.get(name)
        if not isinstance(other, QuantizedLayer):
            raise ValueError(f"layer {name!r} is not quantized in converted; give check_parity convert(trained)")
        activation = layer.input_quantizer
        if not layer.weight_quantizer.quantizing or (activation is not None and not activation.quantizing):
            raise ValueError(
                f"layer {name!r} still computes in float, so what it ships did not train; train past start_step, "
                "or apply_phase(model, Phase()) to look at it quantized"
            )
        found.append(_Pair(name, layer, _norm_of(trained, name, decided[name]), other))
    if not found:
        raise ValueError(f"{type(trained).__name__} has no prepared layer; give check_parity the model that trained")
    return found


class _Gate:
    """Gives converted layers the inputs of the trained ones while the trained model runs; keeps sums only."""

    def __init__(self, pairs: list[_Pair]) -> None:
        self.pairs = pairs
        self.sums: dict[str, PowerSums] = {}  # in forward order
        self.read_by: dict[str, str] = {}
        # Outputs that are on their way into the BatchNorm that is folded; holding them keeps their id theirs.
        self._on_the_way: dict[int, tuple[str, Tensor, Any]] = {}

    def _layer_done(self, pair: _Pair, _: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        # ``forward``, and before the user's own hooks have seen the output: these belong to neither layer.
        actual = pair.converted.forward(*args, **kwargs)
        self.sums.setdefault(pair.name, PowerSums())
        if pair.norm is None:
            self._add(pair.name, output, actual)
        else:
            self._on_the_way[id(output)] = (pair.name, output, actual)

    def _norm_done(self, _: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        for source in itertools.islice((*args, *kwargs.values()), 1):
            name, _output, actual = self._on_the_way.pop(id(source), ("", None, None))
            if name:
                self._add(name, output, actual)

    def _add(self, name: str, expected: Any, actual: Any) -> None:
        if not self.sums[name].add(expected, actual):
            self.sums[name].noise = math.inf
            self.sums[name].count += 1

    @contextlib.contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Compare the layers in the forward of the trained model run inside."""
        norms = {pair.norm for pair in self.pairs if pair.norm is not None}
        handles = [
            pair.trained.register_forward_hook(
                functools.partial(self._layer_done, pair), prepend=True, with_kwargs=True
            )
            for pair in self.pairs
        ]
        handles += [norm.register_forward_hook(self._norm_done, prepend=True, with_kwargs=True) for norm in norms]
        try:
            with watch_weight_reads(model) as found:
                yield
            self.read_by |= found
        finally:
            for handle in handles:
                handle.remove()
        # An output that did not go into the BatchNorm this time: what ships has it folded all the same.
        for name, output, actual in self._on_the_way.values():
            self._add(name, output, actual)
        self._on_the_way.clear()

    def layers(self, threshold: float | None) -> tuple[LayerParity, ...]:
        """Return what was found, in forward order, and after that the layers that were not reached."""
        changed = {pair.name: pair.changed() for pair in self.pairs}
        unreached = {name: PowerSums() for name in changed if name not in self.sums}
        return tuple(
            LayerParity(
                name=name,
                sqnr_db=sums.sqnr_db() if sums.count else None,
                threshold_db=sums.threshold if threshold is None else threshold,
                changed=changed[name],
                calls=sums.count,
                read_by=self.read_by.get(name, ""),
            )
            for name, sums in (self.sums | unreached).items()
        )


def _changed_tensors(trained: nn.Module, converted: nn.Module, pairs: list[_Pair]) -> tuple[str, ...]:
    """Return the names of float parameters and buffers outside the pairs that are not equal in both."""
    replaced = {part for pair in pairs for part in pair.trained.modules()} | {pair.norm for pair in pairs}
    others = dict(converted.named_modules())
    found = []
    for name, module in trained.named_modules():
        if module in replaced:
            continue
        for key, value in tensors_of(module).items():
            other = getattr(others.get(name), key, None)
            if value is not None and not (isinstance(other, Tensor) and torch.equal(value, other)):
                found.append(f"{name}.{key}".lstrip("."))
    return tuple(found)


@contextlib.contextmanager
def _evaluating(*models: nn.Module) -> Iterator[None]:
    modes = {module: module.training for model in models for module in model.modules()}
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextlib.contextmanager
def _random_state_kept(devices: list[int]) -> Iterator[None]:
    state = random.getstate()
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(state)


def _version() -> str:
    try:
        return importlib.metadata.version("lightning-qat")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def check_parity(
    trained: nn.Module,
    converted: nn.Module,
    batches: Iterable[Any],
    forward: Callable[[nn.Module, Any], Any] | None = None,
    *,
    layer_threshold: float | None = None,
    output_threshold: float | None = None,
) -> ParityReport:
    """Compare a converted model with the one that trained, on batches of data.

    Both run in evaluation mode and without gradients; they see the same random numbers, and the random
    state, training modes and BatchNorm statistics are as they were afterwards.

    Args:
        trained: a prepared model.
        converted: what :func:`convert` made of it.
        batches: an iterable of tensors, tuples of positional or dicts of keyword arguments.
        forward: called as ``forward(model, batch)`` instead, for anything else.
        layer_threshold: SQNR in dB that every layer has to reach from the same input; None is what float
            rounding allows: 60, for float16 and TF32 40, for bfloat16 25.
        output_threshold: SQNR in dB that the model's outputs have to reach; None only reports it.

    Returns:
        The report; ``report.raise_if_failed()`` raises :class:`ParityError`.

    Raises:
        ValueError: the models do not belong together, ``trained`` is in a float phase, or ``batches`` is
            empty or reaches no layer.
    """
    original, shipped = (getattr(model, "_orig_mod", model) for model in (trained, converted))  # of torch.compile
    pairs = _pair_layers(original, shipped)
    networks = [name for name, child in original.named_children() if any(True for _ in child.parameters())]
    gate, outputs = _Gate(pairs), OutputSums(["", *(networks if len(networks) == 1 else [])])
    tensors = [*original.parameters(), *original.buffers()]
    cuda = sorted({tensor.get_device() for tensor in tensors if tensor.device.type == "cuda"})
    run, count = forward or _call, 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(_random_state_kept(cuda))
        stack.enter_context(_evaluating(original, shipped))
        changed = _changed_tensors(original, shipped, pairs)
        for batch in batches:
            with _random_state_kept(cuda), outputs.recorded(original) as expected, gate.watching(original):
                result = run(original, batch)
            with _random_state_kept(cuda), outputs.recorded(shipped) as actual:
                other = run(shipped, batch)
            if not any(expected.values()):  # the step calls parts of the model only
                expected, actual = {"": [result]}, {"": [other]}
            outputs.add(expected, actual)
            count += 1
        layers = gate.layers(layer_threshold)
    if not gate.sums:
        why = "none was given" if not count else "none of them reached a prepared layer"
        raise ValueError(f"the parity gate needs batches that run the model, and {why}; check batches and forward")
    return ParityReport(
        layers=layers,
        changed_tensors=changed,
        output_sqnr_db=outputs.sums.sqnr_db() if outputs.comparable and outputs.sums.count else None,
        output_threshold_db=output_threshold,
        agreement=outputs.same / outputs.predictions if outputs.comparable and outputs.predictions else None,
        batches=count,
        device=tensors[0].device.type,
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        library=_version(),
        torch=str(torch.__version__),
    )


def certify(
    trained: nn.Module,
    converted: nn.Module,
    batches: Iterable[Any],
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> ParityReport:
    """:func:`check_parity`, and keep the report on ``converted``, so that saving writes it as the certificate.

    Raises:
        ParityError: the converted model is not what trained.
        ValueError: as :func:`check_parity`.
    """
    report = check_parity(trained, converted, batches, forward)
    report.raise_if_failed()
    attach_report(converted, report)
    return report

"""Rounding every weight of a model to the nearest code: the method that looks at no batch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_qat.nn import QATLayer, QATMultiheadAttention, RecurrentLayer
from lightning_qat.ptq.blocks import find_blocks
from lightning_qat.ptq.outcome import (
    LayerOutcome,
    PTQObserver,
    PTQReport,
    Stopwatch,
    attach_ptq_report,
    most_memory,
)
from lightning_qat.ptq.streaming import WeightStream
from lightning_qat.transforms.calibrate import calibrate
from lightning_qat.transforms.convert import convert as convert_model
from lightning_qat.transforms.convert import convert_layers, finish_conversion
from lightning_qat.transforms.fuse import trace_folds
from lightning_qat.transforms.prepare import qat_layers
from lightning_qat.transforms.ranges import static_quantizers

ModelT = TypeVar("ModelT", bound=nn.Module)


def round_model(
    model: ModelT,
    calibration: Iterable[Any] | None,
    forward: Callable[[nn.Module, Any], Any] | None,
    observer: PTQObserver,
    notes: tuple[str, ...],
    *,
    verify: bool,
    convert: bool,
    across_ranks: bool = False,
    stream: WeightStream | None = None,
) -> ModelT:
    """Round every weight of a prepared model to nearest; of the batches, activations get their ranges.

    Args:
        model: prepared; converted in place if its weights are in files.
        calibration: batches; None where no range is calibrated, and where none is they are not run.
        forward: see :func:`quantize_model`.
        observer: likewise.
        notes: for the report.
        verify: see :func:`quantize_model`.
        convert: likewise.
        across_ranks: every rank has batches of its own; ranges are those of all.
        stream: reads the weights of ``model``, which it does not have.
    """
    watch = Stopwatch()
    batches: Any = list(calibration) if verify and calibration is not None else calibration
    if _learns_of_batches(model):
        _learn_of(batches, model, forward, across_ranks, stream)
    outcomes: list[LayerOutcome] = []

    def done(name: str, layer: QATLayer) -> None:
        bits, weights = layer.weight_quantizer.bits, layer.weight.numel()
        outcomes.append(LayerOutcome(name, "rtn", bits, weights, memory=most_memory()))
        observer.layer_done(outcomes[-1])

    result = model
    if stream is not None:
        _convert_in_turn(model, stream, done)
    else:
        for name, layer in qat_layers(model):
            done(name, layer)
        result = convert_model(model, verify=batches if verify else None, forward=forward) if convert else model
    report = PTQReport("rtn", None, tuple(outcomes), notes, watch.seconds())
    attach_ptq_report(result, report)
    observer.finished(report)
    return result


def _learn_of(
    batches: Any,
    model: nn.Module,
    forward: Callable[[nn.Module, Any], Any] | None,
    across_ranks: bool,
    stream: WeightStream | None,
) -> None:
    """Find ranges and what follows a layer; without batches the ranges have to be there."""
    if batches is not None:
        blocks = [] if stream is None else find_blocks(model, dict(qat_layers(model)))
        with contextlib.nullcontext() if stream is None else stream.lending([block.module for block in blocks]):
            calibrate(model, batches, forward, across_ranks=across_ranks)
    elif waiting := [q for q in static_quantizers(model) if not q.calibrated]:
        raise ValueError(
            f"the inputs of {len(waiting)} layers, such as {waiting[0].name!r}, need calibrated ranges; give "
            "calibration=batches, or a config without them, such as 'int8_dynamic' or 'int8_weight_only'"
        )


def _learns_of_batches(model: nn.Module) -> bool:
    """Return whether a batch shows anything: a range, or which BatchNorm follows a layer."""
    return bool(static_quantizers(model)) or any(isinstance(module, _BatchNorm) for module in model.modules())


@torch.no_grad()
def _convert_in_turn(model: nn.Module, stream: WeightStream, done: Callable[[str, QATLayer], None]) -> None:
    """Read, round and pack one layer after the other, in place; those of an attention go together."""
    trace_folds(model)
    wholes = (module for module in model.modules() if isinstance(module, (QATMultiheadAttention, RecurrentLayer)))
    parts = {part: whole for whole in wholes for part in whole.children()}
    together: dict[nn.Module, list[tuple[str, QATLayer]]] = {}
    for name, layer in qat_layers(model):
        together.setdefault(parts.get(layer, layer), []).append((name, layer))
    for holder, layers in together.items():
        norms = [q.folded_norm for _, layer in layers if (q := layer.weight_quantizer).folded_norm]
        stream.take([holder, *(model.get_submodule(norm) for norm in norms)])
        for name, layer in layers:
            done(name, layer)
        convert_layers(model, layers)
    stream.take([model])
    finish_conversion(model)

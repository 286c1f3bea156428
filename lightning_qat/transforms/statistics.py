"""What the quantizers of a model hold, layer by layer: scales, zero points, ranges, and what the weights lose."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qat.config import QuantizationConfig, nearest_first
from lightning_qat.nn import FoldedBatchNorm, QATLayer, QuantizedLayer
from lightning_qat.nn.attention import projections_of
from lightning_qat.nn.layer import float_type
from lightning_qat.nn.norm import norm_factor_and_shift
from lightning_qat.nn.recurrent import weights_of
from lightning_qat.ops.fake_quantize import quant_range
from lightning_qat.quantizers.fake_quantizer import ActivationQuantizer
from lightning_qat.quantizers.input_arrangement import ARRANGEMENT, by_feature
from lightning_qat.schemes import IntegerScheme, TensorFormat, get_scheme
from lightning_qat.transforms.comparison import _decibel, _powers
from lightning_qat.transforms.convert import _float_weight, _norm_of
from lightning_qat.transforms.fuse import trace_folds
from lightning_qat.transforms.prepare import copy_model, prepare, qat_layers


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerStatistics:
    """How one layer is quantized. A range is the lowest and the highest value that its codes can stand for.

    Args:
        name: of the layer in the model.
        kind: class of the float layer, such as ``"Conv2d"``.
        scheme: number format of the weight.
        bits: of a weight's code.
        granularity: what shares a weight scale: ``"tensor"``, ``"channel"`` or ``"group of 128"``.
        scale: of the weight, one for each of these.
        zero_point: of the weight, shaped as ``scale``; None for a symmetric grid.
        range: of the weight, over all scales; None for a format that is no affine integer.
        sqnr_db: of the quantized weight against the float one; None where there is no float one.
        input_scheme: number format of the input; None for weight-only, and the rest is None too.
        input_bits: of an input's code.
        input_scale: calibrated, a scalar; None for ranges that are found at run time or not yet.
        input_zero_point: None for a symmetric grid and where there is no ``input_scale``.
        input_range: as ``range``; None where there is no ``input_scale``.
        input_order: which feature of the input each column of the weight multiplies; None for column by column.
        input_factor: what the layer multiplies that feature by before it is quantized; None for nothing.
        execution: arithmetic of a converted layer, see :attr:`QuantizedLayer.execution`; None for a prepared one.
    """

    name: str
    kind: str
    scheme: str
    bits: int
    granularity: str
    scale: Tensor
    zero_point: Tensor | None = None
    range: tuple[float, float] | None = None
    sqnr_db: float | None = None
    input_scheme: str | None = None
    input_bits: int | None = None
    input_scale: Tensor | None = None
    input_zero_point: Tensor | None = None
    input_range: tuple[float, float] | None = None
    input_order: Tensor | None = None
    input_factor: Tensor | None = None
    execution: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values: a tensor becomes ``{"min", "max", "count"}``.

        Numbers that JSON does not have become the strings ``"inf"``, ``"-inf"`` and ``"nan"``.
        """
        return {name: _plain(value) for name, value in vars(self).items()}


def quantization_statistics(model: nn.Module, reference: nn.Module | None = None) -> dict[str, LayerStatistics]:
    """Return the statistics of every prepared or converted layer, by name, each layer once.

    A prepared layer's are those of its weight as it is now; its SQNR is measured against that weight. They are copies
    on the CPU: training on does not change them.

    Args:
        model: prepared or converted.
        reference: the float or the prepared model that a converted one is compared with, for its SQNR. BatchNorm
            that the converted layer took in is folded into the float weight too; where tracing the reference does
            not tell which one that is, the SQNR stays None (a prepared reference always tells).

    Raises:
        ValueError: no layer of ``model`` is quantized, or ``reference`` lacks one of them.
    """
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    quantized = [(name, m) for name, m in model.named_modules() if isinstance(m, (QATLayer, QuantizedLayer))]
    if not quantized:
        raise ValueError(
            f"{type(model).__name__} has no quantized layer; call prepare(model, plan), or give a converted model"
        )
    converted = {name: layer for name, layer in quantized if isinstance(layer, QuantizedLayer)}
    weights = (
        {} if reference is None else _reference_weights(model, converted, getattr(reference, "_orig_mod", reference))
    )
    with torch.no_grad():
        return {
            name: _of_prepared(name, layer) if isinstance(layer, QATLayer) else _of_converted(name, layer, weights)
            for name, layer in quantized
        }


def _of_prepared(name: str, layer: QATLayer) -> LayerStatistics:
    weight, quantizer = _float_weight(layer), layer.weight_quantizer
    scale, zero_point = quantizer.parameters_for(weight)
    fmt, scheme = quantizer.format, quantizer.scheme
    values = scheme.dequantize(
        scheme.quantize(weight, scale, zero_point, fmt),
        scheme.effective_scale(scale, fmt),
        zero_point,
        fmt,
        torch.promote_types(weight.dtype, torch.float32),
    )
    return LayerStatistics(
        name=name,
        kind=float_type(layer).__name__,
        **_of_weight(scale, zero_point, fmt),
        sqnr_db=_sqnr_db(weight, values),
        **_of_observed_input(layer.input_quantizer),
        **_of_arrangement(quantizer),
    )


def _of_converted(name: str, layer: QuantizedLayer, weights: dict[str, Tensor]) -> LayerStatistics:
    held = (layer.codes, layer.held_scale(), layer.weight_zero_point, layer.weight_format)
    expected, sqnr_db = weights.get(name), None
    if expected is not None:
        values = get_scheme(layer.weight_format.scheme).dequantize(*held, torch.float32)
        values = by_feature(values, layer.input_order, layer.input_factor)
        sqnr_db = _sqnr_db(expected.to(values.device), values)
    return LayerStatistics(
        name=name,
        kind=float_type(layer).__name__,
        **_of_weight(*held[1:]),
        sqnr_db=sqnr_db,
        **_of_input(layer.input_scale, layer.input_zero_point, layer.input_format),
        **_of_arrangement(layer),
        execution=layer.execution,
    )


def _of_weight(scale: Tensor, zero_point: Tensor | None, fmt: TensorFormat) -> dict[str, Any]:
    shared = "tensor" if fmt.axis is None else "channel"
    if fmt.group_size is not None or fmt.block_size is not None:
        shared = f"group of {fmt.group_size}" if fmt.block_size is None else f"block of {fmt.block_size}"
    zero_point = None if fmt.symmetric else zero_point
    return {
        "scheme": str(fmt.scheme),
        "bits": fmt.bits,
        "granularity": shared,
        "scale": _kept(scale),
        "zero_point": None if zero_point is None else _kept(zero_point),
        "range": _range(scale, zero_point, fmt),
    }


def _of_observed_input(quantizer: ActivationQuantizer | None) -> dict[str, Any]:
    if quantizer is None:
        return {}
    # Before calibration the buffers hold placeholders.
    known = quantizer.calibrated and not quantizer.format.dynamic
    return _of_input(quantizer.scale if known else None, quantizer.zero_point if known else None, quantizer.format)


def _of_arrangement(holder: nn.Module) -> dict[str, Any]:
    held = {name: holder._buffers[name] for name in ARRANGEMENT}
    return {name: _kept(tensor) for name, tensor in held.items() if tensor is not None}


def _of_input(scale: Tensor | None, zero_point: Tensor | None, fmt: TensorFormat | None) -> dict[str, Any]:
    if fmt is None:
        return {}
    found: dict[str, Any] = {"input_scheme": str(fmt.scheme), "input_bits": fmt.bits}
    if scale is None:
        return found
    zero_point = None if fmt.symmetric else zero_point
    found |= {"input_scale": _kept(scale), "input_range": _range(scale, zero_point, fmt)}
    return found if zero_point is None else {**found, "input_zero_point": _kept(zero_point)}


def _range(scale: Tensor, zero_point: Tensor | None, fmt: TensorFormat) -> tuple[float, float] | None:
    if not isinstance(get_scheme(fmt.scheme), IntegerScheme) or not scale.numel():
        return None
    zero = 0.0 if zero_point is None else zero_point.double()
    # A folded BatchNorm may leave a scale with a negative sign.
    ends = torch.stack([(code - zero) * scale.double() for code in quant_range(fmt.bits, fmt.symmetric)])
    return float(ends.min()), float(ends.max())


def _reference_weights(
    model: nn.Module, converted: dict[str, QuantizedLayer], reference: nn.Module
) -> dict[str, Tensor]:
    """Return the float weight that each converted layer stands for, where that can be told."""
    layers = dict(reference.named_modules()) | projections_of(reference) | weights_of(reference)
    folded = {name for name, module in model.named_modules() if isinstance(module, FoldedBatchNorm)}
    norms = _norms(reference) if folded else {}
    taken = {name: names[0] for name, names in norms.items() if names[0] in folded}
    sure = folded == set(taken.values())
    found = {}
    for name, layer in converted.items():
        if name not in layers:
            near = ", ".join(repr(n) for n in nearest_first(name, layers)[:3])
            raise ValueError(
                f"reference has no layer {name!r}; give the float model of the same class (nearest: {near})"
            )
        if not sure and name not in taken:
            continue  # one of the BatchNorms may be in it
        source: Any = layers[name]
        if isinstance(source, QATLayer):
            quantizer = source.weight_quantizer
            weight = by_feature(_float_weight(source).float(), quantizer.input_order, quantizer.input_factor)
        else:
            weight = source.weight.detach().float()
        if weight.shape != layer.weight_shape:
            shapes = f"{tuple(weight.shape)} and {tuple(layer.weight_shape)}"
            raise ValueError(
                f"layer {name!r} has another shape in reference: {shapes}; give the model it was made from"
            )
        found[name] = _times_factor(weight, norms[name][1], layer.channel_axis) if name in taken else weight
    return found


def _norms(reference: nn.Module) -> dict[str, tuple[str, nn.Module]]:
    """Return layer -> name and module of the BatchNorm that conversion folds into it."""
    prepared = copy_model(reference)
    if not any(True for _ in qat_layers(prepared)):
        prepare(prepared, QuantizationConfig())  # what follows a layer is found out on prepared ones
    trace_folds(prepared)
    found = {name: _norm_of(prepared, name, layer) for name, layer in qat_layers(prepared)}
    names = {module: name for name, module in prepared.named_modules()}
    return {name: (names[norm], norm) for name, norm in found.items() if norm is not None}


def _times_factor(weight: Tensor, norm: nn.Module, axis: int) -> Tensor:
    shape = [1] * weight.dim()
    shape[axis] = -1
    return weight * norm_factor_and_shift(norm, None)[0].float().view(shape)


def _sqnr_db(expected: Tensor, actual: Tensor) -> float | None:
    return _decibel(*_powers(expected, actual)) if expected.numel() else None


def _kept(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        ends = {"min": _plain(value.min().item()), "max": _plain(value.max().item())} if value.numel() else {}
        return {**ends, "count": value.numel()}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value

"""Between a prepared layer and an algorithm: the problem that it poses, and taking on the codes that were chosen."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_qat.nn import QATLayer, QATLinear, QATMultiheadAttention
from lightning_qat.nn.attention import Projection
from lightning_qat.nn.computed_weight import weight_now
from lightning_qat.nn.recurrent import RecurrentWeight
from lightning_qat.ptq.channels import computes_weight
from lightning_qat.ptq.chosen import ChosenCodes
from lightning_qat.ptq.methods import LayerProblem
from lightning_qat.ptq.statistics import InputStatistics
from lightning_qat.schemes import get_scheme

#: Share of the codes of a weight that may become their neighbours because the dtype of the weight has few digits.
_MOST_MOVED = 0.01


def given_grid(layer: QATLayer) -> tuple[Tensor | None, Tensor | None]:
    """Return the scale and zero point that QAT has learned or frozen, or two times None."""
    quantizer = layer.weight_quantizer
    learned = quantizer.learned is not None and quantizer.learned.ready
    return (quantizer.scale, quantizer.zero_point) if learned or quantizer.frozen else (None, None)


def arranges_input(layer: QATLayer) -> bool:
    """Return whether a layer scales its input, or takes its features in an order of its own."""
    quantizer = layer.weight_quantizer
    return quantizer.input_order is not None or quantizer.input_factor is not None


def takes_any_order(layer: nn.Module) -> bool:
    """Return whether a layer may scale its input, and take its features in another order: a Linear that is plain."""
    plain = isinstance(layer, QATLinear) and type(layer).forward is QATLinear.forward
    return plain and not isinstance(layer, Projection) and not computes_weight(layer)


def problem_of(layer: QATLayer, statistics: InputStatistics) -> LayerProblem:
    """Return what an algorithm decides about.

    Args:
        layer: whose weight it is.
        statistics: of what comes to the layer, before it scales it.
    """
    quantizer = layer.weight_quantizer
    if quantizer.input_order is not None:
        statistics = statistics.ordered(quantizer.input_order)
    if quantizer.input_factor is not None:
        statistics = statistics.divided_by(quantizer.input_factor.reciprocal())
    weight = weight_now(layer).detach()
    if weight.numel() and not bool(torch.isfinite(torch.stack(torch.aminmax(weight))).all()):
        name = layer.weight_quantizer.name
        raise ValueError(f"the weight of layer {name!r} holds NaN or inf; start from a checkpoint before it broke")
    orders = takes_any_order(layer)
    return LayerProblem(weight.flatten(1), statistics, quantizer.format, *given_grid(layer), orders=orders)


def nearest_codes(layer: QATLayer) -> ChosenCodes:
    """Return what the layer would be converted to as it is."""
    quantizer, weight = layer.weight_quantizer, weight_now(layer).detach()
    scale, zero_point = quantizer.parameters_for(weight)
    fmt = quantizer.format
    codes = get_scheme(fmt.scheme).quantize(weight, scale, zero_point, fmt)
    return ChosenCodes(codes, scale, None if fmt.symmetric else zero_point, fmt, float("nan"), float("nan"))


@torch.no_grad()
def adopt(name: str, layer: QATLayer, chosen: ChosenCodes) -> int:
    """Let the weight of a layer be what ``chosen`` stands for, on that grid: conversion then makes these codes again.

    The weight becomes a new parameter; whoever shares the old one keeps it. A few codes of 8 bits have values that
    bfloat16 does not tell from their neighbours': they become these. A weight that is computed stays as it is, for what
    makes it (a mask of zeros, say) goes on to hold: its codes are the nearest ones anyway.

    Returns:
        How many codes are others than those chosen.

    Raises:
        ValueError: the codes are of another format, or their values do not come back as these codes.
    """
    quantizer = layer.weight_quantizer
    fmt = quantizer.format
    if chosen.format != fmt:
        raise ValueError(f"layer {name!r} has {fmt}, and codes were chosen for {chosen.format}")
    if computes_weight(layer):
        return 0
    before = weight_now(layer)
    scheme = get_scheme(fmt.scheme)
    scale, zero_point = quantizer.fix(chosen.scale, chosen.zero_point)
    effective = scheme.effective_scale(scale, fmt)

    def values_of(codes: Tensor) -> Tensor:
        return scheme.dequantize(codes, effective, zero_point, fmt, before.dtype)

    codes = chosen.codes.reshape(before.shape)
    values = values_of(codes)
    # Two codes of one value (0 and -0 of fp4, say) are as good as each other: values are compared.
    again = values_of(scheme.quantize(values, scale, zero_point, fmt))
    moved = int((again != values).sum())
    if moved:
        wrong = int((values_of(scheme.quantize(again, scale, zero_point, fmt)) != again).sum())
        if wrong or moved > _MOST_MOVED * codes.numel():
            raise ValueError(
                f"{moved} of {codes.numel()} codes of layer {name!r} do not come back from their values in "
                f"{before.dtype}; quantize the model in float32, or use fewer bits"
            )
    set_weight(layer, again)
    if chosen.order is not None:
        before_it, factor = quantizer.input_order, quantizer.input_factor
        order = chosen.order if before_it is None else before_it[chosen.order]
        quantizer.arrange_input(order, None if factor is None else factor[chosen.order])
    return moved


@torch.no_grad()
def set_weight(layer: nn.Module, values: Tensor) -> None:
    """Give a layer another weight; a part of an attention's packed weight is written in place."""
    own = layer._parameters.get("weight")
    if isinstance(layer, RecurrentWeight):
        owner = layer.owner._parameters
        owner[layer.parameter] = nn.Parameter(values.to(layer.weight.dtype), layer.weight.requires_grad)
    elif own is not None:
        layer._parameters["weight"] = nn.Parameter(values.to(own.dtype), requires_grad=own.requires_grad)
    else:
        own_packed_weights(layer.attention)  # type: ignore[arg-type]  # it may still be the user's
        layer.weight.copy_(values)  # type: ignore[operator]


@torch.no_grad()
def own_packed_weights(module: nn.Module) -> None:
    """Give every prepared attention inside ``module`` copies of the weights that its projections are parts of."""
    for attention in module.modules():
        if isinstance(attention, QATMultiheadAttention):
            for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
                packed = attention._parameters.get(name)
                if packed is not None:
                    attention._parameters[name] = nn.Parameter(packed.detach().clone(), packed.requires_grad)


@torch.no_grad()
def own_parameters(model: nn.Module, original: nn.Module) -> None:
    """Give ``model`` copies, in place, of what it shares with ``original``; what it shares with itself stays so."""
    theirs = {_memory(parameter) for parameter in original.parameters()} - {0}
    copies: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None or _memory(parameter) not in theirs:
                continue
            if id(parameter) not in copies:
                copies[id(parameter)] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
            setattr(module, name, copies[id(parameter)])  # recurrent layers keep a list besides


def _memory(parameter: Tensor) -> int:
    return 0 if parameter.is_meta else parameter.untyped_storage().data_ptr()

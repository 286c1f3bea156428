"""converted model -> new float model with the values of its codes: the way back out of packed integers."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_qat.nn import QuantizedMultiheadAttention
from lightning_qat.nn.attention import INPUT_PROJECTIONS
from lightning_qat.nn.layer import QuantizedLayer, float_type
from lightning_qat.nn.recurrent import RecurrentLayer, RecurrentWeight, float_recurrent
from lightning_qat.nn.region import undo_codes_inside
from lightning_qat.quantizers.input_arrangement import ARRANGEMENT, by_feature
from lightning_qat.schemes import get_scheme
from lightning_qat.transforms.certificate import forget_reports
from lightning_qat.transforms.prepare import copy_model
from lightning_qat.transforms.save_pretrained import allow_save_pretrained

ModelT = TypeVar("ModelT", bound=nn.Module)

#: And those of the scale, which the scheme names. Not all that begins so: a user's layer may have an ``input_mean``.
_BUFFERS = ("weight_packed", "weight_zero_point", "input_scale", "input_zero_point", *ARRANGEMENT)
_ATTRIBUTES = ("weight_format", "input_format", "weight_shape", "weight_dtype", "kernel_cache", "feeds_one_layer")


@torch.no_grad()
def dequantize_model(model: ModelT) -> ModelT:
    """Return a new float model: each converted layer as it was before, with the values that its codes stand for.

    It is what adapters that were trained on packed weights are merged into, and what libraries that know no packed
    weights evaluate: ``save_pretrained`` of a transformers model writes it. Inputs are in float, BatchNorm that was
    folded stays in the weights, and parameters that conversion froze stay frozen until ``requires_grad_()``.

    Args:
        model: what :func:`convert`, :func:`quantize_model` or :func:`load_quantized` returned, or a model that holds
            such layers, as peft's do. It is left untouched.

    Raises:
        ValueError: if nothing of ``model`` is converted.
    """
    original: ModelT = getattr(model, "_orig_mod", model)  # of torch.compile
    if not any(isinstance(module, QuantizedLayer) for module in original.modules()):
        raise ValueError(f"{type(original).__name__} has no converted layer; give what convert(model) returned")
    made = copy_model(original)
    for layer in list(made.modules()):
        if isinstance(layer, QuantizedLayer):
            _dequantize(layer)
    for module in list(made.modules()):
        if isinstance(module, QuantizedMultiheadAttention):
            _join_attention(module)
        elif isinstance(module, RecurrentLayer):
            _join_recurrent(module)
    undo_codes_inside(made)
    allow_save_pretrained(made)
    forget_reports(made)
    return made


def _frozen(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=False)


def _dequantize(layer: QuantizedLayer) -> None:
    """Turn a converted layer into the float layer it was, in place."""
    weight = layer.weight_in(layer.weight_dtype)
    if layer.input_order is not None or layer.input_factor is not None:
        weight = by_feature(weight, layer.input_order, layer.input_factor)
    ends = get_scheme(layer.weight_format.scheme).store_scale(layer.held_scale(), layer.weight_format)
    for name in (*_BUFFERS, *(f"weight_scale{end}" for end in ends)):
        layer._buffers.pop(name, None)
    for name in _ATTRIBUTES:
        layer.__dict__.pop(name, None)
    layer.__class__ = float_type(layer)  # type: ignore[assignment]
    others = dict(layer._parameters)
    layer._parameters.clear()
    layer._parameters.update({"weight": _frozen(weight), **others})  # first, as the float layer has it


def _join_attention(attention: nn.Module) -> None:
    """Give an attention its packed weights back, in place of the projections that own their parts."""
    layers: list[Any] = [attention._modules.pop(name) for name in INPUT_PROJECTIONS]
    facts: Any = attention
    weights, biases = [layer.weight.detach() for layer in layers], [layer.bias for layer in layers]
    if facts._qkv_same_embed_dim:
        attention._parameters["in_proj_weight"] = _frozen(torch.cat(weights))
    else:
        for name, weight in zip(INPUT_PROJECTIONS, weights, strict=True):
            attention._parameters[f"{name}_weight"] = _frozen(weight)
    if biases[0] is not None:
        attention._parameters["in_proj_bias"] = _frozen(torch.cat([bias.detach() for bias in biases]))
    attention.__dict__.pop("product_bits", None)
    attention.__class__ = nn.MultiheadAttention


def _join_recurrent(module: nn.Module) -> None:
    """Give a recurrent layer its weights back, in place of the children that own them."""
    for name, child in list(module.named_children()):
        if isinstance(child, RecurrentWeight):
            del module._modules[name]
            if child._parameters.get("weight") is not None:
                module._parameters[child.parameter] = child._parameters["weight"]
    module.__class__ = float_recurrent(module)
    if isinstance(module, nn.RNNBase):
        module._init_flat_weights()

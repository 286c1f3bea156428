"""Which layers ``torch.onnx`` can trace, and what of them becomes an initializer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_qat.formats.onnx_file import two_a_byte
from lightning_qat.formats.traced_convolutions import TracedConv, TracedConvTranspose, TracedUnfolded, unfolds
from lightning_qat.formats.traced_layers import Traced, TracedEmbedding, TracedLinear
from lightning_qat.nn import QuantizedConvTranspose2d, QuantizedEmbedding, QuantizedLayer, QuantizedLinear
from lightning_qat.nn.conv import _QuantizedConv
from lightning_qat.schemes import IntegerScheme, get_scheme


def make_traceable(name: str, layer: QuantizedLayer) -> None:
    """Turn a converted layer, of a copy of the model, into one that is traced as ONNX operators, in place.

    Raises:
        ValueError: if ONNX has no operator for one of its formats.
    """
    _check(name, layer)
    traced: Any = layer
    kind, fmt = _class_for(layer), layer.weight_format
    scale, zero = layer.weight_scale.detach(), layer.weight_zero_point
    # Engines multiply uint8 by int8 fastest: asymmetric codes of 8 bits are moved down to be signed.
    moved = 0 if fmt.symmetric or fmt.bits < 8 else 128
    codes = (layer.codes.to(torch.int16) - moved).to(torch.int8)
    # onnxruntime 1.32 computes a Gemm with integers only where the zero points, be they 0, are written.
    zero = torch.zeros_like(scale, dtype=torch.int8) if fmt.symmetric else (zero - moved).to(torch.int8)
    if kind.inputs_first:
        codes = codes.movedim(1, -1).flatten(1).t().contiguous()
        if fmt.group_size is not None:
            scale, zero = scale.t().contiguous(), zero.t().contiguous()
    if kind is TracedEmbedding:
        traced.onnx_two_a_byte = fmt.bits <= 4 and codes.shape[1] % 2 == 0
        if traced.onnx_two_a_byte:
            moved = 8 if fmt.symmetric else 0
            codes, zero = two_a_byte(codes + moved).reshape(codes.shape[0], -1), zero + moved
    layer.register_buffer("onnx_codes", codes, persistent=False)
    layer.register_buffer("onnx_scale", scale.contiguous(), persistent=False)
    layer.register_buffer("onnx_zero_point", zero, persistent=False)
    inputs = layer.input_format
    if inputs is not None and (inputs.symmetric or not inputs.dynamic):
        # Engines multiply uint8 by int8 fastest, some nothing else: symmetric codes are moved up to be unsigned.
        held: Any = torch.tensor(2 ** (inputs.bits - 1)) if inputs.symmetric else layer.input_zero_point
        layer.register_buffer("onnx_input_zero_point", held.to(torch.uint8), persistent=False)
        traced.onnx_padding = int(held)
    bias, bias_scale = _integer_bias(layer)
    layer.register_buffer("onnx_bias", bias, persistent=False)
    layer.register_buffer("onnx_bias_scale", bias_scale, persistent=False)
    layer.__class__ = type(f"Traced_{type(layer).__name__}", (kind, type(layer)), {})


def _integer_bias(layer: QuantizedLayer) -> tuple[Tensor | None, Tensor | None]:
    """Return the bias of a layer with static inputs as int32, and its scale: the product of the other two scales.

    Engines compute with integers only where the bias is one. It is rounded by half a step of the sums at most.
    """
    bias, fmt, scale = getattr(layer, "bias", None), layer.weight_format, layer.weight_scale
    if bias is None or layer.input_scale is None or fmt.group_size is not None:
        return None, None
    steps = (layer.input_scale * scale).expand(bias.shape[0]).contiguous()
    codes = torch.round(bias.detach().double() / steps.double())
    if not bool((codes.abs() < 2**31).all()):
        return None, None
    return codes.to(torch.int32), steps


def _class_for(layer: QuantizedLayer) -> type[Traced]:
    if isinstance(layer, QuantizedLinear):
        return TracedLinear
    if isinstance(layer, QuantizedEmbedding):
        return TracedEmbedding
    if isinstance(layer, QuantizedConvTranspose2d):
        return TracedConvTranspose
    if not isinstance(layer, _QuantizedConv):
        return Traced
    return TracedUnfolded if unfolds(layer) else TracedConv


def _check(name: str, layer: QuantizedLayer) -> None:
    for what, fmt in (("", layer.weight_format), ("the input of ", layer.input_format)):
        if fmt is not None and (type(get_scheme(fmt.scheme)) is not IntegerScheme or fmt.bits > 8):
            raise ValueError(
                f"{what}layer {name!r} is in {fmt.scheme} with {fmt.bits} bits, and ONNX has integers of at most 8; "
                f"quantize it in 'int8' or 'int4', or leave it in float with LayerRule({name!r})"
            )
    if layer.weight_dtype != torch.float32:
        raise ValueError(
            f"layer {name!r} has weights in {layer.weight_dtype}, and ONNX files are written in float32; export "
            "model.float()"
        )
    if layer.weight_format.group_size is not None and len(layer.weight_shape) > 2:
        raise ValueError(
            f"layer {name!r} is a convolution with groups of {layer.weight_format.group_size}, and ONNX has blocks "
            "along one dimension; quantize it with per_channel=True"
        )

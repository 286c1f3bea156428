"""Converted layers as ``torch.onnx`` traces them: QuantizeLinear and DequantizeLinear instead of our own operators."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.onnx.ops import symbolic

from lightning_qat.nn import QuantizedConvTranspose2d, QuantizedEmbedding, QuantizedLayer, QuantizedLinear
from lightning_qat.nn.conv import _QuantizedConv, _transposed
from lightning_qat.ops.fake_quantize import quant_range
from lightning_qat.schemes import IntegerScheme, TensorFormat, get_scheme


class Traced(QuantizedLayer):
    """Anything with a ``forward`` of its own that reads the weight."""

    #: Whether the codes are held with inputs first, as MatMul reads them.
    inputs_first: ClassVar[bool] = False
    onnx_codes: Tensor
    onnx_scale: Tensor
    onnx_zero_point: Tensor
    onnx_input_zero_point: Tensor
    bias: Tensor | None
    #: The bias in steps of the products of codes, as engines add it; None where it stays in float.
    onnx_bias: Tensor | None
    onnx_bias_scale: Tensor | None

    def _traced_weight(self) -> Tensor:
        fmt, codes = self.weight_format, self.onnx_codes
        inputs = (codes, self.onnx_scale, self.onnx_zero_point)
        attributes: dict[str, Any] = {}
        if fmt.group_size is not None:
            attributes = {"axis": 0 if self.inputs_first else 1, "block_size": fmt.group_size}
        elif fmt.axis is not None:
            attributes = {"axis": 1 - fmt.axis if self.inputs_first else fmt.axis}
        return symbolic("DequantizeLinear", inputs, attributes, dtype=torch.float32, shape=codes.shape)

    weight: Any = property(_traced_weight)

    def traced_bias(self) -> Tensor | None:
        """Return the bias."""
        if self.onnx_bias is None:
            return self.bias
        inputs, shape = (self.onnx_bias, self.onnx_bias_scale), self.onnx_bias.shape
        return symbolic("DequantizeLinear", inputs, {"axis": 0}, dtype=torch.float32, shape=shape)

    def on_grid(self, x: Tensor) -> Tensor:
        """Return the input on its grid."""
        fmt = self.input_format
        if fmt is None:
            return x
        if fmt.dynamic:
            codes, scale, zero_point = dynamic_codes(x, fmt, self.spatial_dims)
            return (codes - zero_point) * scale
        grid = (self.input_scale, self.onnx_input_zero_point)
        return symbolic("DequantizeLinear", (self.input_codes(x), *grid), dtype=torch.float32, shape=x.shape)

    def input_codes(self, x: Tensor) -> Tensor:
        """Return the codes of an input with a calibrated range."""
        fmt: Any = self.input_format
        scale: Any = self.input_scale
        zero_point = self.onnx_input_zero_point
        x = _within(x, fmt, scale, zero_point)
        return symbolic("QuantizeLinear", (x, scale, zero_point), dtype=zero_point.dtype, shape=x.shape)

    def integer_product(self, codes: Tensor, zero_point: Tensor) -> Tensor:
        """Return ``(codes - zero_point) @ (weight's codes - theirs)`` in float32, with inputs last."""
        shape = (*codes.shape[:-1], self.onnx_codes.shape[1])
        inputs = (codes, self.onnx_codes, zero_point, self.onnx_zero_point)
        return symbolic("MatMulInteger", inputs, dtype=torch.int32, shape=shape).to(torch.float32)


class TracedLinear(Traced):
    """MatMul with a weight whose inputs come first, then the bias."""

    inputs_first = True

    def forward(self, input: Tensor) -> Tensor:
        fmt = self.input_format
        if fmt is not None and fmt.dynamic and fmt.symmetric and self.weight_format.group_size is None:
            codes, scale, _ = dynamic_codes(self.arranged_input(input), fmt, None)
            # One scale after the other: onnxruntime 1.32 takes the product of both for one scale for all tokens.
            codes = (codes + 2 ** (fmt.bits - 1)).to(torch.uint8)
            product = self.integer_product(codes, self.onnx_input_zero_point) * scale * self.onnx_scale
        else:
            product = torch.matmul(self.quantized_input(input), self.weight)
        # A matrix with an int32 bias is a Gemm to engines; for more dimensions there is none, and they add floats.
        bias = self.traced_bias() if input.dim() == 2 else self.bias
        return product if bias is None else product + bias


class TracedConv(Traced):
    """A convolution of one to three dimensions."""

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(self.quantized_input(input), self.weight, self.traced_bias())  # type: ignore[operator]


class TracedPointwise(Traced):
    """A 1x1 convolution that is read as floats, as by a residual addition: MatMul, channels last.

    Engines compute a convolution with integers only where its output is quantized at once, a MatMul in any case. Where
    nothing in training quantized the output, onnxruntime took 7 times as long for the convolution, all weights
    dequantized at every call.
    """

    inputs_first = True

    def forward(self, input: Tensor) -> Tensor:
        grid = (self.input_scale, self.onnx_input_zero_point)
        codes = self.input_codes(input).movedim(1, -1)
        x = symbolic("DequantizeLinear", (codes, *grid), dtype=torch.float32, shape=codes.shape)
        product = torch.matmul(x, self.weight)
        return (product if self.bias is None else product + self.bias).movedim(-1, 1)


class TracedConvTranspose(Traced):
    """A transposed convolution."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        return _transposed(self, self.quantized_input(input), self.weight, output_size)


class TracedEmbedding(Traced):
    """Rows of a dequantized table."""

    def forward(self, input: Tensor) -> Tensor:
        return F.embedding(input, self.weight)


def dynamic_codes(x: Tensor, fmt: TensorFormat, spatial_dims: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes, as floats, scales and zero points of ranges found in ``x``, in plain operators.

    The ranges are those of :func:`lightning_qat.ops.affine.choose_scale_zero_point`.
    """
    low_code, high_code = quant_range(fmt.bits, fmt.symmetric)
    axes = list(range(x.dim()))
    if fmt.dynamic_range == "token":
        axes = [-1] if spatial_dims is None else axes[-1 - spatial_dims :]
    low = x.amin(axes, keepdim=True).clamp(max=0.0)
    high = x.amax(axes, keepdim=True).clamp(min=0.0)
    tiny = torch.finfo(torch.float32).tiny
    if fmt.symmetric:
        top = torch.maximum(-low, high)
        scale = top / (high_code if fmt.bits >= 8 else high_code + 0.5)
        scale = torch.where(top == 0, 1.0, scale.clamp(min=tiny))
        zero_point = torch.zeros_like(scale)
    else:
        scale = high / high_code - low / high_code
        scale = torch.where(high == low, 1.0, scale.clamp(min=tiny))
        zero_point = torch.round(-low / scale).clamp(low_code, high_code)
    codes = torch.clamp(torch.round(x / scale) + zero_point, low_code, high_code)
    return codes, scale, zero_point


def _within(x: Tensor, fmt: TensorFormat, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Cut ``x`` to a grid that is narrower than the integers ONNX has for it."""
    low, high = quant_range(fmt.bits, fmt.symmetric)
    if fmt.bits == 8 and not fmt.symmetric:
        return x
    zero = 0 if fmt.symmetric else zero_point.to(torch.float32)
    return torch.minimum(torch.maximum(x, (low - zero) * scale), (high - zero) * scale)


def make_traceable(name: str, layer: QuantizedLayer) -> None:
    """Turn a converted layer, of a copy of the model, into one that is traced as ONNX operators, in place.

    Raises:
        ValueError: if ONNX has no operator for one of its formats.
    """
    _check(name, layer)
    kind, fmt = _class_for(layer), layer.weight_format
    dtype = torch.int8 if fmt.symmetric else torch.uint8
    codes, scale = layer.codes.to(dtype), layer.weight_scale.detach()
    # onnxruntime 1.32 computes a Gemm with integers only where the zero points, be they 0, are written.
    zero = torch.zeros_like(scale, dtype=dtype) if fmt.symmetric else layer.weight_zero_point.to(dtype)
    if kind.inputs_first:
        codes = codes.reshape(codes.shape[0], -1).t().contiguous()
        if fmt.group_size is not None:
            scale, zero = scale.t().contiguous(), zero.t().contiguous()
    layer.register_buffer("onnx_codes", codes, persistent=False)
    layer.register_buffer("onnx_scale", scale.contiguous(), persistent=False)
    layer.register_buffer("onnx_zero_point", zero, persistent=False)
    inputs = layer.input_format
    if inputs is not None and (inputs.symmetric or not inputs.dynamic):
        # Engines multiply uint8 by int8 fastest, some nothing else: symmetric codes are moved up to be unsigned.
        held: Any = torch.tensor(2 ** (inputs.bits - 1)) if inputs.symmetric else layer.input_zero_point
        layer.register_buffer("onnx_input_zero_point", held.to(torch.uint8), persistent=False)
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
    return TracedPointwise if _is_pointwise(layer) and not layer.feeds_one_layer else TracedConv


def _is_pointwise(layer: Any) -> bool:
    fmt = layer.input_format
    ones = all(n == 1 for size in (layer.kernel_size, layer.stride, layer.dilation) for n in size)
    plain = ones and layer.groups == 1 and not any(layer.padding) and layer.padding != "same"
    return bool(plain and fmt is not None and not fmt.dynamic)


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

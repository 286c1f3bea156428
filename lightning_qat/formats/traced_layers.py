"""Converted layers as ``torch.onnx`` traces them: QuantizeLinear and DequantizeLinear instead of our own operators."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.onnx.ops import symbolic

from lightning_qat.formats.onnx_file import INT4, STORED_AS, UINT4
from lightning_qat.nn import QuantizedLayer
from lightning_qat.ops.fake_quantize import absmax_divisor, quant_range
from lightning_qat.schemes import TensorFormat


class Traced(QuantizedLayer):
    """Anything with a ``forward`` of its own that reads the weight."""

    #: Whether the codes are held with inputs first, as MatMul reads them.
    inputs_first: ClassVar[bool] = False
    onnx_codes: Tensor
    onnx_scale: Tensor
    onnx_zero_point: Tensor
    onnx_input_zero_point: Tensor
    #: The same as a number, the code of 0.0.
    onnx_padding: int
    bias: Tensor | None
    #: The bias in steps of the products of codes, as engines add it; None where it stays in float.
    onnx_bias: Tensor | None
    onnx_bias_scale: Tensor | None

    def _traced_weight(self) -> Tensor:
        fmt, codes = self.weight_format, self.onnx_codes
        stored_as = self._stored_as()
        # Engines take symmetric codes of 4 bits for those of a product that reads them packed, without zero points.
        zero_points = () if stored_as == INT4 else (self.onnx_zero_point,)
        inputs = (codes, self.onnx_scale, *zero_points)
        attributes: dict[str, Any] = {}
        if fmt.group_size is not None:
            attributes = {"axis": 0 if self.inputs_first else 1, "block_size": fmt.group_size}
        elif fmt.axis is not None:
            attributes = {"axis": 1 - fmt.axis if self.inputs_first else fmt.axis}
        notes = None if stored_as is None else {STORED_AS: stored_as}
        return symbolic(
            "DequantizeLinear", inputs, attributes, dtype=torch.float32, shape=codes.shape, metadata_props=notes
        )

    def _stored_as(self) -> str | None:
        """Return the 4-bit integer that codes are written in. With quantized inputs engines compute in int8 alone."""
        fmt = self.weight_format
        if fmt.bits > 4 or self.input_format is not None:
            return None
        return INT4 if fmt.symmetric else UINT4

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
        elif fmt is None and input.dim() == 2 and self.bias is not None:
            # onnxruntime 1.32 makes this one a Gemm of two matrices, and reads packed weights in a MatMul alone.
            x = self.quantized_input(input).unsqueeze(0)
            return (torch.matmul(x, self.weight) + self.bias).squeeze(0)
        else:
            product = torch.matmul(self.quantized_input(input), self.weight)
        # A matrix with an int32 bias is a Gemm to engines; for more dimensions there is none, and they add floats.
        bias = self.traced_bias() if input.dim() == 2 else self.bias
        return product if bias is None else product + bias


class TracedEmbedding(Traced):
    """Rows of a table of codes, dequantized once they are picked: a DequantizeLinear would read the whole table."""

    #: Whether each byte of the table holds two codes, which ONNX can pick rows of; of integers of 4 bits it cannot.
    onnx_two_a_byte: bool

    def forward(self, input: Tensor) -> Tensor:
        codes, scale, zero_point = F.embedding(input, self.onnx_codes), self.onnx_scale, self.onnx_zero_point
        if self.onnx_two_a_byte:
            mask, step = torch.tensor(15, dtype=torch.uint8), torch.tensor(4, dtype=torch.uint8)
            low = symbolic("BitwiseAnd", (codes, mask), dtype=torch.uint8, shape=codes.shape)
            high = symbolic("BitShift", (codes, step), {"direction": "RIGHT"}, dtype=torch.uint8, shape=codes.shape)
            codes = torch.stack([low, high], -1).flatten(-2)
        values = codes.to(torch.float32)
        if scale.dim() == 0:
            return (values - zero_point.to(torch.float32)) * scale
        # One for each row, or for each group in it.
        scale, zero_point = (F.embedding(input, held.reshape(len(held), -1)) for held in (scale, zero_point))
        values = values.unflatten(-1, (scale.shape[-1], -1)) - zero_point.to(torch.float32).unsqueeze(-1)
        return (values * scale.unsqueeze(-1)).flatten(-2)


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
        scale = top / absmax_divisor(fmt.bits)
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

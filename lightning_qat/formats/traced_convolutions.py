"""Converted convolutions as ``torch.onnx`` traces them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.onnx.ops import symbolic

from lightning_qat.formats.traced_layers import Traced
from lightning_qat.nn import QuantizedLayer
from lightning_qat.nn.conv import _QuantizedConv, _transposed
from lightning_qat.nn.conv_kernel import _padding_before_and_after

#: Below this a pixel's codes are too few to gather, and float is faster: at 8 channels 1.4 times, at 16 it is not.
_LEAST_CHANNELS = 16


class TracedConv(Traced):
    """A convolution of one to three dimensions."""

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(self.quantized_input(input), self.weight, self.traced_bias())  # type: ignore[operator]


class TracedConvTranspose(Traced):
    """A transposed convolution."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        return _transposed(self, self.quantized_input(input), self.weight, output_size)


class TracedUnfolded(Traced):
    """A convolution as one product: the codes that each output reads, ``[pixels, kernel * channels]``, by the weight.

    Engines compute a convolution with integers only where its output is quantized at once, a product in any case. Where
    a residual addition or a pooling reads the output of a 3 x 3 convolution of 64 to 512 channels, onnxruntime 1.32
    takes 2.5 to 20 times as long in float, all weights dequantized at every call. ConvInteger, whose results are int32,
    takes as long as that, and five times as long with weights in int8. The rows need ``kernel`` bytes for each of the
    input's.
    """

    inputs_first = True

    def forward(self, input: Tensor) -> Tensor:
        layer: Any = self
        batched = input.dim() == len(layer.kernel_size) + 2
        rows, size = self._rows(input if batched else input.unsqueeze(0))
        grid = (self.input_scale, self.onnx_input_zero_point)
        x = symbolic("DequantizeLinear", (rows, *grid), dtype=torch.float32, shape=rows.shape)
        product, bias = torch.matmul(x, self.weight), self.traced_bias()
        product = product if bias is None else product + bias
        product = product.reshape(-1, *size, layer.out_channels).movedim(-1, 1)
        return product if batched else product.squeeze(0)

    def _rows(self, x: Tensor) -> tuple[Tensor, list[int]]:
        """Return the codes that each output reads, kernel before channels, and the sizes of the output."""
        layer: Any = self
        pads = _padding_before_and_after(layer)
        if layer.padding_mode != "zeros":  # of other values than 0.0, whose code is the zero point
            x, pads = F.pad(x, pads, mode=layer.padding_mode), ()
        codes = self.input_codes(x)
        if any(pads):
            codes = F.pad(codes, pads, value=layer.onnx_padding)
        codes = codes.movedim(1, -1)
        area, channels, spatial = math.prod(layer.kernel_size), codes.shape[-1], codes.shape[1:-1]
        spans = [(k - 1) * d for k, d in zip(layer.kernel_size, layer.dilation, strict=True)]
        size = [(n - span - 1) // s + 1 for n, span, s in zip(spatial, spans, layer.stride, strict=True)]
        if area > 1 or any(step > 1 for step in layer.stride):
            pixels, codes = _pixels(layer, spatial).flatten(), codes.flatten(1, -2)
            shape = (codes.shape[0], pixels.shape[0], channels)
            codes = symbolic("Gather", (codes, pixels), {"axis": 1}, dtype=codes.dtype, shape=shape)
        return codes.reshape(-1, area * channels), size


def _pixels(layer: Any, spatial: tuple[int, ...]) -> Tensor:
    """Return which pixel each output reads, int32, counted over the whole image: the output's axes, the kernel's."""
    dims = len(spatial)
    # One number for each row, and for each column: adding what an engine knows, and the exporter does not, keeps their
    # sums, which are many, out of the file. Engines compute them as they load it.
    nothing = symbolic("ConstantOfShape", (torch.ones(1, dtype=torch.int64),), dtype=torch.float32, shape=(1,))
    pixels = nothing.to(torch.int32)
    for axis, (n, k, s, d) in enumerate(zip(spatial, layer.kernel_size, layer.stride, layer.dilation, strict=True)):
        starts = torch.arange(0, n - (k - 1) * d, s, dtype=torch.int32)
        places = starts.unsqueeze(1) + torch.arange(0, k * d, d, dtype=torch.int32)
        shape = [1] * (2 * dims)
        shape[axis], shape[dims + axis] = places.shape
        pixels = pixels * n + places.reshape(shape)
    return pixels


def unfolds(layer: QuantizedLayer) -> bool:
    """Return whether a layer is better traced as :class:`TracedUnfolded`."""
    conv, fmt = layer, layer.input_format
    if not isinstance(conv, _QuantizedConv) or fmt is None or fmt.dynamic or conv.feeds_one_layer:
        return False
    own: Any = conv
    plain = type(conv)._conv_forward is conv.float_class._conv_forward  # type: ignore[attr-defined]
    return bool(plain and own.groups == 1 and (own.in_channels >= _LEAST_CHANNELS or math.prod(own.kernel_size) == 1))

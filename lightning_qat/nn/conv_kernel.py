"""A converted convolution's integer arithmetic: packed weight, the grid of its input, and where it is right."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_qat.nn.execution import static_input, weight_values
from lightning_qat.nn.region import RegionTensor
from lightning_qat.ops.integer_conv import (
    CodeGrid,
    ConvGeometry,
    convolve_codes,
    integer_conv,
    is_channels_last,
    pack_conv,
)
from lightning_qat.ops.integer_linear import quantize_unsigned

#: Shapes that a layer remembers whether it takes.
_MOST_SHAPES = 64


def conv_geometry(layer: Any, padding: tuple[int, ...] = ()) -> ConvGeometry:
    """Return the geometry of a convolution layer, with another padding."""
    return ConvGeometry(tuple(layer.kernel_size), tuple(layer.stride), padding, tuple(layer.dilation), layer.groups)


def _padding_before_and_after(layer: Any) -> tuple[int, ...]:
    if layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
        return tuple(p for p in reversed(layer.padding) for _ in range(2))  # as it is now, changed or not
    return tuple(layer._reversed_padding_repeated_twice)


class ConvKernel:
    """Computes what a converted convolution does, as it was when this was built.

    Args:
        layer: a converted convolution that computes with integers.
    """

    def __init__(self, layer: Any) -> None:
        self.dims = len(layer.kernel_size)
        self.in_channels, self.out_channels = int(layer.in_channels), int(layer.out_channels)
        # Last dimension first, before and after. What the kernel cannot pad is padded before it, in float: the
        # codes of copied values, and of 0.0, are the same either way.
        self.pads = _padding_before_and_after(layer)
        self.simple = layer.padding_mode == "zeros" and self.pads[::2] == self.pads[1::2]
        self.pad_mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        self.geometry = conv_geometry(layer, self.pads[::2][::-1] if self.simple else (0,) * self.dims)
        self.scale, value, codes = static_input(layer)
        self.grid = CodeGrid(value, codes)
        self.weight = pack_conv(weight_values(layer), layer.weight_scale, self.geometry, value, codes)
        #: A bias, what tells whether it was changed, and a copy of it.
        self._bias: tuple[Tensor, tuple[int, int], Tensor] | None = None
        self._sizes: dict[tuple[int, ...], tuple[int, ...] | None] = {}

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """Return the shape of the output, or None where the kernel does not take an input of ``shape``.

        What is wrong with such a one, the reference says.
        """
        size = self._sizes.get(shape, ())  # no shape: not known
        if size == ():
            if len(self._sizes) >= _MOST_SHAPES:
                self._sizes.clear()
            size = self._sizes[shape] = self._output_shape(shape)
        return size

    def _output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        if len(shape) not in (self.dims + 1, self.dims + 2) or shape[-self.dims - 1] != self.in_channels:
            return None
        before, after = self.pads[::2][::-1], self.pads[1::2][::-1]
        size = [n + p + q for n, p, q in zip(shape[-self.dims :], before, after, strict=True)]
        g = self.geometry
        reach = [(k - 1) * d + 1 for k, d in zip(g.kernel, g.dilation, strict=True)]
        if any(n < r for n, r in zip(size, reach, strict=True)) or not g.is_exact_for(size):
            return None
        steps = ((n - r) // s + 1 for n, r, s in zip(size, reach, g.stride, strict=True))
        return (*shape[: -self.dims - 1], self.out_channels, *steps)

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return the output of ``x`` in its dtype and layout."""
        batch = x if x.dim() == self.dims + 2 else x.unsqueeze(0)
        if not self.simple:
            batch = F.pad(batch, self.pads, mode=self.pad_mode)
        result = integer_conv(batch, self.scale, self.grid.codes, self.weight, bias, self.grid.scale, self.geometry)
        return result if x.dim() == self.dims + 2 else result.squeeze(0)

    def answers_region(self, x: Tensor) -> bool:
        """Return whether the output of ``x`` can wait for its reader: a batch of float32 images."""
        if self.dims != 2 or not self.simple:
            return False
        return len(x.seen_shape) == 4 if type(x) is RegionTensor else x.dim() == 4 and x.dtype == torch.float32

    def codes_of(self, x: Tensor) -> Tensor:
        """Return the uint8 codes of an input, straight from the convolution before where it can be.

        Nobody changes them: other readers of the same grid may get the same tensor.
        """
        if type(x) is not RegionTensor:
            return quantize_unsigned(x, self.scale, self.grid.codes)
        codes = x.codes_on(self.grid)
        if codes is None:
            codes = quantize_unsigned(x.floats(), self.scale, self.grid.codes)
            x.keep_codes(self.grid, codes)
        return codes

    def pending(self, x: Tensor, bias: Tensor | None, *, one_reader: bool) -> RegionTensor:
        """Return the output of ``x``, a batch of float32 images, to be computed when it is read."""
        layout = x.seen_channels_last if type(x) is RegionTensor else is_channels_last(x)
        shape: Any = self.output_shape(x.seen_shape if type(x) is RegionTensor else tuple(x.shape))
        held = None if bias is None else self._held(bias)
        codes = self.codes_of(x)
        return RegionTensor.of_convolution(self, codes, held, shape, one_reader=one_reader, channels_last=layout)

    def _held(self, bias: Tensor) -> Tensor:
        """Return a copy of the bias as it is now, which a later change does not reach."""
        state = (-1 if bias.is_inference() else bias._version, bias.data_ptr())
        if self._bias is None or self._bias[0] is not bias or self._bias[1] != state or state[0] < 0:
            self._bias = (bias, state, bias.detach().to(torch.float32, copy=True))
        return self._bias[2]

    def run(self, codes: Tensor, bias: Tensor | None, output: CodeGrid | None, *, relu: bool) -> Tensor:
        """Return the convolution of codes: on the grid ``output``, or float32; in channels_last."""
        return convolve_codes(codes, self.grid, self.weight, bias, self.geometry, output, relu=relu)

"""Convolutions of integer codes on the CPU: oneDNN's uint8 x int8 kernel behind PyTorch's own ops.

The arithmetic is that of :mod:`lightning_qat.ops.integer_linear`. Padding stands for 0.0, the input's
zero point.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_qat.ops.integer_linear import CodeRange, PackedWeight, _onednn, quantize_unsigned


@dataclass(frozen=True)
class CodeGrid:
    """What uint8 codes of a tensor stand for: ``(code - codes.zero_point) * scale``."""

    scale: float
    codes: CodeRange


@dataclass(frozen=True)
class ConvGeometry:
    """Kernel size, stride, zero padding and dilation for each spatial dimension, and the number of groups."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def has_exact_kernel(self, channels: Sequence[int]) -> bool:
        """Return whether oneDNN is right for ``[out_channels, in_channels / groups]``: ungrouped or depthwise.

        Of other grouped convolutions it gets all groups but the first wrong in some shapes where the input's zero
        point is not 0 (seen with 45 and with more than 64 output channels for each group).
        """
        return self.groups == 1 or (channels[0] == self.groups and channels[1] == 1)

    def is_exact_for(self, padded_size: Sequence[int]) -> bool:
        """Return whether oneDNN is right for an input of this spatial size, padding included.

        Of an output one column wide and several rows high it gets all rows but the first wrong in some geometries
        (seen with a horizontal stride and one input channel for each group).
        """
        facts = zip(padded_size, self.kernel, self.stride, self.dilation, strict=True)
        size = [(n - (k - 1) * d - 1) // s + 1 for n, k, s, d in facts]
        return len(size) == 1 or size[1] > 1 or size[0] == 1

    def kernel_may_pad(self, size: Sequence[int]) -> bool:
        """Return whether oneDNN may pad an input of spatial ``size``.

        Of outputs that no element of the input reaches, as with padding beyond the kernel or gaps of its dilation,
        oneDNN gives wrong sums and writes out of bounds (seen with ``kernel=1, stride=3, padding=2`` of one element,
        and ``kernel=3, padding=3``). There are none where the padding is up to half the kernel's reach and the input
        at least as long as that.
        """
        for padding, reach, n in zip(self.padding, self.reach, size, strict=True):
            if padding and not 2 * padding < reach <= n:
                return False
        return True

    @cached_property
    def reach(self) -> tuple[int, ...]:
        """Return the elements from the first to the last that a kernel reads, for each dimension."""
        return tuple((k - 1) * d + 1 for k, d in zip(self.kernel, self.dilation, strict=True))

    @cached_property
    def arguments(self) -> tuple[list[int], list[int], list[int], int]:
        """Return stride, padding, dilation and groups as the kernel takes them."""
        return list(self.stride), list(self.padding), list(self.dilation), self.groups


def pack_conv(
    codes: Tensor, scale: Tensor, geometry: ConvGeometry, scale_value: float, input_codes: CodeRange
) -> PackedWeight:
    """Return a weight as the kernel reads it.

    Args:
        codes: int8, ``[out_channels, in_channels / groups, *kernel]``.
        scale: one for the tensor or ``[out_channels]``; may be negative.
        geometry: of the convolution.
        scale_value: of the input.
        input_codes: of the input.
    """
    flat = scale.detach().reshape(-1).to(torch.float32, copy=True)
    g = geometry
    packed = _onednn().qconv_prepack(
        codes.contiguous(), flat, scale_value, input_codes.zero_point,
        list(g.stride), list(g.padding), list(g.dilation), g.groups, None,
    )  # fmt: skip
    return PackedWeight(packed, flat, torch.zeros_like(flat, dtype=torch.int32))


def integer_conv(
    x: Tensor,
    scale: Tensor,
    codes: CodeRange,
    weight: PackedWeight,
    bias: Tensor | None,
    scale_value: float,
    geometry: ConvGeometry,
) -> Tensor:
    """Return the convolution of ``x``, quantized per tensor, in its dtype; channels_last stays channels_last.

    Call it where ``geometry.has_exact_kernel`` and ``geometry.is_exact_for`` the padded size only.

    Args:
        x: ``[N, C, *spatial]`` with one or two spatial dimensions.
        scale: of ``x``, float32, one element without dimensions.
        codes: of ``x``.
        weight: of :func:`pack_conv`, with the same geometry.
        bias: ``[out_channels]`` or None.
        scale_value: ``scale`` as a number.
        geometry: of the convolution.
    """
    bias = None if bias is None else bias.to(torch.float32)
    grid = CodeGrid(scale_value, codes)
    result = convolve_codes(quantize_unsigned(x, scale, codes), grid, weight, bias, geometry)
    # The kernel computes in channels_last; whoever flattens with view() relies on the input's layout.
    result = result.to(x.dtype)
    return result if is_channels_last(x) else result.contiguous()


def is_channels_last(x: Tensor) -> bool:
    """Return whether an operation that keeps the layout of ``x`` makes a result in channels_last."""
    if x.dim() != 4 or not x.is_contiguous(memory_format=torch.channels_last):
        return False
    # Of the layouts that are both, one channel and one pixel: what the strides say, else plain.
    return x.stride(1) == 1 and (x.shape[2] * x.shape[3] > 1 or not x.is_contiguous())


def convolve_codes(
    codes: Tensor,
    grid: CodeGrid,
    weight: PackedWeight,
    bias: Tensor | None,
    geometry: ConvGeometry,
    output: CodeGrid | None = None,
    *,
    relu: bool = False,
) -> Tensor:
    """Return the convolution of codes, in channels_last: float32, or uint8 codes on the grid ``output``.

    The codes of the result are those of the float result, but for values within a rounding error of the middle
    between two codes. Call it where ``geometry`` is exact only, see :class:`ConvGeometry`.

    Args:
        codes: uint8, ``[N, C, *spatial]`` with one or two spatial dimensions.
        grid: of ``codes``.
        weight: of :func:`pack_conv`, with the same geometry.
        bias: float32, ``[out_channels]``, or None.
        geometry: of the convolution.
        output: of the result.
        relu: set what is below 0 to 0.
    """
    g, bias = geometry, None if bias is None else bias.contiguous()  # the kernel does not ask how it lies
    if not g.kernel_may_pad(codes.shape[2:]):
        codes = F.pad(codes, [p for p in reversed(g.padding) for _ in range(2)], value=grid.codes.zero_point)
        g = replace(g, padding=(0,) * len(g.padding))
    scale, zero_point, dtype = 1.0, 0, torch.float32
    if output is not None:
        scale, zero_point, dtype = output.scale, output.codes.zero_point, torch.uint8
    result: Tensor = _onednn().qconv_pointwise(
        codes, grid.scale, grid.codes.zero_point, weight.codes, weight.scale, weight.zero_point, bias,
        *g.arguments, scale, zero_point, dtype, "relu" if relu else "none", [], "",
    )  # fmt: skip
    if output is not None and ((output.codes.low > 0 and not relu) or output.codes.high < 255):
        result.clamp_(output.codes.low, output.codes.high)
    return result


@lru_cache(maxsize=1)
def conv_is_exact() -> bool:
    """Return whether this machine's kernels, grouped and not, sum codes exactly; found once, by tiny convolutions."""
    x = torch.full((1, 20, 5, 5), 255, dtype=torch.uint8, device="cpu")
    x[:, 1::3] = 7
    w = torch.full((20, 20, 3, 3), 127, dtype=torch.int8, device="cpu")
    w[1, ::2] = -128
    codes = CodeRange(3, 0, 255)
    for groups, kernel in ((1, w), (20, w[:, :1])):
        geometry = ConvGeometry((3, 3), (1, 1), (1, 1), (1, 1), groups)
        try:
            packed = pack_conv(kernel, torch.ones(1, dtype=torch.float32, device="cpu"), geometry, 1.0, codes)
            result = convolve_codes(x, CodeGrid(1.0, codes), packed, None, geometry)
            # Steps of a power of two larger than the sums: what is rounded is exact.
            rounded = convolve_codes(x, CodeGrid(1.0, codes), packed, None, geometry, CodeGrid(2.0**16, codes))
        except (AttributeError, RuntimeError):  # a build of PyTorch without oneDNN or without this op
            return False
        expected = F.conv2d(x.double() - 3, kernel.double(), padding=1, groups=groups)
        if not torch.equal(result.double(), expected):
            return False
        if not torch.equal(rounded, (torch.round(expected / 2**16) + 3).clamp(0, 255).to(torch.uint8)):
            return False
    return True

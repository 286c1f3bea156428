"""The gradients of what a learned scale is made of: of its exponent, and of the zero point as a share of the grid.

See :mod:`lightning_qat.quantizers.learned_scale`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_qat.ops.affine_cpu import takes_pieces
from lightning_qat.ops.straight_through import full_float32
from lightning_qat.quantizers.exponents import single

#: The bit patterns of all exponents.
_EXPONENT_BITS = 0x7F800000


def slope_of(scale: Tensor) -> Tensor:
    """Return what a scale grows by where its exponent grows by 1: the power of two below it."""
    return (scale.view(torch.int32) & _EXPONENT_BITS).view(torch.float32)


def exponent_gradient(grad: Tensor, scale: Tensor, factor: float) -> Tensor:
    """Return the exponent's gradient, of the scale's."""
    if scale.numel() == 1 and takes_pieces(scale, grad):  # as of ``scale_of``
        slope = 2.0 ** (math.frexp(scale.item())[1] - 1)
        return full_float32(grad.shape, grad.item() * factor / slope)
    return grad.to(torch.float32) * factor / slope_of(scale)


def offset_gradient(grad: Tensor, offset: Tensor, scale: Tensor, factor: float, levels: int) -> Tensor:
    """Return the offset's gradient, of the zero point's; ``levels`` is the largest less the smallest code."""
    if scale.numel() == 1 and takes_pieces(scale, grad, offset):
        return full_float32(grad.shape, _of_one_offset(grad.item(), offset.item(), scale.item(), factor, levels))
    result = grad.to(torch.float32) * (factor / levels) / (scale * scale)
    # At the grid's ends only the way back is open.
    outward = ((offset <= 0) & (result > 0)) | ((offset >= 1) & (result < 0))
    return result.masked_fill(outward, 0.0)


def _of_one_offset(grad: float, place: float, scale: float, factor: float, levels: int) -> float:
    slope = grad * factor / levels
    ends = (place <= 0 and slope > 0) or (place >= 1 and slope < 0)
    return 0.0 if ends else slope / scale**2


def parameter_gradients(
    of_scale: Tensor, of_zero: Tensor | None, scale: Tensor, offset: Tensor | None, factor: float, levels: int
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of exponent and offset, shaped as ``scale``, from those of scale and zero point.

    ``levels`` is the largest less the smallest code; ``scale`` and ``offset`` are as they were.
    """
    exponent = exponent_gradient(of_scale.view_as(scale), scale, factor)
    if offset is None or of_zero is None:
        return exponent, None
    return exponent, offset_gradient(of_zero.view_as(scale), offset.view_as(scale), scale, factor, levels)


def gradients_of_numbers(
    of_scale: float, of_zero: float, scale: Tensor, offset: float | None, factor: float, levels: int
) -> tuple[Tensor, Tensor | None]:
    """Return :func:`parameter_gradients` of one scale, from what ``native.learned_sums_of_one`` returns."""
    value = scale.item()
    exponent = full_float32(scale.shape, single(of_scale) * factor / 2.0 ** (math.frexp(value)[1] - 1))
    if offset is None:
        return exponent, None
    return exponent, full_float32(scale.shape, _of_one_offset(single(of_zero), offset, value, factor, levels))

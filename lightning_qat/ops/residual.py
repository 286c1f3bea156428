"""The end of a residual block on the CPU: a sum of two float tensors, clamped, and its codes on the reader's grid."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_qat.native.residual import residual_add, residual_add_quantize
from lightning_qat.ops.integer_conv import CodeGrid
from lightning_qat.ops.integer_linear import quantize_unsigned


def add_clamped(left: Tensor, right: Tensor, low: float = -math.inf, high: float = math.inf, *, fresh: bool) -> Tensor:
    """Return ``left + right`` in float32, clamped; a NaN stays one.

    Args:
        left: float32.
        right: float32, of the same shape.
        low: smallest value; ReLU's is 0.
        high: largest value.
        fresh: ``left`` is nobody else's and may become the result.
    """
    if _share_layout(left, right) and low <= high:
        out = left if fresh else torch.empty_like(left)
        if residual_add(left, right, low, high, out):
            return out
    total = left.add_(right) if fresh else left + right
    if low == -math.inf and high == math.inf:
        return total
    return total.relu_() if (low, high) == (0.0, math.inf) else F.hardtanh_(total, low, high)


def add_quantized(
    left: Tensor,
    right: Tensor,
    grid: CodeGrid,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    fresh: bool,
) -> tuple[Tensor, Tensor]:
    """Return what :func:`add_clamped` does and its uint8 codes on ``grid``, those of ``quantize_unsigned``.

    Args:
        left: see there.
        right: see there.
        grid: of the codes.
        low: see there.
        high: see there.
        fresh: see there.
    """
    if _share_layout(left, right) and low <= high:
        out, codes = left if fresh else torch.empty_like(left), torch.empty_like(left, dtype=torch.uint8)
        scale, ends = grid.scale, grid.codes
        if residual_add_quantize(left, right, low, high, out, codes, scale, ends.zero_point, ends.low, ends.high):
            return out, codes
    total = add_clamped(left, right, low, high, fresh=fresh)
    return total, quantize_unsigned(total, torch.tensor(grid.scale, dtype=torch.float32, device="cpu"), grid.codes)


def _share_layout(left: Tensor, right: Tensor) -> bool:
    """Return whether both are plain memory without gaps, element for element alike."""
    for x in (left, right):
        if type(x) is not Tensor or x.dtype != torch.float32 or x.device.type != "cpu" or not x.numel() or x.is_neg():
            return False
    if left.shape != right.shape or left.stride() != right.stride():
        return False
    return left.is_contiguous() or (left.dim() == 4 and left.is_contiguous(memory_format=torch.channels_last))

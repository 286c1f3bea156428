"""Fake quantization on the way through our own layers: the same kernels, fewer steps around them.

A call of a ``custom_op`` with gradients costs about 100 microseconds of Python and dispatcher where this costs 30, and
a layer makes six of them in a training step. Everything that looks at a graph (``torch.compile``, ``torch.export``,
tracing) gets the op.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_qat.ops.fake_quantize import fake_quantize_backward_op, fake_quantize_op
from lightning_qat.ops.fake_quantize_cpu import fake_quantize_backward_cpu, fake_quantize_cpu

#: What the dispatcher would come to for a plain tensor of the device; others go through it.
_KERNELS = {"cpu": (fake_quantize_cpu, fake_quantize_backward_cpu)}
_OPS = (fake_quantize_op, fake_quantize_backward_op)

_ONLY_X = [True, False, False]


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor | None, grid: tuple[int, ...], covered: bool
    ) -> Tensor:
        ctx.grid, ctx.covered = grid, covered
        if not covered:
            ctx.save_for_backward(x, scale, zero_point)
        return _KERNELS.get(x.device.type, _OPS)[0](x, scale, zero_point, *grid)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.covered:
            x, scale, zero_point = ctx.saved_tensors
            grad = _KERNELS.get(x.device.type, _OPS)[1](grad, x, scale, zero_point, *ctx.grid, _ONLY_X)[0]
        return grad, None, None, None, None


def fake_quantize_through(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
    axis: int,
    group: int,
    *,
    covered: bool = False,
) -> Tensor:
    """Return what ``fake_quantize_op`` returns, with a gradient for ``x`` alone.

    Args:
        x: an ordinary tensor, in eager mode.
        scale: positive; gets no gradient.
        zero_point: shaped as ``scale``; gets no gradient.
        quant_min: smallest code.
        quant_max: largest code.
        axis: see :mod:`lightning_qat.ops.layout`.
        group: likewise.
        covered: the range is known to hold every element of ``x``, so the gradient passes as it is and nothing is
            kept for it.
    """
    grid = (quant_min, quant_max, axis, group)
    if torch.is_grad_enabled() and x.requires_grad:
        result: Tensor = _StraightThrough.apply(x, scale, zero_point, grid, covered)
        return result
    return _KERNELS.get(x.device.type, _OPS)[0](x, scale, zero_point, *grid)

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

from lightning_qat.ops.chunks import CHUNK
from lightning_qat.ops.fake_quantize import fake_quantize_backward_op, fake_quantize_op
from lightning_qat.ops.fake_quantize_cpu import fake_quantize_backward_cpu, fake_quantize_cpu, input_ends
from lightning_qat.ops.fake_quantize_cuda import HAS_TRITON, fake_quantize_backward_cuda, fake_quantize_cuda
from lightning_qat.ops.layout import empty_result

#: What the dispatcher would come to for a plain tensor of the device; others go through it.
_KERNELS = {"cpu": (fake_quantize_cpu, fake_quantize_backward_cpu)}
if HAS_TRITON:
    _KERNELS["cuda"] = (fake_quantize_cuda, fake_quantize_backward_cuda)
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


def fake_quantize_kernel(x: Tensor, scale: Tensor, zero_point: Tensor | None, *grid: int) -> Tensor:
    """Return what ``fake_quantize_op`` returns for an ordinary tensor in eager mode, without a gradient.

    ``grid`` is the smallest code, the largest, ``axis`` and ``group``.
    """
    return _KERNELS.get(x.device.type, _OPS)[0](x, scale, zero_point, *grid)


def input_gradient(
    grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor | None, grid: tuple[int, int, int, int]
) -> Tensor:
    """Return ``grad`` where ``x`` has a code of its own, 0 elsewhere."""
    found: Tensor = _KERNELS.get(x.device.type, _OPS)[1](grad, x, scale, zero_point, *grid, _ONLY_X)[0]
    return found


def learned_gradients(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    grid: tuple[int, int, int, int],
    needs_x: bool,
    values: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the gradients of ``x`` (it may have no elements without ``needs_x``), ``scale`` and ``zero_point``.

    ``values`` is the fake-quantized ``x`` where somebody has just made it again.
    """
    found = _by_products(grad, x, scale, zero_point, grid, values, needs_x) if x.device.type == "cpu" else None
    if found is not None:
        return found
    zero = None if zero_point is None else zero_point.to(torch.float32)
    needs = [needs_x, True, zero is not None]
    backward = _KERNELS.get(x.device.type, _OPS)[1]
    grad_x, grad_scale, grad_zero = backward(grad, x, scale, zero, *grid, needs)
    return grad_x, grad_scale, None if zero is None else grad_zero


#: Terms of long rows are summed in float32 over runs of this length, and the sums of runs in float64.
_RUN = 1024


def _by_products(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    grid: tuple[int, int, int, int],
    values: Tensor | None,
    needs_x: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """Return the gradients from sums of products, not of codes; None where these do not apply.

    With ``v`` the fake-quantized ``x`` and ``grad_x`` the gradient within the range, LSQ's sum over ``grad * codes``
    outside and ``grad * (codes - x / scale)`` inside is ``(sum(grad * v) - sum(grad_x * x)) / scale``, and LSQ+'s is
    ``-scale * (sum(grad) - sum(grad_x))``. 2048 x 1024, asymmetric, two cores: 1 ms, the kernel 21. Both sums are
    larger than their difference by the number of codes, so more than 8 bits take the kernel.
    """
    quant_min, quant_max, axis, group = grid
    if axis > 0 or quant_max - quant_min > 255 or not x.numel() or {x.dtype, grad.dtype} != {torch.float32}:
        return None
    if axis < 0 and not group and x.dim() == 4 and not x.is_contiguous():  # one scale, so any order of elements will do
        x, grad = x.permute(0, 2, 3, 1), grad.permute(0, 2, 3, 1)
        values = None if values is None else values.permute(0, 2, 3, 1)
        found = _by_products(grad, x, scale, zero_point, grid, values, needs_x) if x.is_contiguous() else None
        return None if found is None else (found[0].permute(0, 3, 1, 2) if needs_x else found[0], *found[1:])
    if not x.is_contiguous():
        return None
    grad = grad.contiguous()
    if values is None or not values.is_contiguous():
        values = None
    rows = scale.numel()
    if rows == 1 and axis < 0 and not group:
        grad_x, change, clipped = _of_one_scale(grad, x, scale, zero_point, grid, values, needs_x)
    else:
        grad_x = fake_quantize_backward_cpu(grad, x, scale, zero_point, *grid, _ONLY_X)[0]
        values = fake_quantize_cpu(x, scale, zero_point, *grid) if values is None else values
        change = _row_changes(*(t.view(rows, -1) for t in (grad, values, grad_x, x)))
        clipped = change if zero_point is None else grad.view(rows, -1).sum(1) - grad_x.view(rows, -1).sum(1)
    if not bool(change.isfinite().all()):
        return None  # infinite values, which the sums of the kernel leave out
    grad_scale = (change / scale.reshape(-1)).to(torch.float32).reshape(scale.shape)
    if zero_point is None:
        return grad_x, grad_scale, None
    return grad_x, grad_scale, -scale * clipped.to(torch.float32).reshape(scale.shape)


def _of_one_scale(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    grid: tuple[int, int, int, int],
    values: Tensor | None,
    needs_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``grad_x`` and, ``[1]`` and float64, ``sum(grad * v) - sum(grad_x * x)`` and ``sum(grad) - sum(grad_x)``.

    In pieces that stay in a core's cache: memory is read once, and written once where there is a ``grad_x``, where
    whole tensors took ten reads and three writes, of which two were of products in fresh memory.
    """
    low, high = input_ends(scale, zero_point, grid[0], grid[1])
    flat = [t.view(-1) for t in (grad, x)]
    made = None if values is None else values.view(-1)
    grad_x = empty_result(x, 0) if needs_x else x.new_empty(0)
    kept = grad_x.view(-1) if needs_x else x.new_empty(min(CHUNK, x.numel()))
    sums: list[Tensor] = []
    for start in range(0, x.numel(), CHUNK):
        g, part = (t[start : start + CHUNK] for t in flat)
        inside = kept[start : start + CHUNK] if needs_x else kept[: g.numel()]
        torch.ops.aten.hardtanh_backward.grad_input(g, part, low, high, grad_input=inside)
        v = fake_quantize_cpu(part, scale, zero_point, *grid) if made is None else made[start : start + CHUNK]
        sums += [torch.dot(g, v), torch.dot(inside, part)]
        if zero_point is not None:
            sums += [g.sum(), inside.sum()]
    columns = 2 if zero_point is None else 4
    total = torch.stack(sums).view(-1, columns).sum(0, dtype=torch.float64)
    change = total[0] - total[1]
    return grad_x, change.view(1), (change if zero_point is None else total[2] - total[3]).view(1)


def _row_changes(grad: Tensor, values: Tensor, grad_x: Tensor, x: Tensor) -> Tensor:
    """Return ``sum(grad * values) - sum(grad_x * x)`` of each row, ``[rows]``, float64."""
    rows, length = x.shape
    sums = x.new_empty(rows, dtype=torch.float64)
    step = max(CHUNK // max(length, 1), 1)
    scratch = torch.empty_like(x[:step])  # stays in the cache
    for start in range(0, rows, step):
        part = slice(start, start + step)
        terms = torch.mul(grad[part], values[part], out=scratch[: min(step, rows - start)])
        terms.addcmul_(grad_x[part], x[part], value=-1)  # small where nothing is cut off, so float32 will do
        whole = length // _RUN * _RUN if length > 2 * _RUN else 0
        sums[part] = terms[:, whole:].sum(1)
        if whole:
            sums[part] += terms[:, :whole].unflatten(1, (-1, _RUN)).sum(2).sum(1, dtype=torch.float64)
    return sums

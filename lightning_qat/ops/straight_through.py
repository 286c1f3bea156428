"""Fake quantization on the way through our own layers: the same kernels, fewer steps around them.

A call of a ``custom_op`` with gradients costs about 100 microseconds of Python and dispatcher where this costs 30, and
a layer makes six of them in a training step. Everything that looks at a graph (``torch.compile``, ``torch.export``,
tracing) gets the op.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lightning_qat.native.fake_quantize import has_kernels
from lightning_qat.ops.chunks import CHUNK
from lightning_qat.ops.fake_quantize import fake_quantize_backward_op, fake_quantize_op, inside_range, quant_range
from lightning_qat.ops.fake_quantize_cpu import fake_quantize_backward_cpu, fake_quantize_cpu, input_ends
from lightning_qat.ops.fake_quantize_cuda import HAS_TRITON, fake_quantize_backward_cuda, fake_quantize_cuda
from lightning_qat.ops.forward_mode import refuse_tangents
from lightning_qat.ops.layout import empty_result, layout_of_shapes, resolve_layout

#: What the dispatcher would come to for a plain tensor of the device; others go through it.
_KERNELS = {"cpu": (fake_quantize_cpu, fake_quantize_backward_cpu)}
if HAS_TRITON:
    _KERNELS["cuda"] = (fake_quantize_cuda, fake_quantize_backward_cuda)
_OPS = (fake_quantize_op, fake_quantize_backward_op)

_ONLY_X = [True, False, False]

_TWICE = (
    b"a layer with learned scales, and the weight's gradient of one with a quantized input, cannot be asked to "
    b"differentiate twice, as gradient penalties do: compute those in float, with apply_phase(model, "
    b"Phase(quantizing=False)) before the forward whose gradients are penalized"
)


def grid_for(
    x: Tensor, scale: Tensor, bits: int, symmetric: bool, axis: int | None, group_size: int | None
) -> tuple[int, int, int, int]:
    """Return smallest and largest code, and ``axis`` and ``group`` as the ops take them, of a layer's own tensors.

    Shapes are checked once; a scale elsewhere than ``x`` raises as :func:`resolve_layout` does.
    """
    if scale.device != x.device:
        resolve_layout(x, scale, None, axis, group_size)
    return _known_grid(x.shape, scale.shape, bits, symmetric, axis, group_size)


@lru_cache(maxsize=4096)
def _known_grid(
    shape: torch.Size,
    scale_shape: torch.Size,
    bits: int,
    symmetric: bool,
    axis: int | None,
    group_size: int | None,
) -> tuple[int, int, int, int]:
    return *quant_range(bits, symmetric), *layout_of_shapes(shape, scale_shape, axis, group_size)


def apply_plainly(function: type[torch.autograd.Function], *args: Any) -> Any:
    """Return ``function.apply(*args)`` of ordinary tensors, without what it does first for those of functorch."""
    return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Let whoever differentiates the gradients raise, at no cost where nobody does.

    ``once_differentiable`` gives constants where the incoming gradient is one, as that of a sum is: the gradients of a
    penalty would lack this layer's part, and nobody would hear of it.
    """
    return differentiable(lambda ctx, *grads: None)(backward)


def differentiable(again: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Let gradients be differentiated, as gradient penalties do, at no cost where nobody does.

    Args:
        again: the backward pass in operations that have derivatives, called instead where somebody may want them; None
            where there are none, so that asking for them raises.
    """

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        def choose(ctx: Any, *grads: Any) -> Any:
            if not torch.is_grad_enabled():
                return backward(ctx, *grads)
            found = again(ctx, *grads)
            if found is not None:
                return found
            with torch.no_grad():
                found = backward(ctx, *grads)
            return raising_if_differentiated(*found)

        return choose

    return decorate


def raising_if_differentiated(*tensors: Tensor | None) -> Any:
    """Return these values, which raise where somebody differentiates them."""
    raising: Any = torch._C._functions.DelayedError(_TWICE, len(tensors))
    return raising(*(None if t is None else t.detach().requires_grad_() for t in tensors))


def _again(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if not ctx.covered:
        x, scale, zero_point = ctx.saved_tensors
        grad = inside_range(grad, x.detach(), scale, zero_point, *ctx.grid)
    return grad, None, None, None, None


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
    @differentiable(_again)
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
        result: Tensor = apply_plainly(_StraightThrough, x, scale, zero_point, grid, covered)
        return result
    if forward_ad._current_level >= 0:  # not a call where backward passes come by
        refuse_tangents(x)
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
    many_passes = x.device.type == "cpu" and not has_kernels(x)
    found = _by_products(grad, x, scale, zero_point, grid, values, needs_x) if many_passes else None
    if found is not None:
        return found
    zero = None if zero_point is None else zero_point.to(torch.float32)
    needs = [needs_x, True, zero is not None]
    backward = _KERNELS.get(x.device.type, _OPS)[1]
    grad_x, grad_scale, grad_zero = backward(grad, x, scale, zero, *grid, needs)
    return grad_x, grad_scale, None if zero is None else grad_zero


def full_float32(shape: tuple[int, ...], value: float) -> Tensor:
    """Return ``value`` as float32 in ``shape``, on the CPU; infinite where that has no such number."""
    single = math.copysign(math.inf, value) if abs(value) > _MOST else value
    return torch.full(shape, single, dtype=torch.float32, device="cpu")


_MOST = torch.finfo(torch.float32).max

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
        if not math.isfinite(change):
            return None  # infinite values, which the sums of the kernel leave out
        step = scale.item()
        shift = None if zero_point is None else full_float32(scale.shape, -step * clipped)
        return grad_x, full_float32(scale.shape, change / step), shift
    grad_x = fake_quantize_backward_cpu(grad, x, scale, zero_point, *grid, _ONLY_X)[0]
    values = fake_quantize_cpu(x, scale, zero_point, *grid) if values is None else values
    changes = _row_changes(*(t.view(rows, -1) for t in (grad, values, grad_x, x)))
    if not math.isfinite(changes.sum().item()):
        return None
    grad_scale = changes.to(torch.float32).view(scale.shape) / scale
    if zero_point is None:
        return grad_x, grad_scale, None
    clips = grad.view(rows, -1).sum(1) - grad_x.view(rows, -1).sum(1)
    return grad_x, grad_scale, -scale * clips.view(scale.shape)


def _of_one_scale(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    grid: tuple[int, int, int, int],
    values: Tensor | None,
    needs_x: bool,
) -> tuple[Tensor, float, float]:
    """Return ``grad_x``, ``sum(grad * v) - sum(grad_x * x)`` and ``sum(grad) - sum(grad_x)``, of no use if symmetric.

    In pieces that stay in a core's cache: memory is read once, and written once where there is a ``grad_x``, where
    whole tensors took ten reads and three writes, of which two were of products in fresh memory.
    """
    low, high = input_ends(scale, zero_point, grid[0], grid[1])
    flat = [t.view(-1) for t in (grad, x)]
    made = None if values is None else values.view(-1)
    grad_x = empty_result(x, 0) if needs_x else x.new_empty(0)
    kept = grad_x.view(-1) if needs_x else x.new_empty(min(CHUNK, x.numel()))
    change = clipped = 0.0  # of sums in float32, in float64
    for start in range(0, x.numel(), CHUNK):
        g, part = (t[start : start + CHUNK] for t in flat)
        inside = kept[start : start + CHUNK] if needs_x else kept[: g.numel()]
        torch.ops.aten.hardtanh_backward.grad_input(g, part, low, high, grad_input=inside)
        v = fake_quantize_cpu(part, scale, zero_point, *grid) if made is None else made[start : start + CHUNK]
        change += torch.dot(g, v).item() - torch.dot(inside, part).item()
        if zero_point is not None:
            clipped += g.sum().item() - inside.sum().item()
    return grad_x, change, clipped


def _row_changes(grad: Tensor, values: Tensor, grad_x: Tensor, x: Tensor) -> Tensor:
    """Return ``sum(grad * values) - sum(grad_x * x)`` of each row, ``[rows]``; float64, of short rows float32."""
    rows, length = x.shape
    step = max(CHUNK // max(length, 1), 1)
    if rows <= step and length <= 2 * _RUN:
        return torch.mul(grad, values).addcmul_(grad_x, x, value=-1).sum(1)
    sums = x.new_empty(rows, dtype=torch.float64)
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

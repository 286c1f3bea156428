"""Fake quantization: quantize and dequantize in float, with the gradients that training needs.

:func:`reference_fake_quantize` and :func:`reference_fake_quantize_backward` are the definition, in
plain traceable PyTorch and for every device. Everything else here equals them bit for bit (the sums
of the scale gradient up to the order of summation).

Sources: straight-through estimator, Bengio et al. 2013; LSQ, Esser et al. 2020 (the scale's gradient);
LSQ+, Bhalgat et al. 2020 (the zero point's).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_qat.ops.layout import (
    match_layout,
    resolve_layout,
    view_parameter,
    view_runs,
)
from lightning_qat.ops.transformed import is_transformed, straight_through

#: Codes reach half a step beyond their value: what rounds to an end code is in range. The 2**-10 of a
#: step is slack: the scale of a symmetric grid below 8 bits is absmax / (2**(b-1) - 0.5), which puts the
#: largest weight exactly on this edge, and the rounding of a float division must not cut it off.
EDGE = 0.5 + 2.0**-10


def quant_range(bits: int, symmetric: bool) -> tuple[int, int]:
    """Return the smallest and the largest code of an integer grid.

    Args:
        bits: 2 to 16.
        symmetric: around zero: narrow (``+-(2**(bits-1) - 1)``) from 8 bits on, the full two's complement
            range below. Otherwise ``0 .. 2**bits - 1``.

    Raises:
        ValueError: if ``bits`` is not an integer from 2 to 16.
    """
    if not isinstance(bits, int) or isinstance(bits, bool) or not 2 <= bits <= 16:
        raise ValueError(f"bits={bits!r} is not allowed; use 2 to 16")
    if not symmetric:
        return 0, 2**bits - 1
    half = 2 ** (bits - 1)
    return (-(half - 1) if bits >= 8 else -half), half - 1


def absmax_divisor(bits: int) -> float:
    """Return what the largest magnitude of a symmetric grid is divided by for its scale, see :data:`EDGE`."""
    quant_max = quant_range(bits, True)[1]
    return quant_max if bits >= 8 else quant_max + 0.5


def resolve_grid(zero_point: Tensor | None, bits: int, symmetric: bool) -> tuple[int, int]:
    """Return :func:`quant_range` after checking that a symmetric grid has no zero point.

    Raises:
        ValueError: if it has one, or ``bits`` is out of range.
    """
    if symmetric and zero_point is not None:
        raise ValueError("zero_point is given with symmetric=True, whose zero point is 0; leave it out")
    return quant_range(bits, symmetric)


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    bits: int = 8,
    symmetric: bool = True,
    axis: int | None = None,
    group_size: int | None = None,
) -> Tensor:
    """Return ``x`` rounded to an integer grid, in float and with straight-through gradients.

    ``q = clamp(round(x / scale) + round(zero_point), qmin, qmax)`` and ``(q - round(zero_point)) * scale``,
    computed in float32 for every dtype and rounding half to even. NaN stays NaN, infinities are clamped.
    The gradient of ``x`` is the incoming one within the range and 0 outside (at a NaN either); that of
    ``scale`` is LSQ's and that of a floating-point ``zero_point`` LSQ+'s, without their factor for the step
    size. Keeps nothing for the backward pass but the arguments.

    Args:
        x: floating point, any shape and strides.
        scale: the step between neighbouring codes, positive. One element; or with ``axis`` one for each
            channel, ``[C]`` or with kept dimensions; or with ``group_size`` one for each run of that many
            elements of a row (everything after dimension 0, flattened), such as ``[N, K / group_size]``; or,
            with neither, one for each token, ``x.shape[:-1] + (1,)``.
        zero_point: the code of 0.0, shaped as ``scale``, integer or floating point; None is 0.
        bits: 2 to 16.
        symmetric: see :func:`quant_range`; a symmetric grid takes no zero point.
        axis: the channel dimension, may be negative.
        group_size: elements that share a scale; must divide the row.

    Returns:
        A new tensor with the shape, dtype and strides of ``x``.

    Raises:
        TypeError: if ``scale`` or ``zero_point`` is no tensor.
        ValueError: if a dtype, shape, device or number does not fit, naming what is allowed.
        NotImplementedError: under ``torch.func``, if ``scale`` or ``zero_point`` is to have a derivative.
    """
    if not x.is_floating_point():
        raise ValueError(f"x has dtype {x.dtype}; use a floating-point dtype")
    quant_min, quant_max = resolve_grid(zero_point, bits, symmetric)
    op_axis, group = resolve_layout(x, scale, zero_point, axis, group_size)
    if not is_transformed():
        return fake_quantize_op(x, scale, zero_point, quant_min, quant_max, op_axis, group)
    grid = (quant_min, quant_max, op_axis, group)
    return straight_through(
        x,
        lambda x, scale, zero: fake_quantize_op(x, scale, zero, *grid),
        lambda grad, x, scale, zero: inside_range(grad, x, scale, zero, *grid),
        scale,
        zero_point,
    )


# --- the definition -------------------------------------------------------------------------------


def round_to_codes(values: Tensor, scale: Tensor, zero: Tensor | None, quant_min: int, quant_max: int) -> Tensor:
    """Return the codes of float32 ``values`` as float32; ``scale`` and the rounded ``zero`` broadcast."""
    codes = torch.round(values / scale)
    if zero is not None:
        codes = codes + zero
    return torch.clamp(codes, quant_min, quant_max)


def _float32_views(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, axis: int, group: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return values, step and rounded zero point in views that broadcast."""
    step = view_parameter(scale, x.dim(), axis, group)
    zero = None if zero_point is None else torch.round(view_parameter(zero_point, x.dim(), axis, group))
    return view_runs(x, group).to(torch.float32), step, zero


def reference_fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, quant_min: int, quant_max: int, axis: int, group: int
) -> Tensor:
    """Return the fake-quantized ``x``; ``axis`` and ``group`` as in :mod:`lightning_qat.ops.layout`."""
    if x.numel() == 0:
        return torch.empty_like(x)
    values, step, zero = _float32_views(x, scale, zero_point, axis, group)
    codes = round_to_codes(values, step, zero, quant_min, quant_max)
    if zero is not None:
        codes = codes - zero
    return match_layout((codes * step).to(x.dtype).reshape(x.shape), x)


def reference_fake_quantize_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
    axis: int,
    group: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of ``x`` (a NaN passes it), ``scale``, ``zero_point``; no elements if not in ``needs``."""
    if x.numel() == 0:
        return _blank_gradients(x, scale, zero_point, needs)
    grad_x, grad_scale, grad_zero = _blank_gradients(x, scale, zero_point, [False, False, False])
    grads = view_runs(grad, group)
    values, step, zero = _float32_views(x, scale, zero_point, axis, group)
    outside = _outside(values, *_edges(step, zero, quant_min, quant_max))
    if needs[0]:
        grad_x = match_layout(torch.where(outside, 0.0, grads).reshape(x.shape), x)
    if needs[1]:
        terms = _scale_terms(grads, values, step, zero, quant_min, quant_max, outside)
        grad_scale = terms.sum_to_size(step.shape).reshape(scale.shape).to(scale.dtype)
    if needs[2] and zero_point is not None:
        terms = _zero_point_terms(grads, step, outside)
        grad_zero = terms.sum_to_size(step.shape).reshape(zero_point.shape).to(zero_point.dtype)
    return grad_x, grad_scale, grad_zero


def inside_range(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
    axis: int,
    group: int,
) -> Tensor:
    """Return the gradient of ``x`` in operations that can be differentiated again by ``grad``, in whatever layout."""
    if x.numel() == 0:
        return grad
    values, step, zero = _float32_views(x, scale, zero_point, axis, group)
    outside = _outside(values, *_edges(step, zero, quant_min, quant_max))
    return torch.where(outside, 0.0, view_runs(grad, group)).reshape(x.shape)


def _edges(step: Tensor, zero: Tensor | None, quant_min: int, quant_max: int) -> tuple[Tensor, Tensor]:
    """Return the open interval of values that have a code of their own, float32 and shaped as ``step``."""
    if zero is None:
        return (quant_min - EDGE) * step, (quant_max + EDGE) * step
    return (quant_min - zero - EDGE) * step, (quant_max - zero + EDGE) * step


def _outside(values: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return (values <= low) | (values >= high)


def _scale_terms(
    grads: Tensor, values: Tensor, step: Tensor, zero: Tensor | None, quant_min: int, quant_max: int, outside: Tensor
) -> Tensor:
    """Return what each element adds to the gradient of its scale, float32 (LSQ)."""
    ratio = values / step
    codes = torch.round(ratio)
    if zero is None:
        codes = torch.clamp(codes, quant_min, quant_max)
    else:
        codes = torch.clamp(codes + zero, quant_min, quant_max) - zero
    return grads.to(torch.float32) * torch.where(outside, codes, codes - ratio)


def _zero_point_terms(grads: Tensor, step: Tensor, outside: Tensor) -> Tensor:
    """Return what each element adds to the gradient of its zero point, float32 (LSQ+)."""
    return torch.where(outside, -step * grads.to(torch.float32), 0.0)


def _blank_gradients(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients where ``x`` has no element, which are also the shapes of all others."""
    zero = scale if zero_point is None else zero_point
    return (
        torch.empty_like(x) if needs[0] else x.new_empty(0),
        scale.new_zeros(scale.shape if needs[1] else (0,)),
        zero.new_zeros(zero.shape if needs[2] else (0,)),
    )


# --- the ops --------------------------------------------------------------------------------------


@torch.library.custom_op("lightning_qat::fake_quantize", mutates_args=())
def fake_quantize_op(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, quant_min: int, quant_max: int, axis: int, group: int
) -> Tensor:
    """The unchecked op behind :func:`fake_quantize`; see :func:`reference_fake_quantize`."""
    return reference_fake_quantize(x, scale, zero_point, quant_min, quant_max, axis, group)


@torch.library.custom_op("lightning_qat::fake_quantize_backward", mutates_args=())
def fake_quantize_backward_op(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
    axis: int,
    group: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of :func:`fake_quantize_op`; see :func:`reference_fake_quantize_backward`."""
    return reference_fake_quantize_backward(grad, x, scale, zero_point, quant_min, quant_max, axis, group, needs)


@fake_quantize_op.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


@fake_quantize_backward_op.register_fake
def _(grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _blank_gradients(x, scale, zero_point, rest[-1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scale, zero_point, *ctx.grid = inputs
    ctx.save_for_backward(x, scale, zero_point)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:3])
    if torch.is_grad_enabled() and not any(needs[1:]):  # which is differentiated again
        return inside_range(grad, *ctx.saved_tensors, *ctx.grid), *(None for _ in range(6))
    gradients = fake_quantize_backward_op(grad, *ctx.saved_tensors, *ctx.grid, needs)
    return *(g if needed else None for g, needed in zip(gradients, needs, strict=True)), None, None, None, None


fake_quantize_op.register_autograd(_backward, setup_context=_setup_context)


# The kernels of the CPU and of CUDA register themselves; they need what is defined above.
from lightning_qat.ops import fake_quantize_cpu as _cpu  # noqa: E402, F401
from lightning_qat.ops import fake_quantize_cuda as _cuda  # noqa: E402, F401

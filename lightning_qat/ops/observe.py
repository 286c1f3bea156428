"""Fake quantization that also finds the extremes of what it reads: one pass over memory instead of two.

For ranges that hold from the next batch on, as those of training do: the grid of this pass is known before it begins.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lightning_qat.native import fake_quantize as native
from lightning_qat.ops.affine_cpu import takes_pieces
from lightning_qat.ops.fake_quantize import (
    absmax_divisor,
    fake_quantize_op,
    inside_range,
    quant_range,
    reference_fake_quantize,
)
from lightning_qat.ops.fake_quantize_cpu import as_read, fake_quantize_cpu
from lightning_qat.ops.fake_quantize_cuda import HAS_TRITON
from lightning_qat.ops.forward_mode import refuse_tangents
from lightning_qat.ops.layout import dense_layout, empty_result
from lightning_qat.ops.straight_through import apply_plainly, differentiable, input_gradient

#: Where one pass takes less than two, or as much: on a CPU without native kernels it is two.
ONE_PASS_DEVICES = frozenset({"cuda", "cpu"})

#: As tensors where reading them would wait for a device.
Bound = Tensor | float


@torch.library.custom_op("lightning_qat::observe_fake_quantize", mutates_args=())
def observe_fake_quantize_op(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, quant_min: int, quant_max: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``x`` fake-quantized per tensor, its minimum and its maximum, float32 without dimensions.

    Both are NaN where ``x`` holds one, as those of ``torch.aminmax``. ``x`` is not empty.
    """
    result = fake_quantize_op(x, scale, zero_point, quant_min, quant_max, -1, 0)
    low, high = torch.aminmax(x)
    return result, low.to(torch.float32, copy=True), high.to(torch.float32, copy=True)


@observe_fake_quantize_op.register_fake
def _(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, quant_min: int, quant_max: int
) -> tuple[Tensor, Tensor, Tensor]:
    low, high = (x.new_empty((), dtype=torch.float32) for _ in range(2))
    return torch.empty_like(x), low, high


def observe_fake_quantize_cuda(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, quant_min: int, quant_max: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition in one launch and the extremes of a few thousand numbers; float64 takes the definition itself."""
    from lightning_qat.kernels.fake_quantize import DTYPES
    from lightning_qat.kernels.observe import observe_triton

    if x.dtype not in DTYPES:
        result = reference_fake_quantize(x, scale, zero_point, quant_min, quant_max, -1, 0)
        low, high = torch.aminmax(x)
        return result, low.float(), high.float()
    result, low, high = observe_triton(x, scale, zero_point, quant_min, quant_max, -1, 0)
    return result, low.reshape(()), high.reshape(())


def observe_fake_quantize_cpu(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, quant_min: int, quant_max: int
) -> tuple[Tensor, float, float]:
    """The definition in one pass where this machine compiles C++; the extremes are numbers, which cost less."""
    if dense_layout(x, -1, 0) is not None and native.has_kernels(x):
        result = empty_result(x, 0)
        bounds = native.observe(x, result, *as_read(scale, zero_point), quant_min, quant_max)
        if bounds is not None:
            return result, *bounds
    low, high = torch.aminmax(x)
    return fake_quantize_cpu(x, scale, zero_point, quant_min, quant_max, -1, 0), float(low), float(high)


def row_extremes(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest element of each row, float32 ``[R]``; both NaN where a row has one.

    Args:
        rows: ``[R, n]``, not empty.
    """
    low: Tensor
    high: Tensor
    if rows.shape[0] == 1:
        low, high = torch.aminmax(rows)
        return low.float().reshape(1), high.float().reshape(1)
    if rows.is_cuda:
        low, high = torch.aminmax(rows, dim=1)  # one launch, one pass
        return low.float(), high.float()
    found = native.row_extremes(rows) if rows.is_contiguous() and takes_pieces(rows.detach()) else None
    # 4096 x 4096: 3 ms, the largest magnitude by vector_norm or aminmax along a dimension 20 to 25.
    return (rows.amin(1).float(), rows.amax(1).float()) if found is None else found


def fake_quantize_by_absmax(
    x: Tensor, bits: int, axis: int | None, group_size: int | None
) -> tuple[Tensor, Tensor] | None:
    """Return ``x`` symmetrically fake-quantized with the scales of its own magnitudes, row by row, and the scales.

    Args:
        x: contiguous, not empty, on the CPU.
        bits: 2 to 16.
        axis: the channel dimension, or None.
        group_size: elements of a group, or None.

    Returns:
        The values, and float32 scales ``[C]`` or ``[N, groups of a row]``; None where there is no kernel, or one scale.
    """
    if group_size is not None:
        rows, shape = x.view(-1, group_size), [x.shape[0], -1]
    elif axis == 0:
        rows, shape = x.view(x.shape[0], -1), [-1]
    else:
        return None
    result, (quant_min, quant_max) = empty_result(x, 0), quant_range(bits, True)
    scale = native.quantize_by_absmax(rows, result, absmax_divisor(bits), quant_min, quant_max)
    return None if scale is None else (result, scale.view(shape))


#: What the dispatcher would come to for a plain tensor of the device, see ``straight_through``.
_KERNELS: dict[str, Any] = {"cpu": observe_fake_quantize_cpu}
if HAS_TRITON:
    observe_fake_quantize_op.register_kernel("cuda")(observe_fake_quantize_cuda)
    _KERNELS["cuda"] = observe_fake_quantize_cuda


def _again(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    (x, scale, zero_point), (quant_min, quant_max) = ctx.saved_tensors, ctx.grid
    return inside_range(grad, x.detach(), scale, zero_point, quant_min, quant_max, -1, 0), None, None, None


class _Observed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor | None, grid: tuple[int, int]
    ) -> tuple[Tensor, Bound, Bound]:
        ctx.grid = grid
        ctx.save_for_backward(x, scale, zero_point)
        result, low, high = _KERNELS.get(x.device.type, observe_fake_quantize_op)(x, scale, zero_point, *grid)
        if isinstance(low, Tensor):
            ctx.mark_non_differentiable(low, high)
        return result, low, high

    @staticmethod
    @differentiable(_again)
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, zero_point = ctx.saved_tensors
        return input_gradient(grad, x, scale, zero_point, (*ctx.grid, -1, 0)), None, None, None


def observe_fake_quantize_through(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, quant_min: int, quant_max: int
) -> tuple[Tensor, Bound, Bound]:
    """Return what :func:`observe_fake_quantize_op` returns, for ``x`` a gradient; a CPU's extremes as numbers.

    Args:
        x: an ordinary tensor, in eager mode, not empty.
        scale: positive, one element; gets no gradient.
        zero_point: likewise, or None.
        quant_min: smallest code.
        quant_max: largest code.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        observed: tuple[Tensor, Bound, Bound] = apply_plainly(_Observed, x, scale, zero_point, (quant_min, quant_max))
        return observed
    if forward_ad._current_level >= 0:  # not a call where backward passes come by
        refuse_tangents(x)
    kernel = _KERNELS.get(x.device.type, observe_fake_quantize_op)
    return kernel(x, scale, zero_point, quant_min, quant_max)

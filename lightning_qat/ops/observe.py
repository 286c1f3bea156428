"""Fake quantization that also finds the extremes of what it reads: one pass over memory instead of two.

For ranges that hold from the next batch on, as those of training do: the grid of this pass is known before it begins.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_qat.ops.fake_quantize import fake_quantize_op, reference_fake_quantize
from lightning_qat.ops.fake_quantize_cuda import HAS_TRITON
from lightning_qat.ops.straight_through import apply_plainly, differentiable_once, input_gradient

#: Where one pass takes less than two; a CPU's kernels go over memory several times anyway.
ONE_PASS_DEVICES = frozenset({"cuda"})


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


#: What the dispatcher would come to for a plain tensor of the device, see ``straight_through``.
_KERNELS: dict[str, Any] = {}
if HAS_TRITON:
    observe_fake_quantize_op.register_kernel("cuda")(observe_fake_quantize_cuda)
    _KERNELS["cuda"] = observe_fake_quantize_cuda


class _Observed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor | None, grid: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.grid = grid
        ctx.save_for_backward(x, scale, zero_point)
        result, low, high = _KERNELS.get(x.device.type, observe_fake_quantize_op)(x, scale, zero_point, *grid)
        ctx.mark_non_differentiable(low, high)
        return result, low, high

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, zero_point = ctx.saved_tensors
        return input_gradient(grad, x, scale, zero_point, (*ctx.grid, -1, 0)), None, None, None


def observe_fake_quantize_through(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, quant_min: int, quant_max: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what :func:`observe_fake_quantize_op` returns, with a gradient for ``x`` alone.

    Args:
        x: an ordinary tensor, in eager mode, not empty.
        scale: positive, one element; gets no gradient.
        zero_point: likewise, or None.
        quant_min: smallest code.
        quant_max: largest code.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        observed: tuple[Tensor, Tensor, Tensor] = apply_plainly(
            _Observed, x, scale, zero_point, (quant_min, quant_max)
        )
        return observed
    kernel = _KERNELS.get(x.device.type, observe_fake_quantize_op)
    return kernel(x, scale, zero_point, quant_min, quant_max)

"""PACT: the value at which an activation is clipped is learned, and with it the scale.

Choi et al. 2018, arXiv:1805.06085: ``y = clip(x, 0, alpha)`` on a grid of ``alpha / (2**b - 1)``. Only what is clipped
moves ``alpha``, by its gradient; a decay, the paper's L2 regularization, pulls it back, so that it settles where both
are equal. LSQ takes the rounding error inside of the range into account as well.

``alpha`` is the scale times the codes of the grid, so it is learned as the exponent of
:mod:`lightning_qat.quantizers.learned_scale`: positive whatever an optimizer does, and a step of gradient descent moves
``alpha`` by ``lr * dL/dalpha`` to first order, as the paper's does. Where calibration saw negative values the range has
a lower end too, the zero point stands still and both ends move with ``alpha``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_qat.ops.fake_quantize import EDGE, quant_range
from lightning_qat.ops.straight_through import (
    apply_plainly,
    differentiable_once,
    fake_quantize_kernel,
    input_gradient,
)
from lightning_qat.quantizers.learned_scale import LearnedScale
from lightning_qat.quantizers.scale_gradients import exponent_gradient, slope_of
from lightning_qat.schemes import Scheme, TensorFormat


class LearnedClipping(LearnedScale):
    """The clipping value of one activation, and the zero point that it does not move.

    Args:
        shape: of the scale, ``()``.
        symmetric: the zero point is 0.
        name: of the layer and what of it is quantized, for messages.
        decay: of the clipping value (the paper's lambda), as an optimizer's weight decay.
    """

    def __init__(self, shape: tuple[int, ...], *, symmetric: bool, name: str, decay: float) -> None:
        super().__init__(shape, symmetric=symmetric, name=name)
        self.decay = decay
        if self.offset is not None:  # kept, but not learned
            offset = self.offset.detach()
            del self._parameters["offset"]
            self.register_buffer("offset", offset)

    def own_factor(self, fmt: TensorFormat) -> float:
        """Return what lets a step of the exponent move ``alpha`` by its own gradient."""
        low, high = quant_range(fmt.bits, fmt.symmetric)
        return 1.0 / (high - low) ** 2

    def fake_quantized(self, x: Tensor, factor: float, scheme: Scheme, fmt: TensorFormat) -> Tensor:
        zero = self.zero_point(fmt.bits)
        scale = self.with_gradient(self.own_factor(fmt), fmt.bits)[0]
        still = scale.detach()
        values = scheme.fake_quantize(x, still, zero, fmt)
        seen = x.detach().to(torch.float32)
        low, high = _ends(still, zero, fmt)
        codes = torch.where((seen <= low) | (seen >= high), values.detach().to(torch.float32) / still, 0.0)
        # What is added is 0; its gradient is that of the clipped values.
        return values + (codes * (scale - still)).to(values.dtype)

    def with_gradient(self, factor: float, bits: int) -> tuple[Tensor, Tensor | None]:
        scale, _ = super().with_gradient(factor, bits)
        return scale, None if self.offset is None else self.zero_point(bits)

    def applied(
        self, x: Tensor, scale: Tensor, zero_point: Tensor, fmt: TensorFormat, factor: float, made: list[Tensor]
    ) -> Tensor:
        zero = None if self.offset is None else zero_point
        grid = (*quant_range(fmt.bits, fmt.symmetric), -1, 0)
        values: Tensor = apply_plainly(_Clipped, x, self.exponent, scale, zero, grid, self.own_factor(fmt), made)
        return values

    @torch.no_grad()
    def add_decay(self) -> None:
        """Add what the decay of ``alpha`` is as a gradient of the exponent, to one that is there."""
        if self.exponent.grad is not None and self.decay:
            scale = self.scale().view_as(self.exponent)
            self.exponent.grad += self.decay * scale / slope_of(scale)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, clipping, decay={self.decay}"


def _ends(scale: Tensor, zero_point: Tensor, fmt: TensorFormat) -> tuple[Tensor, Tensor]:
    """Return between which values there is no clipping."""
    low, high = quant_range(fmt.bits, fmt.symmetric)
    zero = zero_point.to(torch.float32)
    return (low - zero - EDGE) * scale, (high - zero + EDGE) * scale


class _Clipped(torch.autograd.Function):
    """Fake quantization in which the clipped values alone have a gradient for the scale."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        exponent: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        grid: tuple[int, int, int, int],
        factor: float,
        made: list[Tensor],
    ) -> Tensor:
        ctx.save_for_backward(x, scale, zero_point)
        ctx.grid, ctx.factor, ctx.shape, ctx.made = grid, factor, exponent.shape, made
        return fake_quantize_kernel(x, scale, zero_point, *grid)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, zero_point = ctx.saved_tensors
        values = ctx.made.pop() if ctx.made else fake_quantize_kernel(x, scale, zero_point, *ctx.grid)
        inside = input_gradient(grad, x, scale, zero_point, ctx.grid)
        # Where the gradient passes, both are the same bits and nothing is left.
        clipped = torch.where(inside == grad, 0.0, grad.to(torch.float32)) * values.to(torch.float32)
        flat = scale.view(ctx.shape)
        exponent = exponent_gradient(clipped.sum() / flat, flat, ctx.factor)
        return inside if ctx.needs_input_grad[0] else None, exponent, None, None, None, None, None


def add_clipping_decay(model: nn.Module) -> None:
    """Add the decay of learned clipping values to their gradients, in a training loop of your own.

    Call it before each ``optimizer.step()``, after the last ``backward()``; a Trainer's callbacks do it by themselves.
    """
    for module in model.modules():
        if isinstance(module, LearnedClipping):
            module.add_decay()

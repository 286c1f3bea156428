"""Straight-through gradients under ``torch.func`` and in forward mode, where the ops' own way does not reach.

``torch.library`` has gradients for plain tensors alone; here they are an ``autograd.Function`` that ``grad``, ``vmap``,
``jvp`` and what is made of them (``jacrev``, ``jacfwd``, ``hessian``) transform, and ``torch.autograd.forward_ad``
differentiates. What is computed is the op, so the values are its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def is_transformed() -> bool:
    """Return whether a transform of ``torch.func`` or a level of forward-mode differentiation is under way."""
    if forward_ad._current_level >= 0:
        return True
    return not torch.compiler.is_compiling() and torch._C._functorch.maybe_current_level() is not None


_NO_SCALES = (
    "scales of fake quantization have no derivative under torch.func and in forward mode; detach them, or let learned "
    "ones stand still with apply_phase(model, Phase(observing=False, frozen=True)), or use backward() or "
    "torch.autograd.grad"
)


def refuse_learned_scales() -> None:
    """Raise :class:`NotImplementedError`: there is a derivative by ``x`` alone."""
    raise NotImplementedError(_NO_SCALES)


class _StraightThrough(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, value_of: Any, inside_of: Any, *parameters: Tensor | None) -> Tensor:
        values: Tensor = value_of(x, *parameters)
        return values

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.set_materialize_grads(False)  # None says what has no tangent
        x, _, ctx.inside_of, *parameters = inputs
        ctx.save_for_backward(x, *parameters)
        ctx.save_for_forward(x, *parameters)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        x, *parameters = ctx.saved_tensors
        of_x = None if grad is None else ctx.inside_of(grad, x, *parameters)
        return of_x, None, None, *(None for _ in parameters)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor | None, *others: Tensor | None) -> Tensor | None:
        if any(other is not None for other in others):
            refuse_learned_scales()
        x, *parameters = ctx.saved_tensors
        return None if tangent is None else ctx.inside_of(tangent, x, *parameters)


def straight_through(
    x: Tensor,
    value_of: Callable[..., Tensor],
    inside_of: Callable[..., Tensor],
    *parameters: Tensor | None,
) -> Tensor:
    """Return ``value_of(x, *parameters)``, whose derivative by ``x`` is 1 within the range and 0 outside.

    Args:
        x: floating point.
        value_of: the fake-quantized ``x``.
        inside_of: ``inside_of(grad, x, *parameters)`` is ``grad`` within the range and 0 outside, in PyTorch's own
            operations, which can be differentiated again.
        *parameters: scale, zero point and the like, of which there is no derivative.

    Raises:
        NotImplementedError: if one of ``parameters`` has a gradient or a tangent.
    """
    if torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in parameters):
        refuse_learned_scales()
    values: Tensor = _StraightThrough.apply(x, value_of, inside_of, *parameters)
    return values


def as_it_comes(grad: Tensor, *_: Tensor | None) -> Tensor:
    """The ``inside_of`` of formats whose range holds every element."""
    return grad

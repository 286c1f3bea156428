"""Scales and zero points that are learned by gradient.

LSQ, Esser et al. 2020, arXiv:1902.08153, and LSQ+, Bhalgat et al. 2020, arXiv:2004.09576.

What an optimizer moves is no scale but its exponent ``p``, a float read as ``2**floor(p) * (1 + p - floor(p))``: the
logarithm to base 2, with straight lines between the powers of two. (Its 23rd power of two is the bit pattern of the
scale.) So a scale is positive whatever an optimizer does, and Adam's steps, whose size does not depend on the
gradient's, change a scale of 0.001 by the same share as one of 10 (Jain et al. 2020, arXiv:1903.08066, learn
logarithms for that). A logarithm proper would do, but ``exp`` differs by an ulp between devices and compilers,
and then the codes of a weight in training and in the converted model do. This is one exact product and integers.

The gradient of ``p`` is LSQ's of the scale over the slope ``d scale / d p``: a step of gradient descent moves the
scale by ``lr * g * dL/dscale`` to first order, as the paper's does, with ``g = 1 / sqrt(n * qmax)``. ``n`` is the
number of elements that share the scale, of one sample where there is a batch: the loss is a mean over those. The
zero point is a share of the grid in 0 .. 1, likewise: a step moves LSQ+'s ``beta = -zero_point * scale`` by
``lr * g * dL/dbeta``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch import distributed as dist

from lightning_qat.ops.affine_cpu import takes_pieces
from lightning_qat.ops.fake_quantize import quant_range
from lightning_qat.ops.straight_through import (
    apply_plainly,
    differentiable_once,
    fake_quantize_kernel,
    grid_for,
    learned_gradients,
)
from lightning_qat.ops.transformed import is_transformed, refuse_learned_scales
from lightning_qat.quantizers.exponents import (
    LEAST,
    MOST,
    exponent_of,
    position,
    scale_of,
    scale_where_right,
    zero_point_where_right,
)
from lightning_qat.quantizers.observers import Observer
from lightning_qat.quantizers.scale_gradients import exponent_gradient, offset_gradient, parameter_gradients
from lightning_qat.quantizers.state import QuantizationState
from lightning_qat.schemes import Scheme, TensorFormat, rows_of, scale_shape

#: Factors of the range tried at first, and between the neighbours of the best of them.
_COARSE, _FINE = 20, 16


class LearnedScale(QuantizationState):
    """The parameters of one quantizer's scale.

    Args:
        shape: of the scale.
        symmetric: there is no zero point to learn.
        name: of the layer and what of it is quantized, for messages.

    Attributes:
        exponent: as ``shape``, or ``[1]`` for one scale (sharding strategies take no scalars).
        offset: the zero point as a share of the grid, shaped as ``exponent``; None where ``symmetric``.
        ready: whether quantization has begun, from when on nothing but gradients moves them.
        renewed: whether they were derived anew since an optimizer stepped, which then has to forget them.
    """

    exponent: nn.Parameter
    offset: nn.Parameter | None

    def __init__(self, shape: tuple[int, ...], *, symmetric: bool, name: str) -> None:
        super().__init__()
        self.shape, self.name, self.ready, self.renewed = shape, name, False, False
        fresh = partial(torch.zeros, shape or (1,), dtype=torch.float32)  # "bf16-true" builds modules in bfloat16
        self.exponent = nn.Parameter(fresh())
        self.register_parameter("offset", None if symmetric else nn.Parameter(fresh()))

    def get_extra_state(self) -> dict[str, Any]:
        return {"ready": self.ready, "renewed": self.renewed}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.ready, self.renewed = bool(state["ready"]), bool(state.get("renewed", False))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Follow to a device, not to a dtype, as the buffers of a fixed scale."""
        before = {name: p.detach() for name, p in self._parameters.items() if p is not None}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new: Any = self._parameters[name]
            if new.dtype != old.dtype:
                new.grad = None
                new.data = old.to(new.device)
        return self

    def scale(self) -> Tensor:
        """Return the scale as it is now, without a gradient: a tensor of its own.

        Raises:
            ValueError: in eager mode on a CPU, where it is none any more; on a GPU that would wait for it.
        """
        exponent = self.exponent.detach()
        return self._plain_scale(exponent) if takes_pieces(exponent) else scale_of(exponent).view(self.shape)

    def zero_point(self, bits: int) -> Tensor:
        """Return the zero point as it is now, int32: a tensor of its own."""
        if self.offset is None:
            return torch.zeros(self.shape, dtype=torch.int32, device=self.exponent.device)
        offset = self.offset.detach()
        if takes_pieces(offset):
            return self._plain_zero_point(offset, bits)
        return torch.round(position(offset, bits)).to(torch.int32).view(self.shape)

    def parameters_now(self, bits: int) -> tuple[Tensor, Tensor]:
        """Return :meth:`scale` and :meth:`zero_point`."""
        if self.offset is None:
            return self.scale(), self.zero_point(bits)
        exponent, offset = self.exponent.detach(), self.offset.detach()
        if not takes_pieces(exponent, offset):
            return self.scale(), self.zero_point(bits)
        return self._plain_scale(exponent), self._plain_zero_point(offset, bits)

    def _plain_scale(self, exponent: Tensor) -> Tensor:
        found = scale_where_right(exponent, self.shape)
        return _raise_wrong(self) if found is None else found

    def _plain_zero_point(self, offset: Tensor, bits: int) -> Tensor:
        found = zero_point_where_right(offset, bits, self.shape)
        return _raise_wrong(self) if found is None else found

    @torch.no_grad()
    def store(self, scale: Tensor, zero_point: Tensor, bits: int) -> None:
        """Let these be the scale and zero point, to the precision of the parameters."""
        self.exponent.copy_(exponent_of(scale).view_as(self.exponent))
        if self.offset is not None:
            self.offset.copy_((zero_point.to(torch.float32) / (2**bits - 1)).view_as(self.offset))

    def with_gradient(self, factor: float, bits: int) -> tuple[Tensor, Tensor | None]:
        """Return scale and zero point, both float32, from which gradients come back times ``factor``."""
        if is_transformed():
            refuse_learned_scales()
        scale: Tensor = _Scale.apply(self.exponent, factor).view(self.shape)
        if self.offset is None:
            return scale, None
        return scale, _ZeroPoint.apply(self.offset, self.scale().view_as(self.offset), factor, bits).view(self.shape)

    def fake_quantized(self, x: Tensor, factor: float, scheme: Scheme, fmt: TensorFormat) -> Tensor:
        """Return ``x`` fake-quantized by ops that trace, with gradients times ``factor``."""
        return scheme.fake_quantize(x, *self.with_gradient(factor, fmt.bits), fmt)

    def joined(self, x: Tensor) -> Tensor:
        """Return ``x`` with a graph that holds the parameters, whose gradients are 0.

        ``DistributedDataParallel`` waits for every parameter, also where a phase does not use it.
        """
        if not (dist.is_available() and dist.is_initialized() and torch.is_grad_enabled()):
            return x
        values: Tensor = _Joined.apply(x, self.exponent, self.offset)
        return values

    def applied(
        self, x: Tensor, scale: Tensor, zero_point: Tensor, fmt: TensorFormat, factor: float, made: list[Tensor]
    ) -> Tensor:
        """Return ``x`` fake-quantized, an ordinary tensor in eager mode; ``scale`` and ``zero_point`` are as now.

        Whoever makes the values again for a backward pass leaves them in ``made``, which saves this one making them.
        """
        zero = None if self.offset is None else zero_point
        grid = grid_for(x, scale, fmt.bits, fmt.symmetric, fmt.axis, fmt.group_size)
        values: Tensor = apply_plainly(_Applied, x, self.exponent, self.offset, scale, zero, grid, factor, made)
        return values

    def wrong_values(self) -> Tensor:
        """Return a bool, still on the device: whether a scale or zero point is none any more."""
        wrong = ~((self.exponent.detach() >= LEAST) & (self.exponent.detach() <= MOST)).all()
        return wrong if self.offset is None else wrong | ~self.offset.detach().isfinite().all()

    def extra_repr(self) -> str:
        return f"{tuple(self.shape)}" + ("" if self.offset is None else ", with a zero point")


def check_scales(learned: list[LearnedScale]) -> None:
    """Raise where a learned scale is none any more. Reads from each device once.

    Raises:
        ValueError: naming the first layer whose scale would be zero, negative, infinite or NaN.
    """
    by_device: dict[torch.device, list[LearnedScale]] = {}
    for each in learned:
        by_device.setdefault(each.exponent.device, []).append(each)
    for several in by_device.values():
        wrong = torch.stack([each.wrong_values() for each in several]).tolist()
        for each, is_wrong in zip(several, wrong, strict=True):
            if is_wrong:
                _raise_wrong(each)


def _raise_wrong(learned: LearnedScale) -> NoReturn:
    exponent = learned.exponent.detach().flatten()
    ok = (exponent >= LEAST) & (exponent <= MOST)
    if bool(ok.all()):
        what = "zero point is NaN or inf"
    else:
        first = float(exponent[~ok][0])
        what = "scale is NaN" if math.isnan(first) else f"scale would be {'zero' if first < 0 else 'infinite'}"
    raise ValueError(
        f"the learned {what} for the {learned.name}; go on from a checkpoint before it broke with a lower learning "
        "rate of the scales (LearnedScales(lr=...)), or look for a loss that is NaN"
    )


def gradient_factor(x: Tensor, scales: int, fmt: TensorFormat, *, samples: bool) -> float:
    """Return LSQ's ``1 / sqrt(n * qmax)``.

    Args:
        x: what is quantized.
        scales: how many scales it has.
        fmt: of its codes.
        samples: dimension 0 counts samples, which are not counted.
    """
    shared = x.numel() / max(x.shape[0], 1) if samples and x.dim() > 1 else x.numel() / max(scales, 1)
    return 1.0 / math.sqrt(max(shared, 1.0) * quant_range(fmt.bits, fmt.symmetric)[1])


@torch.no_grad()
def least_error_parameters(x: Tensor, scheme: Scheme, fmt: TensorFormat) -> tuple[Tensor, Tensor]:
    """Return scale and zero point of the least squared error of ``x``: its range, shrunk by the best factor.

    Each scale is searched by itself, among factors of 1 down to 0.08 at first and then around the best. One of zeros
    alone gets a range to grow into, see :func:`_range_of_zeros`.
    """
    rows, shape = rows_of(x, fmt), scale_shape(x.shape, fmt)
    if not rows.numel():
        return scheme.parameters_of(x, fmt)
    low, high = rows.amin(1).float(), rows.amax(1).float()
    if fmt.symmetric:
        high = torch.maximum(high, -low)
        low = -high
    empty, growing = (low == 0) & (high == 0), _range_of_zeros(x, torch.maximum(high, -low), fmt)
    low, high = torch.where(empty, -growing, low), torch.where(empty, growing, high)

    def error_of(factor: Tensor) -> Tensor:
        scale, zero = (t.reshape(shape) for t in scheme.parameters(low * factor, high * factor, fmt))
        difference = (scheme.fake_quantize(x, scale, zero, fmt).float() - x.float()).square_()
        return rows_of(difference, fmt).sum(1, dtype=torch.float64)

    step = 0.92 / (_COARSE - 1)
    best, least = _best(torch.ones_like(low), [-i * step for i in range(_COARSE)], error_of, None)
    best, _ = _best(best, [(i - _FINE / 2) * 2 * step / _FINE for i in range(1, _FINE)], error_of, least)
    scale, zero = scheme.parameters(low * best, high * best, fmt)
    return scale.reshape(shape), zero.reshape(shape)


@torch.no_grad()
def of_observed_range(observer: Observer, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Return scale and zero point of what ``observer`` saw: of zeros alone, those of a range from -1 to 1.

    Layers that begin with zeros give such inputs, which then grow: with the scale 1 that a range of 0 otherwise gives
    they would all be rounded to 0.
    """
    scale, zero_point = observer.get_quantization_params(symmetric, bits)
    low, high = quant_range(bits, symmetric)
    empty = ((observer.min_val == 0) & (observer.max_val == 0)).view_as(scale)
    middle = torch.full_like(zero_point, 0 if symmetric else 2 ** (bits - 1))
    return torch.where(empty, 2.0 / (high - low), scale), torch.where(empty, middle, zero_point)


def _range_of_zeros(x: Tensor, ranges: Tensor, fmt: TensorFormat) -> Tensor:
    """Return the range that weights of zeros begin with: the others' mean, or that of PyTorch's initial weights.

    They are usual where a branch is to begin with nothing. With the scale 1 that a range of 0 otherwise gives, weights
    would stay in the code 0, and the layer without an effect, until they are as large as 0.5.
    """
    others = (ranges > 0).sum()
    inputs = x.numel() / max(x.shape[fmt.axis or 0] if x.dim() else 1, 1)
    return torch.where(others > 0, ranges.sum() / others.clamp(min=1), 1.0 / math.sqrt(max(inputs, 1.0)))


def _best(
    factors: Tensor, moves: list[float], error_of: Callable[[Tensor], Tensor], least: Tensor | None
) -> tuple[Tensor, Tensor]:
    best = factors
    for move in moves:
        factor = (factors + move).clamp_(max=1.0)
        error = error_of(factor)
        if least is None:
            best, least = factor, error
        else:
            less = error < least
            best, least = torch.where(less, factor, best), torch.where(less, error, least)
    return best, least  # type: ignore[return-value]


# --- the gradients --------------------------------------------------------------------------------


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exponent: Tensor, factor: float) -> Tensor:
        scale = scale_of(exponent)
        ctx.save_for_backward(scale)
        ctx.factor = factor
        return scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return exponent_gradient(grad, ctx.saved_tensors[0], ctx.factor), None


class _ZeroPoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, offset: Tensor, scale: Tensor, factor: float, bits: int) -> Tensor:
        ctx.save_for_backward(offset, scale)
        ctx.factor, ctx.levels = factor, 2**bits - 1
        return torch.round(position(offset, bits))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        offset, scale = ctx.saved_tensors
        return offset_gradient(grad, offset, scale, ctx.factor, ctx.levels), None, None, None


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, exponent: Tensor, offset: Tensor | None) -> Tensor:
        ctx.save_for_backward(exponent, offset)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        exponent, offset = ctx.saved_tensors
        return grad, torch.zeros_like(exponent), None if offset is None else torch.zeros_like(offset)


class _Applied(torch.autograd.Function):
    """Fake quantization and the way from its scale to the parameters in one step."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        exponent: Tensor,
        offset: Tensor | None,
        scale: Tensor,
        zero_point: Tensor | None,
        grid: tuple[int, int, int, int],
        factor: float,
        made: list[Tensor],
    ) -> Tensor:
        ctx.save_for_backward(x, scale, zero_point, None if offset is None else offset.detach().clone())
        ctx.grid, ctx.factor, ctx.shape, ctx.made = grid, factor, exponent.shape, made
        return fake_quantize_kernel(x, scale, zero_point, *grid)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, zero_point, offset = ctx.saved_tensors
        needs_x = ctx.needs_input_grad[0]
        values = ctx.made.pop() if ctx.made else None
        grad_x, grad_scale, grad_zero = learned_gradients(grad, x, scale, zero_point, ctx.grid, needs_x, values)
        levels, flat = ctx.grid[1] - ctx.grid[0], scale.view(ctx.shape)
        exponent, shift = parameter_gradients(grad_scale, grad_zero, flat, offset, ctx.factor, levels)
        return grad_x if needs_x else None, exponent, shift, None, None, None, None, None

"""A linear layer's training step as one step of autograd, on a CPU with native kernels.

What :meth:`QATLayer.compute` does, to the bit, with fewer passes over memory: the pass that quantizes the input lists
the elements outside its range, mostly few or none, and the gradient is set to 0 there in place, where a mask would read
the input again and write a third tensor; a weight's scales are found and used row by row. The fake-quantized tensors
are made again for the backward pass, as in :mod:`lightning_qat.nn.recompute`; an input of up to 8 bits from its codes,
a quarter of what float training keeps, unless the operation that made it keeps it anyway.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_qat.native import fake_quantize as native
from lightning_qat.nn.recompute import has_memory_of_its_own
from lightning_qat.ops.fake_quantize_cpu import as_read
from lightning_qat.ops.layout import NO_AXIS, NO_GROUP, empty_result, empty_values
from lightning_qat.ops.straight_through import (
    apply_plainly,
    differentiable_once,
    fake_quantize_kernel,
    grid_for,
    input_gradient,
    learned_gradients,
)
from lightning_qat.ops.workspace import SHORT_LIVED, passing_results
from lightning_qat.quantizers.fake_quantizer import ActivationQuantizer, FakeQuantizer
from lightning_qat.quantizers.learned_scale import LearnedScale, parameter_gradients
from lightning_qat.quantizers.weight_quantizer import WeightQuantizer
from lightning_qat.schemes import TensorFormat
from lightning_qat.schemes.integer import IntegerScheme

#: Operations that keep their result for their own backward pass: codes beside it would only add to it.
_KEEP_THEIR_RESULT = frozenset(
    f"{name}Backward0"
    for name in (
        "Relu", "Tanh", "Sigmoid", "Softmax", "LogSoftmax", "Exp", "Sqrt", "Rsqrt",
        "ScaledDotProductFlashAttentionForCpu",
    )
)  # fmt: skip


def linear_in_one_step(
    x: Tensor, weight: Tensor, bias: Tensor | None, of_input: ActivationQuantizer | None, of_weight: WeightQuantizer
) -> Tensor | None:
    """Return the linear layer of fake-quantized ``x`` and ``weight``; None where the general path is to be taken.

    Args:
        x: ``[..., in_features]``, arranged.
        weight: ``[out_features, in_features]``.
        bias: ``[out_features]`` or None.
        of_input: the input's quantizer, or None.
        of_weight: the weight's.
    """
    if not _fits(x, weight, bias) or not of_weight.quantizing:
        return None
    if not _is_plain(of_weight, weight) or not (of_input is None or _is_plain(of_input, x)):
        return None
    quantized = _Input(x, of_input), _Weight(weight, of_weight)
    learned = [parameter for each in quantized for parameter in each.learned_parameters()]
    result: Tensor = apply_plainly(_Linear, x, weight, bias, *learned, quantized)
    return result


def _fits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Return whether these are float32 tensors in ordinary training on a CPU, for which there are kernels."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or not torch.is_grad_enabled():
        return False
    if torch.is_autocast_enabled("cpu") or not (_is_ordinary(x) and _is_ordinary(weight)):
        return False
    if not (bias is None or _is_ordinary(bias)) or x.shape[-1] != weight.shape[1]:
        return False
    return (x.requires_grad or weight.requires_grad) and native.has_kernels(x)


def _is_ordinary(x: Tensor) -> bool:
    fits = x.dtype is torch.float32 and x.device.type == "cpu" and x.is_contiguous() and x.numel() > 0
    return fits and x.dim() > 0 and has_memory_of_its_own(x)


def _is_plain(quantizer: FakeQuantizer, x: Tensor) -> bool:
    """Return whether nothing else is to be done than what is done here."""
    if quantizer.debug_callback is not None or type(quantizer.scheme) is not IntegerScheme:
        return False
    if quantizer.learned is None:
        return True
    return type(quantizer.learned) is LearnedScale and quantizer.learns_now and quantizer.learns_from(x)


class _Quantized:
    """How one tensor is fake-quantized in this step.

    Args:
        quantizer: of the tensor, or None.
        x: the tensor.
    """

    def __init__(self, quantizer: FakeQuantizer | None, x: Tensor) -> None:
        self.learned = None if quantizer is None else quantizer.learned
        self.factor = quantizer.gradient_factor(x) if self.learned is not None and quantizer is not None else 1.0
        #: Whether the range is known to hold every element.
        self.covered = quantizer is None
        #: Layout, scale, zero point, smallest and largest code for the kernels; None where the tensor stays in float.
        self.grid: tuple[Any, ...] | None = None
        self._offset: Tensor | None = None

    def set_grid(self, x: Tensor, scale: Tensor, zero_point: Tensor | None, fmt: TensorFormat) -> None:
        quant_min, quant_max, axis, group = grid_for(x, scale, fmt.bits, fmt.symmetric, fmt.axis, fmt.group_size)
        run = group or (x.numel() // x.shape[0] if axis == 0 else x.numel())
        layout = (1, x.numel() // run, run)
        if axis > 0:
            raise ValueError(f"axis={axis} of a linear layer's weight or input; use 0 or None")
        self.grid = (layout, *as_read(scale, None if fmt.symmetric else zero_point), quant_min, quant_max)

    def _for_ops(self) -> tuple[Any, ...]:
        """Return :attr:`grid` as the ops take it.

        They step in where kernels are switched off, or a mode sees operations, from the forward pass to the backward.
        """
        (_, channels, run), *parameters = self.grid  # type: ignore[misc]
        return *parameters, NO_AXIS, run if channels > 1 else NO_GROUP

    def learned_parameters(self) -> tuple[Tensor | None, Tensor | None]:
        if self.learned is None:
            return None, None
        offset = self.learned.offset
        self._offset = None if offset is None else offset.detach().clone()
        return self.learned.exponent, offset

    def values(self, x: Tensor) -> Tensor:
        """Return ``x`` fake-quantized."""
        if self.grid is None:
            return x
        result = empty_result(x, 0)
        return result if native.quantize(x, result, *self.grid) else fake_quantize_kernel(x, *self._for_ops())

    def gradients(
        self, grad: Tensor, x: Tensor, wanted: bool, values: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the gradients of ``x`` if it is wanted, and of the learned exponent and offset.

        Args:
            grad: of the fake-quantized ``x``; no one else's, it is written into.
            x: the tensor.
            wanted: whether it has a gradient.
            values: gets what :meth:`values` returns, where a scale is learned.
        """
        if self.learned is None or self.grid is None:
            return self._inside(grad, x) if wanted else None, None, None
        _, scale, zero_point, quant_min, quant_max = self.grid
        sums = native.learned_sums(grad, x, grad if wanted else None, *self.grid, values=values)
        of_zero: Tensor | None
        if sums is None:
            if values is not None:
                values.copy_(self.values(x))
            grid: Any = self._for_ops()[2:]
            grad, of_scale, of_zero = learned_gradients(grad, x, scale, zero_point, grid, wanted, values)
        else:
            of_scale = sums[:, 0].to(torch.float32)
            of_zero = None if zero_point is None else sums[:, 1].to(torch.float32)
        flat = scale.view(self.learned.exponent.shape)
        parameters = parameter_gradients(of_scale, of_zero, flat, self._offset, self.factor, quant_max - quant_min)
        return grad if wanted else None, *parameters

    def _inside(self, grad: Tensor, x: Tensor) -> Tensor:
        if self.covered or self.grid is None or native.input_gradient(grad, x, grad, *self.grid):
            return grad
        scale, zero_point, *grid = self._for_ops()
        return input_gradient(grad, x, scale, zero_point, grid)  # type: ignore[arg-type]


class _Input(_Quantized):
    """The input: the first pass over it sees its extremes and what lies outside."""

    def __init__(self, x: Tensor, quantizer: ActivationQuantizer | None) -> None:
        super().__init__(quantizer, x)
        self._observer: ActivationQuantizer | None = None
        self._outside: Tensor | None = None
        parameters = None if quantizer is None else quantizer.parameters_now(x)
        if quantizer is None or parameters is None:
            self.learned, self.covered = None, True
            return
        self.set_grid(x, *parameters)
        self._observer = quantizer if quantizer.sees_next() else None

    def first_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``x`` fake-quantized, and what is to be kept for the backward pass: ``x`` or its codes."""
        if self.grid is None or self.learned is not None or self.grid[1].numel() > 1:
            return self.values(x), x
        result = empty_result(x, 0)
        codes = torch.empty(x.shape, dtype=torch.uint8, device="cpu") if self._may_keep_codes(x) else None
        _, scale, zero_point, quant_min, quant_max = self.grid
        seen: Any = native.quantize_input(x, result, scale, zero_point, quant_min, quant_max, codes)
        self._outside, self.covered = seen.outside, seen.outside is not None and not seen.outside.numel()
        if self._observer is not None:
            self._observer.saw(x, seen.low, seen.high)
            self._observer = None
        # Where too much lies outside, the input itself has to say what; a NaN has no code.
        return result, x if codes is None or seen.outside is None or math.isnan(seen.low) else codes

    def _may_keep_codes(self, x: Tensor) -> bool:
        if self.grid is None or self.grid[4] - self.grid[3] > 255:
            return False
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
        if hooks is not None and getattr(hooks[0], "__module__", "") == checkpoint.__module__:
            return False  # what is kept is compared with what it was, and a range that moved may choose otherwise
        owner = x if x._base is None else x._base
        # What has no history is data, which whoever gave it holds.
        return owner.grad_fn is not None and owner.grad_fn.name() not in _KEEP_THEIR_RESULT

    def values(self, x: Tensor) -> Tensor:
        if x.dtype is not torch.uint8 or self.grid is None:
            return super().values(x)
        result = empty_values(x.shape)
        if not native.values_of_codes(x, result, *self.grid[1:]):
            _, scale, zero_point, quant_min, _ = self.grid
            result.copy_(x).add_(quant_min if zero_point is None else quant_min - zero_point.round()).mul_(scale)
        return result

    def _inside(self, grad: Tensor, x: Tensor) -> Tensor:
        if self.covered or self._outside is None:
            return super()._inside(grad, x)
        grad.view(-1).index_fill_(0, self._outside, 0.0)
        return grad


class _Weight(_Quantized):
    """The weight: its scales are of its rows as they are, learned or fixed."""

    def __init__(self, weight: Tensor, quantizer: WeightQuantizer) -> None:
        super().__init__(quantizer, weight)
        quantizer.begin_learning(weight)  # before anything is read of what is learned
        self.name = quantizer.name
        self._format = quantizer.format
        self.covered = quantizer.covers_weight
        self._by_rows: IntegerScheme | None = None
        if self.covered and isinstance(quantizer.scheme, IntegerScheme) and self._format.symmetric:
            self._by_rows = quantizer.scheme
        self._quantizer: WeightQuantizer | None = quantizer
        #: The fake-quantized weight, where it is kept between optimizer steps: in memory of its own.
        self._kept: Tensor | None = None
        if quantizer.kept is not None and not quantizer.learns_now:
            with torch.no_grad():
                found = quantizer.kept.get(quantizer, weight)
            if found is not None:
                _, self._kept, parameters = found
                self.set_grid(weight, *parameters)

    def values(self, x: Tensor) -> Tensor:
        return super().values(x) if self._kept is None else self._kept

    def first_values(self, weight: Tensor) -> Tensor:
        quantizer: Any = self._quantizer
        self._quantizer = None
        if self._kept is not None:
            return self._kept
        made = None if self._by_rows is None else self._by_rows.fake_quantize_by_extremes(weight, self._format)
        if made is not None:
            values, scale = made
            self.set_grid(weight, scale, None, self._format)
            return values
        scale, zero_point = quantizer.parameters_for(weight)
        if quantizer.learned is None and scale is quantizer.scale:
            scale, zero_point = scale.clone(), zero_point.clone()  # they may be written before the backward pass
        self.set_grid(weight, scale, zero_point, self._format)
        return self.values(weight)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
        ctx.quantized = of_x, of_weight = rest[-1]
        with passing_results(SHORT_LIVED):
            quantized, kept = of_x.first_values(x)
            ctx.save_for_backward(kept, weight)
            return F.linear(quantized, of_weight.first_values(weight), bias)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        of_x, of_weight = ctx.quantized
        x, weight = _saved(ctx, of_weight.name)
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        for_x: tuple[Tensor | None, ...] = (None, None, None)
        for_weight, made_x = for_x, None
        if needs_x or of_x.learned is not None:
            with passing_results(SHORT_LIVED):
                made = of_weight.values(weight)
            of_values = rows.mm(made).view(x.shape)
            if of_x.learned is not None:  # one pass for both
                with passing_results(SHORT_LIVED):
                    made_x = empty_result(x, 0)
            for_x = of_x.gradients(of_values, x, needs_x, made_x)
            del made
        if needs_weight or of_weight.learned is not None:
            if made_x is None:
                with passing_results(SHORT_LIVED):
                    made_x = of_x.values(x)
            for_weight = of_weight.gradients(rows.t().mm(made_x.view(-1, x.shape[-1])), weight, needs_weight)
        return for_x[0], for_weight[0], rows.sum(0) if needs_bias else None, *for_x[1:], *for_weight[1:], None


def _saved(ctx: Any, name: str) -> tuple[Tensor, Tensor]:
    try:
        x, weight = ctx.saved_tensors
    except RuntimeError as error:
        if "inplace" not in str(error):
            raise
        raise RuntimeError(
            f"a tensor that layer {name!r} quantizes was changed in place before its backward pass; "
            "use an operation that is not in place after the layer"
        ) from error
    return x, weight

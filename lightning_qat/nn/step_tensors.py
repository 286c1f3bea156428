"""How the input and the weight of a layer are fake-quantized in one training step, and their gradients.

The kernels of :mod:`lightning_qat.nn.linear_step`: contiguous float32 on a CPU.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_qat.native import fake_quantize as native
from lightning_qat.native.weight_codes import weight_codes
from lightning_qat.ops.fake_quantize import absmax_divisor, inside_range, quant_range
from lightning_qat.ops.fake_quantize_cpu import as_read
from lightning_qat.ops.layout import NO_AXIS, NO_GROUP, empty_codes, empty_result, empty_values
from lightning_qat.ops.straight_through import (
    fake_quantize_kernel,
    fake_quantize_through,
    grid_for,
    input_gradient,
    learned_gradients,
    raising_if_differentiated,
)
from lightning_qat.quantizers.fake_quantizer import ActivationQuantizer, FakeQuantizer
from lightning_qat.quantizers.scale_gradients import gradients_of_numbers, parameter_gradients
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


class StepTensor:
    """How one tensor is fake-quantized in this step.

    Args:
        quantizer: of the tensor, or None.
        x: the tensor.
    """

    def __init__(self, quantizer: FakeQuantizer | None, x: Tensor) -> None:
        self.learned = learned = None if quantizer is None else quantizer.learned
        self.factor = 1.0 if learned is None else quantizer.gradient_factor(x)  # type: ignore[union-attr]
        #: Whether the range is known to hold every element.
        self.covered = quantizer is None
        #: Layout, scale, zero point, smallest and largest code for the kernels; None where the tensor stays in float.
        self.grid: tuple[Any, ...] | None = None
        self._offset: Tensor | float | None = None  # as it was, for the backward pass

    def set_grid(self, x: Tensor, scale: Tensor, zero_point: Tensor | None, fmt: TensorFormat) -> None:
        quant_min, quant_max, axis, group = grid_for(x, scale, fmt.bits, fmt.symmetric, fmt.axis, fmt.group_size)
        run = group or (x.numel() // x.shape[0] if axis == 0 else x.numel())
        layout = (1, x.numel() // run, run)
        if axis > 0:
            raise ValueError(f"axis={axis} of a linear layer's weight or input; use 0 or None")
        self.grid = (layout, *as_read(scale, None if fmt.symmetric else zero_point), quant_min, quant_max)

    def _for_ops(self) -> tuple[Any, ...]:
        """Return :attr:`grid` as the ops take it: scale, zero point, smallest and largest code, axis and group.

        They step in where kernels are switched off, or a mode sees operations, from the forward pass to the backward.
        """
        (_, channels, run), *parameters = self.grid  # type: ignore[misc]
        return *parameters, NO_AXIS, run if channels > 1 else NO_GROUP

    def learned_parameters(self) -> tuple[Tensor | None, Tensor | None]:
        learned = self.learned
        if learned is None:
            return None, None
        offset = learned.offset
        if offset is not None:
            self._offset = offset.item() if offset.numel() == 1 else offset.detach().clone()
        return learned.exponent, offset

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
        learned = self.learned
        if learned is None or self.grid is None:
            return self._inside(grad, x) if wanted else None, None, None
        _, scale, zero_point, quant_min, quant_max = self.grid
        to, flat = grad if wanted else None, scale.view(learned.shape or 1)
        found = (self._of_one if flat.numel() == 1 else self._of_several)(grad, x, to, flat, values)
        if found is not None:
            return to, *found
        if values is not None:
            values.copy_(self.values(x))
        grid: Any = self._for_ops()[2:]
        grad, of_scale, of_zero = learned_gradients(grad, x, scale, zero_point, grid, wanted, values)
        offset = torch.full_like(flat, self._offset) if isinstance(self._offset, float) else self._offset
        parameters = parameter_gradients(of_scale, of_zero, flat, offset, self.factor, quant_max - quant_min)
        return grad if wanted else None, *parameters

    def _of_one(
        self, grad: Tensor, x: Tensor, to: Tensor | None, scale: Tensor, values: Tensor | None
    ) -> tuple[Tensor, Tensor | None] | None:
        grid: Any = self.grid
        numbers = native.learned_sums_of_one(grad, x, to, *grid[1:], values=values)
        if numbers is None:
            return None
        offset: Any = self._offset
        return gradients_of_numbers(*numbers, scale, offset, self.factor, grid[4] - grid[3])

    def _of_several(
        self, grad: Tensor, x: Tensor, to: Tensor | None, scale: Tensor, values: Tensor | None
    ) -> tuple[Tensor, Tensor | None] | None:
        grid: Any = self.grid
        offset: Any = self._offset
        exponents = torch.empty(scale.shape, dtype=torch.float32, device="cpu") if offset is None else None
        how: Any = {"values": values, "factor": self.factor, "exponents": exponents}
        sums = native.learned_sums(grad, x, to, *grid, **how)
        if sums is None:
            return None
        if exponents is not None:
            return exponents, None
        of_scale, of_zero = sums.to(torch.float32).unbind(1)
        return parameter_gradients(of_scale, of_zero, scale, offset, self.factor, grid[4] - grid[3])

    def tracked_values(self, x: Tensor) -> Tensor:
        """Return :meth:`values` with their graph, where gradients are differentiated."""
        if self.grid is None:
            return x
        scale, zero_point, *grid = self._for_ops()
        return fake_quantize_through(x, scale, zero_point, *grid, covered=self.covered)

    def tracked_gradient(self, grad: Tensor, x: Tensor) -> Tensor:
        """Return the gradient of ``x``, fixed scales, in operations that have derivatives."""
        if self.covered or self.grid is None:
            return grad
        return inside_range(grad, x.detach(), *self._for_ops())

    def _inside(self, grad: Tensor, x: Tensor) -> Tensor:
        if self.covered or self.grid is None or native.input_gradient(grad, x, grad, *self.grid):
            return grad
        scale, zero_point, *grid = self._for_ops()
        return input_gradient(grad, x, scale, zero_point, grid)  # type: ignore[arg-type]


class StepInput(StepTensor):
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
        sees = quantizer.sees_next()  # asked once, whether it is used or not
        self._observer = quantizer if sees and self.learned is None else None

    def first_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``x`` fake-quantized, and what is to be kept for the backward pass: ``x`` or its codes."""
        if self.grid is None or self.learned is not None or self.grid[1].numel() > 1:
            return self.values(x), x
        result = empty_result(x, 0)
        codes = torch.empty(x.shape, dtype=torch.uint8, device="cpu") if self._may_keep_codes(x) else None
        seen = self._look(x, result, codes)
        # Where too much lies outside, the input itself has to say what; a NaN has no code.
        return result, x if codes is None or seen.outside is None or math.isnan(seen.low) else codes

    def _look(self, x: Tensor, result: Tensor | None, codes: Tensor | None) -> native.Seen:
        """Quantize, and learn what is outside and, if the range is observed, what the extremes are."""
        _, scale, zero_point, quant_min, quant_max = self.grid  # type: ignore[misc]
        lists = self.learned is None  # what is learned looks at every element again
        seen: Any = native.quantize_input(x, result, scale, zero_point, quant_min, quant_max, codes, lists=lists)
        self._outside, self.covered = seen.outside, seen.outside is not None and not seen.outside.numel()
        if self._observer is not None:
            self._observer.saw(x, seen.low, seen.high)
            self._observer = None
        return seen

    def has_codes(self) -> bool:
        """Return whether one scale and codes of up to 8 bits make the whole input."""
        return self.grid is not None and self.grid[1].numel() == 1 and self.grid[4] - self.grid[3] <= 255

    def first_codes(self, x: Tensor) -> tuple[Tensor | None, Tensor]:
        """Return the codes of ``x``, None where it holds NaN, and what :meth:`first_values` keeps. It has codes."""
        keeps = self.learned is None and self._may_keep_codes(x)
        codes = torch.empty(x.shape, dtype=torch.uint8, device="cpu") if keeps else empty_codes(x.shape)
        seen = self._look(x, None, codes)
        has_nan = math.isnan(seen.low)
        return None if has_nan else codes, codes if keeps and not has_nan and seen.outside is not None else x

    def step_and_zero(self) -> tuple[float, int]:
        """Return the scale, and the code of 0.0 counted from the first."""
        _, scale, zero_point, quant_min, _ = self.grid  # type: ignore[misc]
        return float(scale), (0 if zero_point is None else round(float(zero_point))) - quant_min

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

    def tracked_values(self, x: Tensor) -> Tensor:
        if x.dtype is not torch.uint8:
            return super().tracked_values(x)
        made: Tensor = raising_if_differentiated(self.values(x))  # of codes, which have no graph
        return made

    def tracked_gradient(self, grad: Tensor, x: Tensor) -> Tensor:
        if self.covered or self._outside is None:
            return super().tracked_gradient(grad, x)
        return grad.reshape(-1).index_fill(0, self._outside, 0.0).view(grad.shape)

    def _inside(self, grad: Tensor, x: Tensor) -> Tensor:
        if self.covered or self._outside is None:
            return super()._inside(grad, x)
        grad.view(-1).index_fill_(0, self._outside, 0.0)
        return grad


class StepWeight(StepTensor):
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

    def has_codes(self) -> bool:
        """Return whether scales of rows, or one, and codes of up to 8 bits around 0 make the whole weight."""
        fmt = self._format
        return fmt.symmetric and fmt.bits <= 8 and fmt.group_size is None and fmt.axis in (None, 0)

    def first_codes(self, weight: Tensor) -> Tensor | None:
        """Return the codes of ``weight``, column by column; None where it holds NaN. It has codes."""
        quant_min, quant_max = quant_range(self._format.bits, True)
        if self._kept is None and self._by_rows is not None and self._format.axis == 0:
            self._quantizer = None
            found: Any = weight_codes(weight, None, quant_min, quant_max, absmax_divisor(self._format.bits))
            self.set_grid(weight, found[1], None, self._format)
        else:
            if self._kept is None:
                self._choose_grid(weight)
            scale = self.grid[1].reshape(-1)  # type: ignore[index]
            found = weight_codes(weight, scale, quant_min, quant_max)
        return found[0] if found[2] else None

    def _choose_grid(self, weight: Tensor) -> None:
        quantizer: Any = self._quantizer
        self._quantizer = None
        if self.learned is not None and self._format.symmetric:
            self.set_grid(weight, self.learned.scale(), None, self._format)
            return
        scale, zero_point = quantizer.parameters_for(weight)
        if quantizer.learned is None and scale is quantizer.scale:
            scale, zero_point = scale.clone(), zero_point.clone()  # they may be written before the backward pass
        self.set_grid(weight, scale, zero_point, self._format)

    def first_values(self, weight: Tensor) -> Tensor:
        if self._kept is not None:
            self._quantizer = None
            return self._kept
        made = None if self._by_rows is None else self._by_rows.fake_quantize_by_extremes(weight, self._format)
        if made is not None:
            self._quantizer = None
            values, scale = made
            self.set_grid(weight, scale, None, self._format)
            return values
        self._choose_grid(weight)
        return self.values(weight)

"""A linear layer's training step as one step of autograd, on a CPU with native kernels.

What :meth:`QATLayer.compute` does, to the bit, with fewer passes over memory: the pass that quantizes the input lists
the elements outside its range, mostly few or none, and the gradient is set to 0 there in place, where a mask would read
the input again and write a third tensor; a weight's scales are found and used row by row. The fake-quantized tensors
are made again for the backward pass, as in :mod:`lightning_qat.nn.recompute`; an input of up to 8 bits from its codes,
a quarter of what float training keeps, unless the operation that made it keeps it anyway.

Where both are integers of up to 8 bits and the layer is large, its output is the product of their codes, which is exact
and takes a third of the time: the arithmetic of the converted layer (:mod:`lightning_qat.ops.step_product`). It equals
the general path's up to the rounding of float32 sums, gradients are those of the general path.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_qat.native import fake_quantize as native
from lightning_qat.native.weight_codes import has_weight_codes
from lightning_qat.nn.recompute import has_memory_of_its_own, sees_no_mode
from lightning_qat.nn.step_tensors import StepInput, StepWeight
from lightning_qat.ops.layout import empty_result, is_plain
from lightning_qat.ops.step_product import codes_product, product_pays
from lightning_qat.ops.straight_through import apply_plainly, differentiable
from lightning_qat.ops.workspace import SHORT_LIVED, passing_results
from lightning_qat.quantizers.fake_quantizer import ActivationQuantizer, FakeQuantizer
from lightning_qat.quantizers.learned_scale import LearnedScale
from lightning_qat.quantizers.weight_quantizer import WeightQuantizer
from lightning_qat.schemes.integer import IntegerScheme


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
    quantized = StepInput(x, of_input), StepWeight(weight, of_weight)
    if not torch.is_grad_enabled():
        return _output(x, weight, bias, *quantized)[0]
    learned = [parameter for each in quantized for parameter in each.learned_parameters()]
    result: Tensor = apply_plainly(_Linear, x, weight, bias, *learned, quantized)
    return result


def _fits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Return whether these are float32 tensors on a CPU, for which there are kernels, in ordinary training.

    Without gradients, in validation or in the first pass of reentrant checkpointing, the product of integers alone is
    taken: it is to be the one that is trained with.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if torch.is_autocast_enabled("cpu") or not (_is_ordinary(x) and _is_ordinary(weight)):
        return False
    if not (bias is None or (_is_ordinary(bias) and bias.shape == weight.shape[:1])):
        return False
    if x.shape[-1] != weight.shape[1] or not native.has_kernels(x):
        return False
    if torch.is_grad_enabled():
        return x.requires_grad or weight.requires_grad
    return product_pays(x.numel() // x.shape[-1], *weight.shape)


def _is_ordinary(x: Tensor) -> bool:
    fits = x.dtype is torch.float32 and x.device.type == "cpu" and x.is_contiguous() and x.numel() > 0 and x.dim() > 0
    return fits and (has_memory_of_its_own(x) or (x.is_inference() and is_plain(x) and sees_no_mode()))


def _is_plain(quantizer: FakeQuantizer, x: Tensor) -> bool:
    """Return whether nothing else is to be done than what is done here."""
    if quantizer.debug_callback is not None or type(quantizer.scheme) is not IntegerScheme:
        return False
    learned = quantizer.learned
    if learned is None:
        return True
    learning = quantizer.quantizing and not quantizer.frozen and quantizer.learns_from(x)
    return type(learned) is LearnedScale and learning


def _again(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...] | None:
    """The backward pass in operations that have derivatives, of fixed scales."""
    of_x, of_weight = ctx.quantized
    if of_x.learned is not None or of_weight.learned is not None:
        return None
    x, weight = _saved(ctx, of_weight.name)
    needs_x, needs_weight, needs_bias, *others = ctx.needs_input_grad
    rows = grad.reshape(-1, grad.shape[-1])
    for_x = for_weight = None
    if needs_x:
        for_x = of_x.tracked_gradient(rows.mm(of_weight.tracked_values(weight)).view(x.shape), x)
    if needs_weight:
        made = of_x.tracked_values(x).view(-1, x.shape[-1])
        for_weight = of_weight.tracked_gradient(rows.t().mm(made), weight)
    return for_x, for_weight, rows.sum(0) if needs_bias else None, *(None for _ in others)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
        ctx.quantized = of_x, of_weight = rest[-1]
        output, kept = _output(x, weight, bias, of_x, of_weight)
        ctx.save_for_backward(kept, weight)
        # A view may not be changed in place, as ``nn.ReLU(inplace=True)`` does; nobody has what this is one of.
        made: Tensor = torch.ops.aten._unsafe_view(output, output.shape) if output._is_view() else output
        return made

    @staticmethod
    @differentiable(_again)
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


def _output(
    x: Tensor, weight: Tensor, bias: Tensor | None, of_x: StepInput, of_weight: StepWeight
) -> tuple[Tensor, Tensor]:
    """Return the output and what is to be kept of ``x``."""
    with passing_results(SHORT_LIVED):
        pays = of_x.has_codes() and of_weight.has_codes() and product_pays(x.numel() // x.shape[-1], *weight.shape)
        if pays and has_weight_codes():
            return _of_codes(x, weight, bias, of_x, of_weight)
        quantized, kept = of_x.first_values(x)
        return F.linear(quantized, of_weight.first_values(weight), bias), kept


def _of_codes(
    x: Tensor, weight: Tensor, bias: Tensor | None, of_x: StepInput, of_weight: StepWeight
) -> tuple[Tensor, Tensor]:
    """Return the same of a product of codes; where there is a NaN, which has none, of floats."""
    codes, kept = of_x.first_codes(x)
    of_columns = of_weight.first_codes(weight)
    if codes is None or of_columns is None:
        return F.linear(of_x.values(kept), of_weight.values(weight), bias), kept
    scale: Tensor = of_weight.grid[1]  # type: ignore[index]
    product = codes_product(codes.view(-1, x.shape[-1]), *of_x.step_and_zero(), of_columns, scale, bias)
    return product.view(*x.shape[:-1], len(weight)), kept


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

"""The distance of weights from their grid: as a loss with a gradient, and as that gradient alone."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_qat.config import nearest_first
from lightning_qat.nn import QATLayer
from lightning_qat.nn.computed_weight import weight_now
from lightning_qat.quantizers.weight_quantizer import WeightQuantizer
from lightning_qat.schemes import Scheme, TensorFormat
from lightning_qat.transforms.prepare import qat_layers
from lightning_qat.validation import check_choice

#: How a task loss is computed: from predictions and targets, both tensors.
TaskLoss = Literal["auto", "cross_entropy", "mse"] | Callable[[Tensor, Tensor], Tensor]
Reduction = Literal["mean", "sum"]


def qat_loss(
    predictions: Tensor,
    targets: Tensor | None,
    quantization_error: Any,
    alpha: float,
    *,
    task_loss: TaskLoss = "auto",
) -> Tensor:
    """Return ``task loss + alpha * quantization error``, a scalar.

    Args:
        predictions: logits ``[N, classes, ...]`` or values of any shape; with ``targets=None`` the task loss itself,
            a scalar.
        targets: class indices ``[N, ...]`` of an integer type, for the cross entropy; or values in the shape of
            ``predictions``, for the mean squared error.
        quantization_error: a scalar, such as ``quantization_penalty(model)``, or one for each layer, in an iterable or
            a mapping, which are summed.
        alpha: weight of the error, 0 or more.
        task_loss: ``"auto"`` is by the type of ``targets``; ``"cross_entropy"`` takes class probabilities too, in the
            shape of ``predictions``; a function is called as ``task_loss(predictions, targets)``.

    Raises:
        TypeError: an argument is of no type that is allowed.
        ValueError: shapes do not fit each other, ``alpha`` is negative or not finite, or there is no error.
    """
    check_factor("alpha", alpha)
    return _task_loss(predictions, targets, task_loss) + alpha * _summed(quantization_error)


def check_factor(field_name: str, value: Any) -> float:
    """Return ``value`` if it is a finite number of 0 or more; raise ``ValueError`` otherwise."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value < 0:
        raise ValueError(f"{field_name}={value!r} is not allowed; use a finite number of 0 or more")
    return float(value)


def _task_loss(predictions: Tensor, targets: Tensor | None, task_loss: TaskLoss) -> Tensor:
    if not isinstance(predictions, Tensor):
        raise TypeError(f"predictions is a {type(predictions).__name__}; use a tensor")
    if targets is None:
        if predictions.numel() != 1:
            raise ValueError(
                f"targets=None takes predictions for the task loss, a scalar; its shape is {tuple(predictions.shape)}"
            )
        return predictions.reshape(())
    if not isinstance(targets, Tensor):
        raise TypeError(f"targets is a {type(targets).__name__}; use a tensor, or None where predictions is the loss")
    if callable(task_loss):
        return task_loss(predictions, targets)
    check_choice("task_loss", task_loss, ("auto", "cross_entropy", "mse"))
    indices = not targets.is_floating_point()
    if targets.dtype == torch.bool or targets.is_complex() or (indices and task_loss == "mse"):
        raise ValueError(
            f"targets of dtype {targets.dtype} are neither class indices nor values for task_loss={task_loss!r}; use "
            "targets.long() or targets.float()"
        )
    shape = predictions.shape
    wanted = (shape[:1] + shape[2:] if len(shape) > 1 else torch.Size()) if indices else shape
    if targets.shape != wanted:  # mse_loss would broadcast
        raise ValueError(
            f"targets of dtype {targets.dtype} must have the shape {tuple(wanted)} for predictions of shape "
            f"{tuple(shape)}; got {tuple(targets.shape)}"
        )
    if indices or task_loss == "cross_entropy":
        return F.cross_entropy(predictions, targets)
    return F.mse_loss(predictions, targets)


def _summed(error: Any) -> Tensor | float:
    """Return one error of one or many."""
    if isinstance(error, (int, float)) and not isinstance(error, bool):
        return float(error)
    if isinstance(error, Tensor):
        if error.numel() != 1:
            raise ValueError(
                f"quantization_error must be a scalar, or an iterable of one for each layer; got a tensor of shape "
                f"{tuple(error.shape)}, use error.mean() or error.sum()"
            )
        return error.reshape(())
    if not isinstance(error, Iterable) or isinstance(error, (str, bytes)):
        raise TypeError(f"quantization_error is a {type(error).__name__}; use a scalar or an iterable of scalars")
    errors = [_summed(e) for e in (error.values() if isinstance(error, Mapping) else error)]
    if not errors:
        raise ValueError("quantization_error is empty; give at least one, or use the task loss alone")
    return sum(errors[1:], errors[0])


def matched_layers(model: nn.Module, match: str = "*") -> dict[str, QATLayer]:
    """Return name -> prepared layer of those that ``match``; raise ``ValueError`` where none does."""
    layers = dict(qat_layers(model))
    found = {name: layer for name, layer in layers.items() if fnmatch.fnmatchcase(name, match)}
    if not found:
        names = ", ".join(repr(n) for n in nearest_first(match, layers)[:5])
        raise ValueError(f"match={match!r} matches no prepared layer; nearest names: {names or 'none, prepare first'}")
    return found


def quantization_penalty(model: nn.Module, *, match: str = "*", reduction: Reduction = "mean") -> Tensor:
    """Return how far the weights of the prepared layers are from their grids, with a gradient.

    Of a layer it is ``||w - q||^2 / ||w||^2``, ``q`` being the fake-quantized weight: the noise for each unit of
    signal, which is comparable between layers and 10 ** (-SQNR / 10). The gradient treats ``q`` and ``||w||^2`` as
    constants, so it is ``2 (w - q) / ||w||^2``, and goes to the latent weight. Nothing but the weight itself is kept
    for the backward pass. A layer in a phase of float training has no error.

    Args:
        model: a prepared model.
        match: glob on layer names.
        reduction: ``"mean"`` or ``"sum"`` over the layers that match.

    Returns:
        A scalar, float64 where weights are, otherwise float32.

    Raises:
        ValueError: if no prepared layer matches.
    """
    layers = matched_layers(model, match)
    check_choice("reduction", reduction, ("mean", "sum"))
    errors = []
    for layer in layers.values():
        quantizer, weight = layer.weight_quantizer, weight_now(layer)
        if quantizer.quantizing and weight.numel():
            held = (*(t.detach() for t in quantizer.parameters_for(weight.detach())), quantizer.format)
            errors.append(_RelativeNoise.apply(weight, quantizer.scheme, *held))
    if not errors:
        return torch.zeros((), device=next(iter(layers.values())).weight.device)
    total = torch.stack([e.to(errors[0].device) for e in errors]).sum()
    return total / len(layers) if reduction == "mean" else total


class _RelativeNoise(torch.autograd.Function):
    """The squared distance of a weight from its grid by its power; the grid point is found again for the gradient."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, scheme: Scheme, scale: Tensor, zero_point: Tensor, fmt: TensorFormat
    ) -> Tensor:
        difference = _wide(weight - scheme.fake_quantize(weight, scale, zero_point, fmt))
        noise, power = _energy(difference), _power(weight)
        ctx.scheme, ctx.format = scheme, fmt
        # The buffers of a scale that stands still may be written before the backward pass.
        ctx.save_for_backward(weight, scale.clone(), zero_point.clone(), power)
        return noise / power

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale, zero_point, power = ctx.saved_tensors
        difference = _wide(weight - ctx.scheme.fake_quantize(weight, scale, zero_point, ctx.format))
        return (difference * (2 * grad / power)).to(weight.dtype), None, None, None, None


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _energy(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(_wide(x)).square()


def _power(weight: Tensor) -> Tensor:
    """Return ``||w||^2``, but of a weight of zeros, which has no noise, something to divide by."""
    power = _energy(weight)
    return power.clamp_min(torch.finfo(power.dtype).tiny)


@torch.no_grad()
def add_penalty_gradient(
    layers: Mapping[str, QATLayer], factor: float, parameters: Collection[int] | None = None
) -> dict[str, Tensor]:
    """Add to ``.grad`` what ``factor * quantization_penalty(..., reduction="sum")`` would, without a graph.

    Args:
        layers: prepared; those in float are left out.
        factor: of each layer's error.
        parameters: ``id`` of those that may be given a gradient; None is all that are trained.

    Returns:
        Layer -> its relative noise.
    """
    found = {}
    for name, layer in layers.items():
        moved = weight_to_move(layer, parameters)
        if moved is not None:
            difference = _wide(moved[0] - fake_quantized(layer.weight_quantizer, moved[0]))
            power = _power(moved[0])
            found[name] = _energy(difference) / power
            add_gradient(name, *moved, difference.mul_(2 * factor / power))
    return found


def fake_quantized(quantizer: WeightQuantizer, weight: Tensor) -> Tensor:
    """Return the fake-quantized ``weight``, no gradient attached."""
    weight = weight.detach()
    scale, zero_point = quantizer.parameters_for(weight)
    with torch.no_grad():
        return quantizer.scheme.fake_quantize(weight, scale.detach(), zero_point.detach(), quantizer.format)


def weight_to_move(
    layer: QATLayer, parameters: Collection[int] | None = None
) -> tuple[Tensor, list[nn.Parameter]] | None:
    """Return the weight of ``layer`` and the parameters that it is or is computed from.

    None where the layer computes in float, or no such parameter is trained.
    """
    own = layer._parameters.get("weight")
    holders = [p for p in layer.weight_parameters() if p.requires_grad and (parameters is None or id(p) in parameters)]
    if not layer.weight_quantizer.quantizing or not holders:
        return None
    with torch.enable_grad():
        weight = weight_now(layer) if own is None else own
    return (weight, holders) if weight.numel() else None


def add_gradient(name: str, weight: Tensor, holders: list[nn.Parameter], gradient: Tensor) -> None:
    """Add to the gradients of ``holders`` what a ``gradient`` of ``weight`` makes of them.

    No accumulation nodes of autograd run, on which the hooks of ``DistributedDataParallel`` wait.
    """
    gradient = gradient.to(weight.dtype)
    if weight is holders[0]:
        found: Iterable[Tensor | None] = [gradient]
    elif weight.requires_grad:
        found = torch.autograd.grad(weight, holders, gradient, allow_unused=True)
    else:
        return
    for holder, added in zip(holders, found, strict=True):
        if added is None:
            continue
        if holder.grad is None:
            holder.grad = added.to(holder.dtype)
        elif holder.grad.is_sparse:
            raise ValueError(f"layer {name!r} has sparse gradients (sparse=True), and a penalty moves all its weights; "
                             "use sparse=False, or a match= without it")  # fmt: skip
        else:
            holder.grad.add_(added)

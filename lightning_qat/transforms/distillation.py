"""A prepared model as its own teacher: the float forward of the same latent weights, and what to learn from it."""

from __future__ import annotations

import contextlib
import itertools
import random
import sys
from collections import deque
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_qat.quantizers.sharded import is_sharded
from lightning_qat.quantizers.state import QuantizationState
from lightning_qat.transforms.phase import float_forward
from lightning_qat.transforms.prepare import qat_layers

DistillationLoss = Literal["kl", "mse"]
#: Attributes that change in place.
_CONTAINERS = (list, dict, set, deque)


@contextlib.contextmanager
def as_teacher(model: nn.Module) -> Iterator[None]:
    """Let forward passes of ``model`` inside be those of its float self, eagerly, and leave nothing behind.

    No gradients; no observer learns; buffers (BatchNorm statistics), attributes and the random state are as they were
    afterwards. Modules in training mode stay in it: with the random state of before, dropout drops the same.
    """
    inputs = [layer.input_quantizer for _, layer in qat_layers(model) if layer.input_quantizer is not None]
    flags = [(quantizer.observing, quantizer.calibrated) for quantizer in inputs]
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(_random_state_kept(model))
        stack.enter_context(_state_kept(model))
        stack.enter_context(float_forward(model))
        for quantizer in inputs:
            # Not calibrated, the quantizer is one that ``QuantizationMonitor`` takes no inputs of.
            quantizer.observing = quantizer.calibrated = False
        try:
            yield
        finally:
            for quantizer, (observing, calibrated) in zip(inputs, flags, strict=True):
                quantizer.observing, quantizer.calibrated = observing, calibrated


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of the parameters and buffers of ``model`` but for those of quantizers; tied ones are one.

    Raises:
        ValueError: a parameter is sharded over ranks.
    """
    copies: dict[int, Tensor] = {}
    found = {}
    for name, tensor in _float_tensors(model):
        if is_sharded(tensor):
            raise ValueError(
                f"the parameter {name!r} is sharded, so no copy of it can teach; use teacher='now', the float forward "
                "of the weights as they are, or DDP"
            )
        found[name] = copies.setdefault(id(tensor), tensor.detach().clone())
    return found


@contextlib.contextmanager
def with_weights(model: nn.Module, weights: dict[str, Tensor]) -> Iterator[None]:
    """Let ``model`` have ``weights`` of :func:`weights_of` inside, on their devices, and be in evaluation mode.

    Parameters stay the objects that they are: whoever holds one, as recurrent layers do, computes with its data.

    Raises:
        ValueError: ``model`` has a parameter or buffer that ``weights`` lacks.
    """
    parts = [(part, part.training) for part in model.modules()]
    kept = [(tensor, tensor.data) for _, tensor in _float_tensors(model)]
    new = [name for name, _ in _float_tensors(model) if name not in weights]
    if new:
        raise ValueError(
            f"{new[0]!r} has come to {type(model).__name__} since the teacher's weights were kept; begin training with "
            "all parameters and buffers, or use teacher='now'"
        )
    try:
        for name, tensor in _float_tensors(model):
            # A forward pass may write to buffers.
            tensor.data = weights[name] if isinstance(tensor, nn.Parameter) else weights[name].clone()
        for part, _ in parts:
            part.training = False
        yield
    finally:
        for tensor, data in kept:
            tensor.data = data
        for part, training in parts:
            part.training = training


def _float_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for prefix, part in model.named_modules():
        if not isinstance(part, QuantizationState):
            for name, tensor in itertools.chain(part._parameters.items(), part._buffers.items()):
                if tensor is not None:
                    yield f"{prefix}.{name}" if prefix else name, tensor


@contextlib.contextmanager
def _random_state_kept(model: nn.Module) -> Iterator[None]:
    python, numpy = random.getstate(), sys.modules.get("numpy")  # layer drop draws from these at times
    numbers = None if numpy is None else numpy.random.get_state()
    kinds = {p.device for p in model.parameters() if p.device.type not in ("cpu", "meta")}
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))  # of the CPU
        for kind in {device.type for device in kinds}:
            devices = [device for device in kinds if device.type == kind]
            stack.enter_context(torch.random.fork_rng(devices=devices, device_type=kind))
        try:
            yield
        finally:
            random.setstate(python)
            if numpy is not None:
                numpy.random.set_state(numbers)


@contextlib.contextmanager
def _state_kept(model: nn.Module) -> Iterator[None]:
    """Give every module, inside, buffers of its own; put public attributes back afterwards.

    Buffers are not copied back: that would count as a change of those that a graph holds.
    """
    parts = [part for part in model.modules() if not isinstance(part, QuantizationState)]
    kept = [(part, dict(part._buffers), _public(part)) for part in parts]
    contents = [(value, value.copy()) for *_, held in kept for value in held.values() if type(value) in _CONTAINERS]
    try:
        for part, buffers, _ in kept:
            part._buffers.update({name: b.clone() for name, b in buffers.items() if b is not None})
        yield
    finally:
        for part, buffers, attributes in kept:
            part._buffers.clear()
            part._buffers.update(buffers)
            for name in _public(part).keys() - attributes.keys():
                del part.__dict__[name]
            part.__dict__.update(attributes)
        for value, before in contents:
            value.clear()
            (value.extend if isinstance(value, (list, deque)) else value.update)(before)


def _public(part: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in part.__dict__.items() if not name.startswith("_")}


@torch.no_grad()
def distillation_gradient(
    student: Tensor, teacher: Tensor, loss: DistillationLoss, temperature: float = 1.0, class_dim: int = -1
) -> tuple[Tensor, Tensor]:
    """Return the distillation loss, a scalar, and its gradient for ``student``, in the shape of it.

    Args:
        student: logits, or any values for ``"mse"``.
        teacher: of the same shape; a constant.
        loss: ``"kl"`` is the Kullback-Leibler divergence of the softened predictions from the teacher's, times
            ``temperature ** 2`` so that gradients keep their size (Hinton et al. 2015,
            https://arxiv.org/abs/1503.02531), a mean over all predictions; ``"mse"`` a mean over all elements.
        temperature: logits are divided by it, for ``"kl"``.
        class_dim: dimension of the classes, for ``"kl"``.
    """
    if student.dtype not in (torch.float32, torch.float64):
        student = student.float()
    teacher = teacher.to(student.dtype)
    if loss == "mse":
        difference = student - teacher
        return difference.square().mean(), difference.mul_(2 / max(student.numel(), 1))
    predictions = max(student.numel() // max(student.shape[class_dim], 1), 1)
    told = F.log_softmax(student / temperature, class_dim)
    wanted = F.log_softmax(teacher / temperature, class_dim)
    divergence = F.kl_div(told, wanted, reduction="sum", log_target=True) * (temperature**2 / predictions)
    return divergence, told.exp_().sub_(wanted.exp_()).mul_(temperature / predictions)

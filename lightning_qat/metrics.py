"""How far quantized numbers are from the float ones: functions, and torchmetrics that gather over batches."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric


def quantization_error(original: Any, quantized: Any) -> Tensor:
    """Return the mean squared difference, a float64 scalar, computed in float64. NaN and inf are not left out.

    Args:
        original: a real tensor, or an object with ``dequantize()``, such as a ``QuantizedTensor``.
        quantized: likewise, of the same shape.

    Raises:
        TypeError: one of them is neither.
        ValueError: the shapes differ, a tensor is complex, or there is nothing to compare.
    """
    original, quantized = _pair(original, quantized)
    return (original.double() - quantized.double()).square().mean()


def sqnr(original: Any, quantized: Any) -> Tensor:
    """Return the signal-to-quantization-noise ratio in dB, a float64 scalar without a gradient.

    ``10 log10(sum(original^2) / sum((original - quantized)^2))`` in float64: infinite for equal tensors (of zeros,
    too), minus infinite where an original of zeros was changed.

    Args:
        original: a real tensor, or an object with ``dequantize()``, such as a ``QuantizedTensor``.
        quantized: likewise, of the same shape.

    Raises:
        TypeError: one of them is neither.
        ValueError: the shapes differ, a tensor is complex, or there is nothing to compare.
    """
    original, quantized = _pair(original, quantized)
    signal, noise = _energies(original, quantized)
    return _decibel(signal, noise)


@torch.no_grad()
def perplexity(model: Callable[[Tensor], Any], windows: Tensor, *, batch_size: int = 1) -> float:
    """Return the perplexity of a causal language model: ``exp`` of the mean loss of each token given those before it.

    The losses are summed in float64. The first token of a window is not predicted.

    Args:
        model: ids ``[batch, length]`` to logits ``[batch, length, vocabulary]``, or to an object with ``logits``.
        windows: token ids, ``[windows, length]``, int64.
        batch_size: windows at a time.

    Raises:
        ValueError: there is no token to predict.
    """
    if windows.dim() != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise ValueError(f"windows has shape {tuple(windows.shape)}; use [windows, length], with a length of 2 or more")
    total = 0.0
    for batch in windows.split(batch_size):
        output = model(batch)
        logits = output if isinstance(output, Tensor) else output.logits
        targets = batch[:, 1:].reshape(-1).to(logits.device)
        losses = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets, reduction="none")
        total += float(losses.double().sum())
    return math.exp(total / (windows.shape[0] * (windows.shape[1] - 1)))


class SQNR(Metric):
    """:func:`sqnr` of all batches together, in dB."""

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    signal: Tensor
    noise: Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_state("signal", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("noise", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, original: Any, quantized: Any) -> None:
        """Add a batch; the two have the same shape."""
        original, quantized = _pair(original, quantized)
        signal, noise = _energies(original, quantized)
        self.signal += signal
        self.noise += noise

    def compute(self) -> Tensor:
        """Return the ratio in dB."""
        return _decibel(self.signal, self.noise)


class QuantizationError(Metric):
    """:func:`quantization_error` of all batches together."""

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    total: Tensor
    count: Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, original: Any, quantized: Any) -> None:
        """Add a batch; the two have the same shape."""
        original, quantized = _pair(original, quantized)
        self.total += (original.double() - quantized.double()).square().sum()
        self.count += original.numel()

    def compute(self) -> Tensor:
        """Return the mean squared difference."""
        return self.total / self.count


class Agreement(Metric):
    """Share of predictions whose top-1 is the same in two sets of logits.

    Args:
        dim: the dimension of the classes.
        **options: of :class:`torchmetrics.Metric`.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    same: Tensor
    count: Tensor

    def __init__(self, *, dim: int = -1, **options: Any) -> None:
        super().__init__(**options)
        self.dim = dim
        self.add_state("same", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, original: Tensor, quantized: Tensor) -> None:
        """Add the logits of a batch; the two have the same shape."""
        original, quantized = _pair(original, quantized)
        same = original.argmax(self.dim) == quantized.argmax(self.dim)
        self.same += same.sum()
        self.count += same.numel()

    def compute(self) -> Tensor:
        """Return the share, from 0 to 1."""
        return self.same / self.count


class Cosine(Metric):
    """Mean cosine between the vectors of two sets of embeddings, such as of a float and a quantized encoder.

    Args:
        dim: the dimension of a vector's features.
        **options: of :class:`torchmetrics.Metric`.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    total: Tensor
    count: Tensor

    def __init__(self, *, dim: int = -1, **options: Any) -> None:
        super().__init__(**options)
        self.dim = dim
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, original: Any, quantized: Any) -> None:
        """Add the embeddings of a batch; the two have the same shape."""
        original, quantized = _pair(original, quantized)
        cosines = F.cosine_similarity(original.double(), quantized.double(), dim=self.dim)
        self.total += cosines.sum()
        self.count += cosines.numel()

    def compute(self) -> Tensor:
        """Return the mean, from -1 to 1."""
        return self.total / self.count


def _values(field_name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor) or value.is_quantized:
        if not callable(getattr(value, "dequantize", None)):
            raise TypeError(f"{field_name} is a {type(value).__name__}; use a tensor or an object with dequantize()")
        value = value.dequantize()
    if value.is_complex():
        raise ValueError(f"{field_name} has dtype {value.dtype}; use real tensors, such as torch.view_as_real(x)")
    return value


def _pair(original: Any, quantized: Any) -> tuple[Tensor, Tensor]:
    """Return both as real tensors of one shape, not empty."""
    original, quantized = _values("original", original), _values("quantized", quantized)
    if original.shape != quantized.shape or original.numel() == 0:
        shapes = f"{tuple(original.shape)} and {tuple(quantized.shape)}"
        raise ValueError(f"original and quantized must have the same shape and at least one element; got {shapes}")
    return original, quantized


def _energies(original: Tensor, quantized: Tensor) -> tuple[Tensor, Tensor]:
    reference = original.detach().double()
    return reference.square().sum(), (reference - quantized.detach().double()).square().sum()


def _decibel(signal: Tensor, noise: Tensor) -> Tensor:
    # 0 / 0 (nothing there and nothing lost) is no loss.
    ratio = torch.where(noise == 0, torch.full_like(signal, torch.inf), signal / noise)
    return 10 * torch.log10(ratio)

"""Comparing what two models compute, batch after batch: sums are kept, not tensors."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

#: What float rounding leaves of a layer's SQNR, at least, in dB. A BatchNorm that takes off a mean ten times
#: the deviation costs 20 dB of what rounding alone leaves (measured: float16 66, bfloat16 48, float32 125).
_THRESHOLDS = {torch.bfloat16: 25.0, torch.float16: 40.0}
_THRESHOLD = 60.0
#: Outputs of a forward are kept up to this many numbers until the other model has run.
_MOST_NUMBERS = 2**26


def _default_threshold(dtype: torch.dtype, device: torch.device) -> float:
    if dtype is torch.float32 and device.type == "cuda":
        return _THRESHOLDS[torch.float16]  # TF32 has the mantissa of float16, and cuDNN uses it by default
    return _THRESHOLDS.get(dtype, _THRESHOLD)


def _power(x: Tensor) -> float:
    """Return the sum of squares, in float64 where the device has it."""
    dtype = torch.float32 if x.device.type == "mps" else torch.float64
    return float(torch.linalg.vector_norm(x, dtype=dtype)) ** 2


def _powers(expected: Tensor, actual: Tensor) -> tuple[float, float]:
    """Return the powers of the signal and of the noise."""
    wide = torch.promote_types(expected.dtype, torch.float32)
    a, b = expected.to(wide), actual.to(wide)
    signal, noise = _power(a), _power(a - b)
    if math.isfinite(signal) and math.isfinite(noise):
        return signal, noise
    zero = a.new_zeros(())  # masked logits are -inf in both
    return _power(torch.where(a.isfinite(), a, zero)), _power(torch.where(a == b, zero, a - b))


def _decibel(signal: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    ratio = signal / noise
    return 10 * math.log10(ratio) if ratio > 0 else -math.inf if ratio == 0 else math.nan


def _pairs(expected: Any, actual: Any) -> list[tuple[Tensor, Tensor]] | None:
    """Return the float tensors of two trees side by side, or None where the trees do not match or hold none."""
    a, b = tree_leaves(expected), tree_leaves(actual)
    if len(a) != len(b):
        return None
    found = [(x, y) for x, y in zip(a, b, strict=True) if isinstance(x, Tensor) and x.is_floating_point()]
    same = all(isinstance(y, Tensor) and x.shape == y.shape and y.is_floating_point() for x, y in found)
    return [pair for pair in found if pair[0].numel()] if found and same else None


@dataclass
class PowerSums:
    """Powers of the signal and the noise of one layer, or of the outputs, over all batches."""

    signal: float = 0.0
    noise: float = 0.0
    count: int = 0
    threshold: float = _THRESHOLD

    def add(self, expected: Any, actual: Any) -> bool:
        """Add two trees of tensors; return whether they can be compared."""
        pairs = _pairs(expected, actual)
        for x, y in pairs or ():
            signal, noise = _powers(x, y)
            self.signal += signal
            self.noise += noise
            thresholds = (_default_threshold(t.dtype, t.device) for t in (x, y))
            self.threshold = min(self.threshold, *thresholds)
        self.count += pairs is not None
        return pairs is not None

    def sqnr_db(self) -> float:
        """Return the ratio; infinite where nothing differs, NaN where that cannot be said."""
        return _decibel(self.signal, self.noise)


@dataclass
class OutputSums:
    """The outputs of both models, compared run by run."""

    names: list[str]  # the model, and the one network in it, which a step may call instead
    sums: PowerSums = field(default_factory=PowerSums)
    comparable: bool = True
    same: int = 0
    predictions: int = 0

    @contextlib.contextmanager
    def recorded(self, model: nn.Module) -> Iterator[dict[str, list[Any]]]:
        """Record the outputs of the named modules of ``model`` in the forward run inside."""
        found: dict[str, list[Any]] = {name: [] for name in self.names}
        numbers = dict.fromkeys(self.names, 0)

        def keep(name: str, _: nn.Module, __: Any, output: Any) -> None:
            if numbers[name] < _MOST_NUMBERS:
                numbers[name] += sum(leaf.numel() for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
                found[name].append(output)

        handles = [model.get_submodule(n).register_forward_hook(functools.partial(keep, n)) for n in self.names]
        try:
            yield found
        finally:
            for handle in handles:
                handle.remove()

    def add(self, expected: dict[str, list[Any]], actual: dict[str, list[Any]]) -> None:
        """Add what both models were recorded to do with a batch."""
        name = next((name for name in self.names if expected.get(name)), None)
        if name is None or not self.sums.add(expected[name], actual[name]):
            self.comparable = False
            return
        for one, other in zip(expected[name], actual[name], strict=True):
            pairs = [(x, y) for x, y in _pairs(one, other) or () if x.dim() in (2, 3) and x.shape[-1] > 1]
            if len(pairs) == 1:
                same = pairs[0][0].argmax(-1) == pairs[0][1].argmax(-1)
                self.same += int(same.count_nonzero())
                self.predictions += same.numel()

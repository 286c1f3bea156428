"""What may stand between a convolution and the next layer while only codes pass: clamping, max pooling, flattening.

Each commutes with rounding to a grid, so codes can go through it: ``quantize(step(x)) == step(quantize(x))``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_qat.ops.integer_conv import CodeGrid


class Step(Protocol):
    """An operation on floats and on their codes alike."""

    def on_float(self, x: Tensor) -> Tensor:
        """Return the result as a new tensor."""
        ...

    def on_fresh_float(self, x: Tensor) -> Tensor:
        """Return the result; ``x`` is nobody else's and may be changed."""
        ...

    def on_fresh_codes(self, codes: Tensor, grid: CodeGrid) -> Tensor:
        """Return the codes of the result; ``codes`` may be changed."""
        ...


@lru_cache(maxsize=4096)
def _code_of(bound: float, grid: CodeGrid) -> int:
    at = torch.tensor([bound, grid.scale], dtype=torch.float32)  # not the default dtype, which "bf16-true" changes
    code = torch.round(at[0] / at[1]) + grid.codes.zero_point
    return int(code.clamp(grid.codes.low, grid.codes.high))


@dataclass(frozen=True)
class Clamp:
    """ReLU, ReLU6, Hardtanh."""

    low: float
    high: float | None

    def on_float(self, x: Tensor) -> Tensor:
        return F.relu(x) if self.high is None else F.hardtanh(x, self.low, self.high)

    def on_fresh_float(self, x: Tensor) -> Tensor:
        return x.relu_() if self.high is None else F.hardtanh_(x, self.low, self.high)

    def on_fresh_codes(self, codes: Tensor, grid: CodeGrid) -> Tensor:
        low = _code_of(self.low, grid)
        high = grid.codes.high if self.high is None else _code_of(self.high, grid)
        if low > grid.codes.low or high < grid.codes.high:
            codes.clamp_(low, high)
        return codes


RELU = Clamp(0.0, None)


@dataclass(frozen=True)
class MaxPool:
    """``F.max_pool2d``; what is padded never wins."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the result, for ``[N, C, H, W]``."""
        facts = zip(shape[2:], self.kernel, self.stride, self.padding, self.dilation, strict=True)
        return (*shape[:2], *((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in facts))

    def on_float(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x, self.kernel, self.stride, self.padding, self.dilation)

    on_fresh_float = on_float

    def on_fresh_codes(self, codes: Tensor, grid: CodeGrid) -> Tensor:
        return _pool_codes(codes, self.kernel, self.stride, self.padding, self.dilation)


def _pool_codes(codes: Tensor, *geometry: tuple[int, int]) -> Tensor:
    # F.max_pool2d counts positions in the dtype of its input: uint8 images may have 255 pixels.
    result: Tensor = torch.ops.quantized.max_pool2d(codes, *geometry, False)
    return result


@lru_cache(maxsize=1)
def _codes_can_be_pooled() -> bool:
    codes = torch.arange(2 * 17 * 16).reshape(1, 2, 17, 16).to(torch.uint8)
    try:
        pooled = _pool_codes(codes, (3, 2), (2, 1), (1, 1), (1, 1))
    except (AttributeError, RuntimeError):  # a build of PyTorch without this op
        return False
    return torch.equal(pooled, F.max_pool2d(codes.float(), (3, 2), (2, 1), 1).to(torch.uint8))


@dataclass(frozen=True)
class Flatten:
    """``[N, C, H, W]`` to ``[N, C * H * W]``, in the order of the plain layout."""

    def on_float(self, x: Tensor) -> Tensor:
        return x.contiguous().flatten(1)

    on_fresh_float = on_float

    def on_fresh_codes(self, codes: Tensor, grid: CodeGrid) -> Tensor:
        return self.on_float(codes)


def _pair(value: Any) -> tuple[int, int] | None:
    if isinstance(value, int):
        return value, value
    if isinstance(value, Sequence) and len(value) == 2 and all(isinstance(v, int) for v in value):
        return value[0], value[1]
    return None


def max_pool_of(
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> MaxPool | None:
    """Return the pooling that arguments of ``F.max_pool2d`` mean, or None for one that codes cannot go through."""
    if ceil_mode or return_indices or not _codes_can_be_pooled():
        return None
    facts = [_pair(v) for v in (kernel_size, stride if stride is not None else kernel_size, padding, dilation)]
    if any(fact is None for fact in facts):
        return None
    kernel, steps, pads, dilations = (fact for fact in facts if fact is not None)
    right = all(0 <= 2 * p <= k and k > 0 and s > 0 and d > 0
                for k, s, p, d in zip(kernel, steps, pads, dilations, strict=True))  # fmt: skip
    return MaxPool(kernel, steps, pads, dilations) if right else None

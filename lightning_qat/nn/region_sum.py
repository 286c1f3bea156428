"""The sum at the end of a residual block, added up when somebody reads it: floats, and codes in the same pass."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from lightning_qat.nn.region_steps import Clamp, Step
from lightning_qat.ops.integer_conv import CodeGrid
from lightning_qat.ops.residual import add_clamped, add_quantized


class Waiting(Protocol):
    """What stands for a :class:`PendingSum` after some steps, in the user's code."""

    def sum_steps(self) -> tuple[Step, ...]:
        """Return what is done to the sum."""
        ...

    def take_sum(self, value: Tensor) -> None:
        """Get the floats: the sum after the steps, nobody else's."""
        ...


class PendingSum:
    """A sum that is not added up yet.

    It is added up for all that wait for it at once, so the convolution that is one side of it runs once, and nobody
    has to keep what it gave.

    Args:
        left: makes one side; whether what it returns is nobody else's and may become the sum.
        right: the other side; whoever changes it, or gives it to somebody who could, calls :meth:`settle` before.
    """

    def __init__(self, left: Callable[[], Tensor], right: Tensor, *, fresh: bool) -> None:
        self._left = left
        self._right = right
        self._fresh = fresh
        self._waiting: list[weakref.ref[Waiting]] = []

    def awaited_by(self, one: Waiting) -> None:
        """Give ``one`` its floats when the sum is added up, if it is still there then."""
        self._waiting.append(weakref.ref(one))

    def settle(self) -> None:
        """Add up, for all that wait."""
        waiting = self._all_waiting()
        if len(waiting) == 1:
            clamp, others = _first_clamp(waiting[0].sum_steps())
            value = add_clamped(self._left(), self._right, *clamp, fresh=self._fresh)
            waiting[0].take_sum(_after(others, value))
        elif waiting:
            total = add_clamped(self._left(), self._right, fresh=self._fresh)
            for one in waiting:
                steps = one.sum_steps()
                one.take_sum(_after(steps[1:], steps[0].on_float(total)) if steps else total)
        self._waiting = []

    def codes_on(self, grid: CodeGrid) -> Tensor | None:
        """Add up and return the codes of the one that waits; None, and nothing is done, where others wait too."""
        waiting = self._all_waiting()
        clamp, others = _first_clamp(waiting[0].sum_steps() if waiting else ())
        if len(waiting) != 1 or others:
            return None
        value, codes = add_quantized(self._left(), self._right, grid, *clamp, fresh=self._fresh)
        waiting[0].take_sum(value)
        self._waiting = []
        return codes

    def _all_waiting(self) -> list[Waiting]:
        return [one for reference in self._waiting if (one := reference()) is not None]


def _first_clamp(steps: tuple[Step, ...]) -> tuple[tuple[float, float], tuple[Step, ...]]:
    """Return the bounds that the first step sets, and the steps after it."""
    if not steps or not isinstance(steps[0], Clamp):
        return (-math.inf, math.inf), steps
    return (steps[0].low, math.inf if steps[0].high is None else steps[0].high), steps[1:]


def _after(steps: tuple[Step, ...], value: Tensor) -> Tensor:
    for step in steps:
        value = step.on_fresh_float(value)
    return value

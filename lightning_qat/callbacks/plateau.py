"""Has a metric stopped getting better, or has it got much worse? Numbers in, an answer out."""

from __future__ import annotations

import math
from typing import Any, Literal

from lightning_qat.validation import check_choice, check_int

#: What a look can find.
Found = Literal["", "flat", "diverged"]


class Plateau:
    """Compares a metric with its best, and a guard with what it was before the last reduction.

    Args:
        mode: ``"min"`` or ``"max"``: which way the guard gets better.
        min_delta: what counts as better, as a share of the best.
        patience: looks without anything better until the metric is flat.
        divergence: factor that the guard may be worse by, above 1.
        recovery: looks in a row that it may be.
        rising: the metric gets better upwards whatever ``mode`` says of the guard.
    """

    def __init__(
        self, mode: str, min_delta: float, patience: int, divergence: float, recovery: int, *, rising: bool = False
    ) -> None:
        self.mode = check_choice("mode", mode, ("min", "max"))
        self.rising = rising or mode == "max"
        self.min_delta = _number("min_delta", min_delta, 0.0, "0 or more")
        self.divergence = _number("divergence", divergence, 1.0, "1 or more")
        self.patience = check_int("patience", patience, 1)
        self.recovery = check_int("recovery", recovery, 1)
        self._best: float | None = None
        self._guard: float | None = None  # at the last look that was no divergence
        self._before: float | None = None  # the guard before the last reduction
        self._stale, self._worse = 0, 0

    def state_dict(self) -> dict[str, Any]:
        """Return builtins."""
        return {"values": [self._best, self._guard, self._before], "counts": [self._stale, self._worse]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        self._best, self._guard, self._before = state["values"]
        self._stale, self._worse = state["counts"]

    def begin(self, *, reduced: bool) -> None:
        """Begin anew: after a reduction what the guard was then is what it is compared with."""
        self._before = self._guard if reduced else None
        self._best, self._stale, self._worse = None, 0, 0

    def look(self, value: float, guard: float, *, at_the_end: bool = False) -> Found:
        """Return what a new value of the metric and of the guard say.

        Args:
            value: of the metric.
            guard: of the guard.
            at_the_end: there is no time to recover.
        """
        if math.isnan(value) or not math.isfinite(guard):
            return "diverged"
        if self._before is not None and self._is_worse(guard, self._before):
            self._worse += 1
            return "diverged" if at_the_end or self._worse >= self.recovery else ""
        self._worse, self._guard = 0, guard
        sign = 1.0 if self.rising else -1.0
        if self._best is None or sign * (value - self._best) > self.min_delta * abs(self._best):
            self._best, self._stale = value, 0
            return ""
        self._stale += 1
        return "flat" if self._stale >= self.patience else ""

    def _is_worse(self, guard: float, before: float) -> bool:
        if self.mode == "min":
            return guard - before > (self.divergence - 1.0) * abs(before)
        return before - guard > (1.0 - 1.0 / self.divergence) * abs(before)


def _number(field_name: str, value: Any, lowest: float, allowed: str) -> float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value < lowest:
        raise ValueError(f"{field_name}={value!r} is not allowed; use a finite number of {allowed}")
    return float(value)

"""What a quantizer looks at of its inputs in calibration: so many samples, and of these what is no padding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass
class CalibrationSamples:
    """Counts the samples of a calibration.

    Args:
        most: samples that may be looked at, which lie along dimension 0; None is all.
        seen: how many were.
        rows: returns which rows of an input count, bool in the shape of its leading dimensions, or None where all do.
    """

    most: int | None
    seen: int = 0
    rows: Callable[[Tensor], Tensor | None] | None = None

    def of(self, x: Tensor) -> Tensor:
        """Return what of ``x`` may be looked at; ``x`` itself where that is all of it."""
        if not x.dim():
            return x
        kept = x
        if self.most is not None:
            kept = x[: max(self.most - self.seen, 0)]
            self.seen += len(kept)
        rows = None if self.rows is None else self.rows(x)
        return kept if rows is None else kept[rows[: len(kept)]]

"""What post-training quantization did to each layer, and who is told while it runs."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from lightning_qat.ptq.preflight import LayerTask

#: Where a quantized model keeps its report.
_REPORT = "_ptq_report"


@dataclass(frozen=True)
class LayerOutcome:
    """How one layer came out.

    Args:
        name: of the layer.
        method: what chose its codes, such as ``"gptq"``.
        bits: of a code.
        weights: how many.
        loss: squared error of its outputs, summed over calibration: ``tr((W - Q) G (W - Q)^T)``; None where its inputs
            were not looked at.
        nearest_loss: the same of round to nearest.
        damping: share of the mean diagonal that was added to the Gram matrix; 0 where nothing was solved.
        notes: dead columns, a rescue, a fallback, each with its reason.
        seconds: that choosing the codes took, statistics not included.
        memory: most bytes that the process has used so far; None where the system does not say.
    """

    name: str
    method: str
    bits: int
    weights: int
    loss: float | None = None
    nearest_loss: float | None = None
    damping: float = 0.0
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    memory: int | None = None

    @property
    def relative_loss(self) -> float | None:
        """Loss as a share of round to nearest's; None where unknown."""
        if self.loss is None or self.nearest_loss is None:
            return None
        return self.loss / self.nearest_loss if self.nearest_loss > 0 else 1.0

    def row(self) -> dict[str, Any]:
        """Return the outcome as builtins."""
        return {**asdict(self), "notes": list(self.notes)}


@dataclass(frozen=True)
class PTQReport:
    """What was done to a model.

    Args:
        method: that was asked for.
        order: in which layers were quantized: ``"sublayers"``, ``"blocks"`` or ``"one_pass"``; None without statistics.
        layers: outcome of each layer, in the order they were quantized.
        notes: on the run as a whole.
        seconds: in all.
    """

    method: str
    order: str | None
    layers: tuple[LayerOutcome, ...]
    notes: tuple[str, ...] = ()
    seconds: float = 0.0

    def layer(self, name: str) -> LayerOutcome:
        """Return the outcome of one layer; raise ``KeyError`` where it was not quantized."""
        for outcome in self.layers:
            if outcome.name == name:
                return outcome
        raise KeyError(name)

    def rows(self) -> list[dict[str, Any]]:
        """Return a dict of builtins for each layer."""
        return [outcome.row() for outcome in self.layers]


def attach_ptq_report(model: nn.Module, report: PTQReport) -> None:
    """Let ``report`` stay with ``model``."""
    model.__dict__[_REPORT] = report


def ptq_report(model: nn.Module) -> PTQReport | None:
    """Return how :func:`quantize_model` made ``model``, or None for any other one."""
    return model.__dict__.get(_REPORT)


class PTQObserver:
    """Is told how quantization goes on; does nothing. Recipes draw a table, others write a log."""

    def started(self, tasks: Sequence[LayerTask]) -> None:
        """See what will be done, before anything is."""

    def stage_started(self, name: str, index: int, stages: int) -> None:
        """See that a block, or what is outside of blocks, begins."""

    def layer_done(self, outcome: LayerOutcome) -> None:
        """See how a layer came out."""

    def stage_restored(self, name: str, outcomes: Sequence[LayerOutcome]) -> None:
        """See that a block was read back from an interrupted run."""

    def finished(self, report: PTQReport) -> None:
        """See the whole."""


def most_memory() -> int | None:
    """Return the most bytes that this process has used so far, or None where the system does not say."""
    with contextlib.suppress(ImportError):
        import resource

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return int(most) * (1 if sys.platform == "darwin" else 1024)
    return None


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def seconds(self) -> float:
        """Return them."""
        return time.perf_counter() - self._start

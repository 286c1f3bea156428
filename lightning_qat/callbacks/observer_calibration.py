"""Activation ranges from training batches, before the first step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from lightning_qat.callbacks.base import QuantizationCallback
from lightning_qat.callbacks.schedule import Schedule
from lightning_qat.config import check_int


class ObserverCalibration(QuantizationCallback):
    """Observe activation ranges on the Trainer's own training batches before the first optimizer step.

    The module's ``training_step`` runs without gradients and in evaluation mode; logs, metrics, the
    random state, optimizers and BatchNorm statistics are left as they were. Skipped on resume.

    Args:
        batches: how many.
        forward: called as ``forward(module, batch)`` instead of ``training_step``.
    """

    def __init__(self, batches: int = 8, *, forward: Callable[[nn.Module, Any], Any] | None = None) -> None:
        super().__init__()
        self.batches = check_int("batches", batches, 1)
        self.forward = forward

    def contribute(self, schedule: Schedule) -> Schedule:
        return replace(schedule, calibration_batches=self.batches)

    def calibration_forward(self) -> Any:
        return self.forward

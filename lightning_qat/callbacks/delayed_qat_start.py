"""Float training first."""

from __future__ import annotations

from dataclasses import replace

from lightning_qat.callbacks.base import QuantizationCallback
from lightning_qat.callbacks.schedule import Schedule
from lightning_qat.config import Step, check_step


class DelayedQATStart(QuantizationCallback):
    """Train in float until ``step``, observing ranges, and fake-quantized from there on.

    Args:
        step: an optimizer step, a fraction of the run or epochs.
    """

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.step = check_step("step", step)

    def contribute(self, schedule: Schedule) -> Schedule:
        return replace(schedule, start=self.step)

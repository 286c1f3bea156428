"""Scales and statistics that stand still."""

from __future__ import annotations

from dataclasses import replace

from lightning_qat.callbacks.base import QuantizationCallback
from lightning_qat.callbacks.schedule import Schedule
from lightning_qat.config import Step, check_step


class FreezeQuantization(QuantizationCallback):
    """Let scales and/or BatchNorm statistics stand still from ``step`` on.

    Args:
        step: an optimizer step, a fraction of the run or epochs.
        scales: freeze the scales and observers of weights and activations.
        batch_norm: freeze the running statistics of every BatchNorm, which then normalizes with them.
    """

    def __init__(self, step: Step, *, scales: bool = True, batch_norm: bool = True) -> None:
        super().__init__()
        self.step = check_step("step", step)
        if not (scales or batch_norm):
            raise ValueError("scales=False with batch_norm=False freezes nothing; set one of them")
        self.scales = scales
        self.batch_norm = batch_norm

    def contribute(self, schedule: Schedule) -> Schedule:
        if self.scales:
            schedule = replace(schedule, freeze_scales=self.step)
        return replace(schedule, freeze_norm=self.step) if self.batch_norm else schedule

"""BatchNorm folded on conversion."""

from __future__ import annotations

from dataclasses import replace

from lightning_qat.callbacks.base import QuantizationCallback
from lightning_qat.callbacks.schedule import Schedule
from lightning_qat.config import Step, check_step


class BatchNormFolding(QuantizationCallback):
    """Decide which BatchNorm is folded into the layer before it, and freeze its statistics.

    Which BatchNorm directly follows a layer is seen on the first training batch. While training the
    fold costs nothing: ``round(w f / s) = round(w / (s / f))``, so the scale absorbs it; conversion
    carries the fake quantizer's codes over.

    Args:
        enabled: False leaves every BatchNorm in place.
        freeze_step: from here on BatchNorm statistics stand still; None leaves that to others.
    """

    def __init__(self, enabled: bool = True, *, freeze_step: Step | None = None) -> None:
        super().__init__()
        self.enabled = enabled
        self.freeze_step = None if freeze_step is None else check_step("freeze_step", freeze_step)

    def contribute(self, schedule: Schedule) -> Schedule:
        schedule = replace(schedule, fold_norm=self.enabled)
        return schedule if self.freeze_step is None else replace(schedule, freeze_norm=self.freeze_step)

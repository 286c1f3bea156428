"""What the quantization callbacks of a Trainer make of its run, for callbacks that only want to know."""

from __future__ import annotations

import lightning.pytorch as pl

from lightning_qat.callbacks.base import QuantizationCallback
from lightning_qat.callbacks.schedule import Schedule


def active_schedule(trainer: pl.Trainer) -> Schedule | None:
    """Return the schedule that the quantization callbacks of ``trainer`` make together, in optimizer steps.

    ``active_schedule(trainer).phase(trainer.global_step)`` says what the model does now. None before training has
    started, when fractions and epochs are not resolved yet.

    Raises:
        ValueError: ``trainer`` has no quantization callback.
    """
    callbacks = [c for c in trainer.callbacks if isinstance(c, QuantizationCallback)]  # type: ignore[attr-defined]
    if not callbacks:
        raise ValueError(
            "this Trainer has no quantization callback; add one, such as QuantizationAwareTraining('int8'), to "
            "Trainer(callbacks=[...])"
        )
    return callbacks[0]._schedule

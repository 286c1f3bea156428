"""How many optimizer steps a run and its epochs have."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl

from lightning_qat.callbacks.both_lightnings import in_both


def run_length(trainer: pl.Trainer, max_epochs: int | None) -> tuple[float, Callable[[float], float]]:
    """Return the steps of the run, and the steps that a number of epochs has, in the unit of ``trainer.global_step``.

    Infinite where it is not known. Under manual optimization ``global_step`` counts every optimizer; each is taken
    to step once a batch.

    Args:
        trainer: with its training loader.
        max_epochs: of the run, as the user gave it; :class:`StochasticWeightAveraging` adds one without steps.
    """
    steps_in = _steps_in_epoch(trainer)

    def steps_after(epochs: float) -> float:
        whole = math.floor(epochs)
        part = (epochs - whole) * steps_in(whole) if epochs > whole else 0.0
        return float(sum(steps_in(epoch) for epoch in range(whole))) + part

    endless = max_epochs is None or max_epochs < 0
    steps = math.inf if endless else steps_after(float(max_epochs))  # type: ignore[arg-type]
    return min(steps, trainer.max_steps) if trainer.max_steps >= 0 else steps, steps_after


def _steps_in_epoch(trainer: pl.Trainer) -> Callable[[int], float]:
    batches = float(trainer.num_training_batches)
    if not math.isfinite(batches):
        return lambda epoch: batches
    if not trainer.lightning_module.automatic_optimization:
        return lambda epoch: batches * max(len(trainer.optimizers), 1)
    schedulers: list[Any] = [
        callback
        for callback in trainer.callbacks  # type: ignore[attr-defined]
        if isinstance(callback, in_both("callbacks.GradientAccumulationScheduler"))
    ]
    if schedulers:
        return lambda epoch: math.ceil(batches / schedulers[0].get_accumulate_grad_batches(epoch))
    return lambda epoch: math.ceil(batches / trainer.accumulate_grad_batches)

"""Fewer bits layer by layer, those first that lose least, on a schedule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_qat.callbacks.run_length import run_length
from lightning_qat.callbacks.schedule import resolve_step, when
from lightning_qat.callbacks.staged_bits import StagedBitReduction
from lightning_qat.config import Step, check_step


class SensitivityBitReduction(StagedBitReduction):
    """Reduce bits a few layers at a time, those first that lose least, spread evenly over a part of the run.

    When the first layers of a level are due, each layer alone gets the fewer bits, and what that does to the module's
    output on the training batch at hand decides the order of the level (one forward pass for each layer). All layers
    are at 6 bits before the first goes to 4. Scales are derived again where bits change, learned ones too.

    Args:
        bits: from the most to the fewest, such as ``[8, 4]``; all layers have the first from the start of the run.
        start_step: when the first layers are reduced; a step, a fraction of the run or epochs.
        end_step: when the last ones are.
        layers_at_once: how many are reduced together.
        weights: change the weights.
        activations: change the activations too.
        match: glob on layer names; layers that a plan gives bits of their own are left out so.

    Raises:
        ValueError: for settings that are not allowed; on fit where no layer matches, or one has a format whose bits
            do not change; in training where ``end_step`` comes before ``start_step``.
    """

    def __init__(
        self,
        bits: Sequence[int],
        *,
        start_step: Step = 0.1,
        end_step: Step = 0.7,
        layers_at_once: int = 1,
        weights: bool = True,
        activations: bool = False,
        match: str = "*",
    ) -> None:
        super().__init__(bits, layers_at_once=layers_at_once, weights=weights, activations=activations, match=match)
        self.start_step = check_step("start_step", start_step)
        self.end_step = check_step("end_step", end_step)
        self._span: tuple[int, int] | None = None

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "span": None if self._span is None else list(self._span)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        span = state_dict["span"]
        self._span = None if span is None else (span[0], span[1])

    def _begin_anew(self) -> None:
        super()._begin_anew()
        self._span = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self._span is not None:
            return
        length = run_length(trainer, self._run_epochs(trainer))
        first, last = (resolve_step(n, getattr(self, n), *length) for n in ("start_step", "end_step"))
        if last < first:
            raise ValueError(
                f"end_step={self.end_step!r} is step {last} of this run, before start_step={self.start_step!r}, which "
                f"is step {first}"
            )
        ends = last if self.last_stage > 1 else first
        if ends >= length[0] > 0:
            rank_zero_warn(
                f"SensitivityBitReduction: the last layers are due at step {ends}, and the run has {length[0]:.0f}; "
                "they keep more bits than the fewest"
            )
        self._span = (first, last)

    def due_stage(self, step: int) -> int:
        """Return the stage that is due at optimizer step ``step``."""
        if self._span is None:
            return 0
        (first, last), reductions = self._span, self.last_stage
        between = max(reductions - 1, 1)
        return sum(step >= first + round((last - first) * i / between) for i in range(reductions))

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        due = self.due_stage(trainer.global_step)
        if due > self.stage:
            self._reduce(trainer, pl_module, batch, batch_idx, due)

    def remarks(self) -> list[tuple[str, str]]:
        first, last = self._span or (self.start_step, self.end_step)
        return [(f"{when(first)} to {when(last)}", self._what())]

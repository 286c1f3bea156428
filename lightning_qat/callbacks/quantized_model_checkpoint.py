"""Checkpoints of which "best" is a quantized one."""

from __future__ import annotations

from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_qat.callbacks.active_schedule import active_schedule
from lightning_qat.callbacks.base import QuantizationCallback
from lightning_qat.callbacks.both_lightnings import serve_both


class QuantizedModelCheckpoint(ModelCheckpoint):
    """Lightning's ``ModelCheckpoint``, for which only checkpoints of the quantized phase can be the best.

    A float model is mostly the better one by its metric, and not the one that ships. So a checkpoint enters
    ``best_k_models`` and ``best_model_path`` only where the schedule quantizes at its global step and, with
    ``monitor``, the metric was measured there as well: one from a validation of the float phase counts no more than
    a checkpoint of it. With ``save_last``, ``last.ckpt`` is written in the float phase too, on the same occasions.

    Where the monitored metric is the mean over a training epoch, the epoch in which quantization starts counts as
    a whole.

    Args:
        *args: of ``ModelCheckpoint``.
        final_bits_only: count only checkpoints with the bits that the run ends with, see ``ProgressiveBitReduction``.
        **kwargs: of ``ModelCheckpoint``: ``monitor``, ``mode``, ``save_top_k``, ``every_n_train_steps``, ...

    Raises:
        ValueError: on fit, when the Trainer has no quantization callback.
    """

    def __init__(self, *args: Any, final_bits_only: bool = True, **kwargs: Any) -> None:
        serve_both(QuantizedModelCheckpoint, "Checkpoint")
        super().__init__(*args, **kwargs)
        self.final_bits_only = bool(final_bits_only)
        #: The monitored value of a validation that does not count; held, so that its memory stays its own.
        self._uncounted: torch.Tensor | None = None

    @property
    def state_key(self) -> str:
        return f"{super().state_key}{{'final_bits_only': {self.final_bits_only}}}"

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            try:
                active_schedule(trainer)
            except ValueError as error:
                raise ValueError(
                    f"QuantizedModelCheckpoint counts checkpoints of the quantized phase only, and {error}; or use "
                    "ModelCheckpoint"
                ) from None
            self._uncounted = None
        super().setup(trainer, pl_module, stage)

    def counts(self, trainer: pl.Trainer) -> bool:
        """Return whether a checkpoint written now may be the best."""
        schedule = active_schedule(trainer)
        if schedule is None or not schedule.phase(trainer.global_step).quantizing:
            return False
        if not self.final_bits_only:
            return True
        peers = [c for c in trainer.callbacks if isinstance(c, QuantizationCallback)]  # type: ignore[attr-defined]
        return schedule.has_final_bits(trainer.global_step) and all(peer.has_final_bits() for peer in peers)

    def _is_uncounted(self, trainer: pl.Trainer) -> bool:
        """Return whether the monitored value is still the one of a validation that did not count."""
        value = None if self.monitor is None else trainer.callback_metrics.get(self.monitor)
        return value is not None and self._uncounted is not None and value.data_ptr() == self._uncounted.data_ptr()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking and self.monitor is not None:
            counted = self.counts(trainer)
            self._uncounted = None if counted else trainer.callback_metrics.get(self.monitor)
        super().on_validation_end(trainer, pl_module)

    def _monitor_candidates(self, trainer: pl.Trainer) -> dict[str, torch.Tensor]:
        found = super()._monitor_candidates(trainer)
        if self._is_uncounted(trainer) and self.counts(trainer):
            # As if it were not there yet: ModelCheckpoint then waits for the validation that measures it.
            del found[str(self.monitor)]
        return found

    def _save_topk_checkpoint(self, trainer: pl.Trainer, monitor_candidates: dict[str, torch.Tensor]) -> None:
        if self.counts(trainer) and not self._is_uncounted(trainer):
            super()._save_topk_checkpoint(trainer, monitor_candidates)
        elif self.save_last:
            # At an epoch's end ModelCheckpoint writes last.ckpt only where it has just saved at this step.
            self._last_global_step_saved = trainer.global_step

    def _save_last_checkpoint(self, trainer: pl.Trainer, monitor_candidates: dict[str, torch.Tensor]) -> None:
        wanted: bool | Literal["link"] | None = self.save_last
        if wanted == "link" and self._last_checkpoint_saved == self.last_model_path:
            self.save_last = True  # nothing else was saved that a link could lead to
        try:
            super()._save_last_checkpoint(trainer, monitor_candidates)
        finally:
            self.save_last = wanted

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        if self.save_top_k and not self.best_model_path and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            phase = "none with the final bits" if self._quantizes(trainer) else "none of the quantized phase"
            rank_zero_warn(
                f"QuantizedModelCheckpoint has no best checkpoint: {phase} was due until step {trainer.global_step}. "
                "Let the run be longer, quantization start earlier, or checkpoints be saved more often"
            )

    @staticmethod
    def _quantizes(trainer: pl.Trainer) -> bool:
        schedule = active_schedule(trainer)
        return schedule is not None and schedule.phase(trainer.global_step).quantizing


serve_both(QuantizedModelCheckpoint, "Checkpoint")  # LightningCLI looks at the class before there is an instance

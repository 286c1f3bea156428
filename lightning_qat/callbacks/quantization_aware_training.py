"""The whole of quantization-aware training as one callback."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
from torch.optim import Optimizer

from lightning_qat.callbacks.base import QuantizationCallback
from lightning_qat.callbacks.learned_scales import LearnedScales
from lightning_qat.callbacks.parity_gate import certify_run
from lightning_qat.callbacks.schedule import Schedule
from lightning_qat.config import PlanLike, QATConfig, Step, check_int, check_step, resolve_plan
from lightning_qat.transforms.certificate import ParityError, ParityReport
from lightning_qat.transforms.param_groups import learned_scales

#: Enough to see every layer compute; the gate compares sums, so more say little more.
_CERTIFIED_BATCHES = 2


class QuantizationAwareTraining(QuantizationCallback):
    """Train an unchanged LightningModule with fake quantization.

    It is calibration, a delayed start, freezing and BatchNorm folding in the right order, and :class:`LearnedScales`
    where the plan has some; the callbacks of those names, in the same Trainer, win for their own aspect.

    Args:
        config: a :class:`QATConfig`, a preset's name (``"int8"``), a :class:`QuantizationConfig`
            (weight-only) or a :class:`QuantizationPlan`.
        plan: which layers get what, instead of ``config`` for every layer.
        start_step: from here on the forward is fake-quantized; overrides the config's.
        freeze_step: from here on scales and BatchNorm statistics stand still; overrides the config's.
        calibration_batches: training batches to observe before the first step.
        certify: after fit, convert a copy and compare it, layer by layer, with the model that trained, on two
            batches of the validation loader. What is found is logged (``parity/worst_layer_sqnr``,
            ``parity/output_sqnr``) and kept in the attribute ``certificate``, a :class:`ParityReport`; a
            failure is a warning that names the first layer that diverges, or with ``"raise"`` an error, once
            everything of the run is saved. The model stays as it is; converted and saved as it is then, it has that
            report as its certificate.

    Steps are optimizer steps (``1000``), fractions of the run (``0.3``) or epochs (``"3 epochs"``).

    Raises:
        ValueError: for settings that are not allowed.
        ParityError: at the end of fit, with ``certify="raise"``.
    """

    specificity: ClassVar[int] = 0

    def __init__(
        self,
        config: PlanLike = "int8",
        plan: PlanLike | None = None,
        *,
        start_step: Step | None = None,
        freeze_step: Step | None = None,
        calibration_batches: int = 8,
        certify: bool | Literal["raise"] = True,
    ) -> None:
        super().__init__()
        if certify not in (True, False, "raise"):
            raise ValueError(f"certify={certify!r} is not allowed; use True, False or 'raise'")
        self.certify = certify
        self.certificate: ParityReport | None = None
        self._plan = resolve_plan(config if plan is None else plan)
        base = self._plan.base if self._plan.base is not None else resolve_plan(config).base
        self.config = base if isinstance(base, QATConfig) else QATConfig()
        self.start_step = check_step("start_step", self.config.start_step if start_step is None else start_step)
        chosen = self.config.freeze_step if freeze_step is None else freeze_step
        self.freeze_step = None if chosen is None else check_step("freeze_step", chosen)
        self.calibration_batches = check_int("calibration_batches", calibration_batches, 0)
        self._learned: LearnedScales | None = None

    def plan(self) -> PlanLike:
        return self._plan

    def contribute(self, schedule: Schedule) -> Schedule:
        return replace(
            schedule,
            start=self.start_step,
            freeze_scales=self.freeze_step,
            freeze_norm=self.freeze_step,
            calibration_batches=self.calibration_batches,
            fold_norm=self.config.fold_batchnorm,
        )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        given = any(isinstance(callback, LearnedScales) for callback in trainer.callbacks)  # type: ignore[attr-defined]
        self._learned = LearnedScales() if learned_scales(pl_module) and not given else None
        if self._learned is not None:
            self._learned.on_fit_start(trainer, pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self._learned is not None:
            self._learned.on_train_start(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self._learned is not None:
            self._learned.on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        if self._learned is not None:
            self._learned.on_before_optimizer_step(trainer, pl_module, optimizer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._learned is not None:
            self._learned.on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        if self._learned is not None:
            self._learned.on_train_epoch_end(trainer, pl_module)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._learned is not None:
            self._learned.on_save_checkpoint(trainer, pl_module, checkpoint)
        super().on_save_checkpoint(trainer, pl_module, checkpoint)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._learned is not None:
            self._learned.on_train_end(trainer, pl_module)
        super().on_train_end(trainer, pl_module)
        # Here and not in ``on_fit_end``: the model is still on its device.
        self.certificate = certify_run(trainer, pl_module, _CERTIFIED_BATCHES) if self.certify else None

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_end(trainer, pl_module)
        if self.certify == "raise" and self.certificate is not None and not self.certificate.passed:
            raise ParityError(self.certificate)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if self._learned is not None:
            self._learned.on_exception(trainer, pl_module, exception)
        super().on_exception(trainer, pl_module, exception)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self._learned is not None:
            self._learned.teardown(trainer, pl_module, stage)
        super().teardown(trainer, pl_module, stage)

"""What all quantization callbacks share: together in one Trainer they form one schedule.

The first of them in ``trainer.callbacks`` leads: it prepares the model and applies the phase. The
others only contribute to the schedule, so that their order in the list does not matter. The phase is
applied again at every hook where it may have changed (level-triggered), never on reaching a step:
that is what survives a resume.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from dataclasses import replace
from typing import Any, ClassVar

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from lightning_qat.callbacks.averaged_weights import (
    averaged_for_good,
    averages_weights,
    copy_prepared,
    keep_quantizers,
    put_averaging_first,
    save_quantizers,
)
from lightning_qat.callbacks.both_lightnings import serve_both
from lightning_qat.callbacks.calibration_run import run_calibration
from lightning_qat.callbacks.module_hooks import check_before_loading, prepare_after_configure_model, restore_hook
from lightning_qat.callbacks.run_length import run_length
from lightning_qat.callbacks.schedule import Schedule
from lightning_qat.callbacks.unsharded_scales import average_unsharded
from lightning_qat.config import PlanLike, epochs_of
from lightning_qat.nn import QuantizedLayer
from lightning_qat.ops.workspace import release_workspace
from lightning_qat.transforms.float_checkpoint import CHECKPOINT_KEY
from lightning_qat.transforms.fuse import decide_no_folding, undecided_layers
from lightning_qat.transforms.phase import (
    Phase,
    apply_phase,
    float_forward,
    follow_weights,
    keep_quantized_weights,
    restore_bits,
)
from lightning_qat.transforms.prepare import prepared_plan
from lightning_qat.transforms.ranges import defer_ranges, static_quantizers, update_ranges

logger = logging.getLogger(__name__)


class QuantizationCallback(pl.Callback):
    """One contribution to the quantization schedule of a Trainer."""

    #: Contributions are made in this order: a more specific callback comes later and wins.
    specificity: ClassVar[int] = 1

    def __init__(self) -> None:
        serve_both(QuantizationCallback)
        self._max_epochs: int | None = None  # as the user gave it
        self._schedule: Schedule | None = None  # of the run, resolved; held by the leader
        self._loaders_resume = True
        self._float = contextlib.ExitStack()  # what an evaluation in float has to put back
        self._frozen_norms: list[nn.Module] = []

    def contribute(self, schedule: Schedule) -> Schedule:
        """Return ``schedule`` with this callback's own aspect set."""
        return schedule

    def refine(self, phase: Phase) -> Phase:
        """Return ``phase`` with what this callback decided while the run went on, a function of its saved state."""
        return phase

    def remarks(self) -> list[tuple[str, str]]:
        """Return ``(when, what)`` of what this does besides, for :meth:`explain`."""
        return []

    def can_roll_back(self) -> bool:
        """Return whether this callback has weights to go back to where they broke."""
        return False

    def has_final_bits(self) -> bool:
        """Return whether :meth:`refine` will change no bits any more."""
        return True

    def plan(self) -> PlanLike | None:
        """Return the plan that this callback asks for, or None."""
        return None

    def calibration_forward(self) -> Any:
        """Return how calibration runs a batch, or None for the module's ``training_step``."""
        return None

    def _peers(self, trainer: pl.Trainer) -> list[QuantizationCallback]:
        peers = [c for c in trainer.callbacks if isinstance(c, QuantizationCallback)]  # type: ignore[attr-defined]
        return sorted(peers, key=lambda peer: peer.specificity)

    def _leads(self, trainer: pl.Trainer) -> bool:
        first = next(c for c in trainer.callbacks if isinstance(c, QuantizationCallback))  # type: ignore[attr-defined]
        return first is self

    def _combined(self, peers: list[QuantizationCallback]) -> Schedule:
        schedule = Schedule()
        for peer in peers:
            schedule = peer.contribute(schedule)
        return schedule

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if not self._leads(trainer):
            return
        plans = [plan for plan in (peer.plan() for peer in self._peers(trainer)) if plan is not None]
        if len(plans) > 1:
            raise ValueError("more than one QuantizationAwareTraining in one Trainer; use one, with a QuantizationPlan")
        if any(isinstance(module, QuantizedLayer) for module in pl_module.modules()):
            if stage == "fit":
                raise ValueError(
                    f"{type(pl_module).__name__} is converted and cannot train; fit the model it came from"
                )
            check_before_loading(pl_module, lambda _: _refuse_checkpoint(pl_module))
            return  # a converted model is evaluated as it is
        if stage == "fit" and trainer.global_step == 0:
            self._schedule = None  # a new run; one that goes on keeps its schedule
        self._max_epochs = trainer.max_epochs
        put_averaging_first(trainer, self)
        prepared = functools.partial(self._prepared, trainer, pl_module, stage)
        prepare_after_configure_model(pl_module, plans[0] if plans else None, prepared)
        check_before_loading(pl_module, lambda checkpoint: _check_plan(pl_module, checkpoint))

    def _prepared(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit" and self._schedule is None:
            # Others take steps before training starts: LearningRateFinder, BatchSizeFinder.
            start = self._combined(self._peers(trainer)).start
            apply_phase(pl_module, Phase(quantizing=(start if epochs_of(start) is None else epochs_of(start)) == 0))
        copy_prepared(trainer, pl_module, stage)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        restore_hook(pl_module, "on_load_checkpoint")  # there was nothing to load

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        restore_hook(pl_module, "on_load_checkpoint")
        release_workspace()

    def _asked(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """Return what the callbacks of ``trainer`` ask for, in builtins."""
        schedule = self._combined(self._peers(trainer))
        return {"plan": repr(prepared_plan(pl_module)), "schedule": schedule.state_dict()}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if not self._leads(trainer) or trainer.state.fn != "fit":
            return
        if CHECKPOINT_KEY not in checkpoint:
            self._schedule = None  # of a float run, or saved before calibration: quantization begins now
            return
        _check_plan(pl_module, checkpoint)  # sharded strategies load too late to be checked before it
        saved = checkpoint[CHECKPOINT_KEY]
        if saved["asked"] != self._asked(trainer, pl_module):
            rank_zero_warn(
                "the quantization callbacks differ from those of the checkpoint; the run goes on with the "
                "checkpoint's schedule, as its steps were resolved when it began"
            )
        self._schedule = Schedule.from_state_dict(saved["schedule"])

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._leads(trainer) and self._schedule is not None:
            state = {"version": 1, "schedule": self._schedule.state_dict(), "asked": self._asked(trainer, pl_module)}
            checkpoint[CHECKPOINT_KEY] = state
        if self._leads(trainer):
            save_quantizers(trainer, pl_module, checkpoint)

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # A resumed run has its phase. Before calibration there are no ranges to quantize with.
        self._apply(trainer, pl_module)
        if self._schedule is None and self._leads(trainer):
            self._float.enter_context(float_forward(pl_module))

    def on_sanity_check_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._float.close()
        self._release_norms()  # Lightning warns of modules that start training in evaluation mode

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._leads(trainer):
            return
        defer_ranges(pl_module, True)
        self._update_ranges(trainer, pl_module)  # of a checkpoint written in the middle of a batch
        if self._schedule is None:
            self._begin(trainer, pl_module)
        self._loaders_resume = _loaders_resume(trainer)
        rank_zero_info(self.explain(trainer))
        self._apply(trainer, pl_module)
        keep_quantizers(trainer, pl_module)

    def _begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Resolve the schedule and calibrate, once in the life of a run: a resumed one has both."""
        peers = self._peers(trainer)
        schedule = self._combined(peers)
        length = run_length(trainer, self._max_epochs)
        resolved = schedule.resolve(*length)
        for late in resolved.beyond(length[0]):
            rank_zero_warn(late)
        if resolved.freeze_scales == 0 and not schedule.calibration_batches:
            schedule = replace(schedule, calibration_batches=8)  # ranges that never move have to come from somewhere
        if not schedule.fold_norm or not any(isinstance(m, _BatchNorm) for m in pl_module.modules()):
            decide_no_folding(pl_module)
        # An earlier fit of this module may have left it at fewer bits than this schedule begins with.
        weights, activations = bool(resolved.weight_bits), bool(resolved.activation_bits)
        restore_bits(pl_module, resolved.bits_match, weights=weights, activations=activations)
        forward = next((f for f in (peer.calibration_forward() for peer in reversed(peers)) if f is not None), None)
        observe = schedule.calibration_batches > 0 and bool(static_quantizers(pl_module))
        if observe or undecided_layers(pl_module):
            batches = schedule.calibration_batches if observe else 1
            run_calibration(trainer, pl_module, batches, forward, observe=observe)
        self._schedule = resolved  # a checkpoint of a calibration that failed must not pass for a calibrated one

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._apply(trainer, pl_module)
        if pl_module.automatic_optimization and trainer.accumulate_grad_batches > 1:
            self._keep_weights(trainer, pl_module, True)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        self._keep_weights(trainer, pl_module, False)
        average_unsharded(pl_module, optimizer, leads=self._leads(trainer))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._update_ranges(trainer, pl_module)
        # A checkpoint written now, and an evaluation that follows, are of the step that is reached.
        self._apply(trainer, pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._apply(trainer, pl_module)
        elif not trainer.sanity_checking:
            self._evaluate_alone(trainer, pl_module)
        if self._leads(trainer):
            keep_quantizers(trainer, pl_module)  # WeightAveraging is about to put the average into the module
        self._keep_weights(trainer, pl_module, False)  # in the middle of accumulation they are of other weights

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._float.close()

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._evaluate_alone(trainer, pl_module)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._float.close()

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._evaluate_alone(trainer, pl_module)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._float.close()

    # Weights are kept from the first batch of an evaluation to its last: before and after it, averaging callbacks
    # put other weights into the module without PyTorch counting that.

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._keep_weights(trainer, pl_module, True)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._keep_weights(trainer, pl_module, False)

    def on_test_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._keep_weights(trainer, pl_module, True)

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._keep_weights(trainer, pl_module, False)

    def on_predict_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._keep_weights(trainer, pl_module, True)

    def on_predict_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._keep_weights(trainer, pl_module, False)

    def _apply(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._schedule is not None and self._leads(trainer):
            phase = self._schedule.phase(trainer.global_step)
            for peer in self._peers(trainer):
                phase = peer.refine(phase)
            averaged = averaged_for_good(trainer)
            if averaged:  # BatchNorm was reset and learns the statistics of the averaged weights
                phase = replace(phase, frozen_norm=False)
                self._release_norms()
            self._frozen_norms += apply_phase(pl_module, phase)
            if averaged:
                follow_weights(pl_module)

    def _update_ranges(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let what the batch showed, on all ranks, move the ranges for the next one."""
        if self._leads(trainer):
            update_ranges(pl_module, across_ranks=trainer.world_size > 1)

    def _keep_weights(self, trainer: pl.Trainer, pl_module: pl.LightningModule, keep: bool) -> None:
        """Fake-quantize each weight once between two optimizer steps, and once in an evaluation."""
        if self._leads(trainer):
            keep_quantized_weights(pl_module, keep)

    def _release_norms(self) -> None:
        """Put BatchNorm back into training mode: Lightning leaves modules as it finds them."""
        for norm in self._frozen_norms:
            norm.train()
        self._frozen_norms.clear()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._leads(trainer):
            keep_quantizers(trainer, pl_module)  # the last time before the average becomes the module

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._leads(trainer):
            defer_ranges(pl_module, False)
            if averages_weights(trainer):
                follow_weights(pl_module)
        self._release_norms()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._keep_weights(trainer, pl_module, False)
        restore_hook(pl_module, "on_load_checkpoint")
        defer_ranges(pl_module, False)
        self._float.close()
        self._release_norms()

    def _evaluate_alone(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Outside fit the restored state is the phase; a model without ranges is evaluated in float."""
        if not self._leads(trainer):
            return
        quantizers = static_quantizers(pl_module)
        if any(q.quantizing for q in quantizers) and not any(q.calibrated for q in quantizers):
            rank_zero_warn(
                "no layer has an observed range yet: evaluating in float; fit or load a QAT checkpoint first"
            )
            self._float.enter_context(float_forward(pl_module))

    def explain(self, trainer: pl.Trainer | None = None) -> str:
        """Return, as text, what will happen when.

        Args:
            trainer: to take the other quantization callbacks of its list into account, and to resolve
                fractions and epochs once training has started. None explains this callback alone.
        """
        peers = [self] if trainer is None else self._peers(trainer)
        leader = next((peer for peer in peers if peer._schedule is not None), None)
        schedule = (leader and leader._schedule) or self._combined(peers)
        others = [] if trainer is None else [c for c in trainer.callbacks if c not in peers and hasattr(c, "remarks")]  # type: ignore[attr-defined]
        rows = schedule.explain() + [row for each in (*peers, *others) for row in each.remarks()]
        width = max(len(when) for when, _ in rows)
        lines = ["Quantization schedule", *(f"  {when:<{width}}  {what}" for when, what in rows)]
        if schedule.fold_norm:
            lines.append("  on conversion BatchNorm that directly follows a layer (of integers) is folded into it")
        if leader is not None and not leader._loaders_resume:
            lines.append(
                "  the training loader has no state_dict: a run interrupted in mid-epoch starts that epoch's data "
                "anew; one interrupted at an epoch's end resumes exactly"
            )
        return "\n".join(lines)


serve_both(QuantizationCallback)  # LightningCLI looks at the class before there is an instance


def _refuse_checkpoint(module: nn.Module) -> None:
    raise ValueError(
        f"{type(module).__name__} is converted and holds its weights as integers, which a checkpoint does not have; "
        "leave ckpt_path out, or evaluate the model it came from"
    )


def _check_plan(module: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Raise if ``checkpoint`` was trained with another plan than ``module`` is prepared with."""
    if CHECKPOINT_KEY not in checkpoint:
        return
    saved, plan = checkpoint[CHECKPOINT_KEY]["asked"]["plan"], repr(prepared_plan(module))
    if saved != plan:
        raise ValueError(
            f"the checkpoint was trained with another plan ({saved}) than this Trainer has ({plan}); give it the same, "
            "or take the float weights alone: float_checkpoint(path, new_path)"
        )


def _loaders_resume(trainer: pl.Trainer) -> bool:
    combined = trainer.fit_loop._combined_loader  # whose truth is its length, which a stream does not have
    return combined is None or all(hasattr(loader, "load_state_dict") for loader in combined.flattened)

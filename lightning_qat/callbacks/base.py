"""What all quantization callbacks share: together in one Trainer they form one schedule.

The first of them in ``trainer.callbacks`` leads: it prepares the model and applies the phase. The
others only contribute to the schedule, so that their order in the list does not matter. The phase is
applied again at every hook where it may have changed (level-triggered), never on reaching a step:
that is what survives a resume.
"""

from __future__ import annotations

import contextlib
import logging
import math
from dataclasses import replace
from typing import Any, ClassVar

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_qat.callbacks.calibration_run import run_calibration
from lightning_qat.callbacks.schedule import Schedule
from lightning_qat.config import PlanLike
from lightning_qat.nn import QuantizedLayer
from lightning_qat.transforms.calibrate import static_quantizers
from lightning_qat.transforms.fuse import decide_no_folding, undecided_layers
from lightning_qat.transforms.phase import apply_phase, float_forward
from lightning_qat.transforms.prepare import prepare, prepared_plan

logger = logging.getLogger(__name__)

_CHECKPOINT_KEY = "lightning_qat"
#: Marks our ``configure_model`` and holds what it stands before.
_REPLACED = "_lightning_qat_replaced"


class QuantizationCallback(pl.Callback):
    """One contribution to the quantization schedule of a Trainer."""

    #: Contributions are made in this order: a more specific callback comes later and wins.
    specificity: ClassVar[int] = 1

    def __init__(self) -> None:
        self._schedule: Schedule | None = None  # of the run, resolved; held by the leader
        self._loaders_resume = True
        self._float = contextlib.ExitStack()  # what an evaluation in float has to put back
        self._frozen_norms: list[nn.Module] = []

    def contribute(self, schedule: Schedule) -> Schedule:
        """Return ``schedule`` with this callback's own aspect set."""
        return schedule

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
            return  # a converted model is evaluated as it is
        if stage == "fit" and trainer.global_step == 0:
            self._schedule = None  # a new run; one that goes on keeps its schedule
        _prepare_after_configure_model(pl_module, plans[0] if plans else None)

    def _asked(self, trainer: pl.Trainer) -> dict[str, Any]:
        """Return what the callbacks of ``trainer`` ask for, in builtins."""
        peers = self._peers(trainer)
        plan = next((p for p in (peer.plan() for peer in peers) if p is not None), None)
        return {"plan": repr(plan), "schedule": self._combined(peers).state_dict()}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if not self._leads(trainer) or _CHECKPOINT_KEY not in checkpoint or trainer.state.fn != "fit":
            return
        saved, asked = checkpoint[_CHECKPOINT_KEY], self._asked(trainer)
        if saved["asked"]["plan"] != asked["plan"]:
            raise ValueError(
                f"the checkpoint was trained with another plan ({saved['asked']['plan']}) than this Trainer has "
                f"({asked['plan']}); resume with the same, or start a new run from the weights alone"
            )
        if saved["asked"] != asked:
            rank_zero_warn(
                "the quantization callbacks differ from those of the checkpoint; the run goes on with the "
                "checkpoint's schedule, as its steps were resolved when it began"
            )
        self._schedule = Schedule.from_state_dict(saved["schedule"])

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._leads(trainer) and self._schedule is not None:
            state = {"version": 1, "schedule": self._schedule.state_dict(), "asked": self._asked(trainer)}
            checkpoint[_CHECKPOINT_KEY] = state

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # A resumed run has its phase. Before calibration there are no ranges to quantize with.
        self._apply(trainer, pl_module)
        if self._schedule is None and self._leads(trainer):
            self._float.enter_context(float_forward(pl_module))

    def on_sanity_check_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._float.close()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._leads(trainer):
            return
        if self._schedule is None:
            self._begin(trainer, pl_module)
        self._loaders_resume = _loaders_resume(trainer)
        rank_zero_info(self.explain(trainer))
        self._apply(trainer, pl_module)

    def _begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Resolve the schedule and calibrate, once in the life of a run: a resumed one has both."""
        peers = self._peers(trainer)
        schedule = self._combined(peers)
        self._schedule = schedule.resolve(*_run_length(trainer))
        if self._schedule.freeze_scales == 0 and not schedule.calibration_batches:
            schedule = replace(schedule, calibration_batches=8)  # ranges that never move have to come from somewhere
        if not schedule.fold_norm or not any(isinstance(m, _BatchNorm) for m in pl_module.modules()):
            decide_no_folding(pl_module)
        forward = next((f for f in (peer.calibration_forward() for peer in reversed(peers)) if f is not None), None)
        observe = schedule.calibration_batches > 0 and bool(static_quantizers(pl_module))
        if observe or undecided_layers(pl_module):
            batches = schedule.calibration_batches if observe else 1
            run_calibration(trainer, pl_module, batches, forward, observe=observe)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._apply(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # A checkpoint written now, and an evaluation that follows, are of the step that is reached.
        self._apply(trainer, pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._apply(trainer, pl_module)
        elif not trainer.sanity_checking:
            self._evaluate_alone(trainer, pl_module)

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

    def _apply(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._schedule is not None and self._leads(trainer):
            phase = self._schedule.phase(trainer.global_step)
            self._frozen_norms += apply_phase(pl_module, phase)

    def _release_norms(self) -> None:
        """Put BatchNorm back into training mode: Lightning leaves modules as it finds them."""
        for norm in self._frozen_norms:
            norm.train()
        self._frozen_norms.clear()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._release_norms()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
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
        rows = schedule.explain()
        width = max(len(when) for when, _ in rows)
        lines = ["Quantization schedule", *(f"  {when:<{width}}  {what}" for when, what in rows)]
        if schedule.fold_norm:
            lines.append("  on conversion BatchNorm that directly follows a layer is folded into it")
        if leader is not None and not leader._loaders_resume:
            lines.append(
                "  the training loader has no state_dict: a run interrupted in mid-epoch starts that epoch's data "
                "anew; one interrupted at an epoch's end resumes exactly"
            )
        return "\n".join(lines)


def _prepare_after_configure_model(module: pl.LightningModule, plan: PlanLike | None) -> None:
    """Prepare ``module`` when Lightning calls its ``configure_model``.

    Layers may be built in the module's own ``setup`` or ``configure_model``, which run after the
    callbacks' ``setup``; no callback hook lies between them and ``configure_optimizers``. An attribute
    of the instance comes before the class's method and takes itself away again. It is no
    ``functools.wraps``, which Lightning would see through.
    """
    original = module.__dict__.get("configure_model")
    while hasattr(original, _REPLACED):  # left by a setup that failed
        original = getattr(original, _REPLACED)

    def configure_model() -> None:
        if original is None:
            del module.__dict__["configure_model"]
        else:
            module.__dict__["configure_model"] = original
        module.configure_model()
        if plan is not None or prepared_plan(module) is None:
            prepare(module, "int8" if plan is None else plan)

    setattr(configure_model, _REPLACED, original)
    module.__dict__["configure_model"] = configure_model


def _run_length(trainer: pl.Trainer) -> tuple[float, float]:
    """Return ``(steps of the run, steps of an epoch)`` in the unit of ``trainer.global_step``.

    Under manual optimization that counts every optimizer; each is taken to step once a batch.
    """
    per_epoch = float(trainer.num_training_batches)
    if trainer.lightning_module.automatic_optimization:
        if math.isfinite(per_epoch):
            per_epoch = math.ceil(per_epoch / trainer.accumulate_grad_batches)
        return float(trainer.estimated_stepping_batches), per_epoch
    optimizers = max(len(trainer.optimizers), 1)
    epochs = trainer.max_epochs if trainer.max_epochs is not None and trainer.max_epochs >= 0 else math.inf
    steps = trainer.max_steps if trainer.max_steps >= 0 else math.inf
    return min(float(steps), epochs * per_epoch * optimizers), per_epoch * optimizers


def _loaders_resume(trainer: pl.Trainer) -> bool:
    loaders = trainer.fit_loop._combined_loader.flattened if trainer.fit_loop._combined_loader else []
    return all(hasattr(loader, "load_state_dict") for loader in loaders)

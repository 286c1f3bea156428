"""Fewer bits when the training has settled at those that it has, and back again where it then diverges."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_qat.callbacks.active_schedule import active_schedule
from lightning_qat.callbacks.averaged_weights import averages_weights
from lightning_qat.callbacks.plateau import Plateau
from lightning_qat.callbacks.quantization_penalty import refuse_sharded
from lightning_qat.callbacks.roll_back import roll_back, take_snapshot
from lightning_qat.callbacks.staged_bits import StagedBitReduction
from lightning_qat.config import check_int, nearest_first
from lightning_qat.transforms.param_groups import learned_scales
from lightning_qat.transforms.penalty import quantization_penalty

#: The one thing that can be watched without being logged.
SQNR = "sqnr"


class PlateauBitReduction(StagedBitReduction):
    """Reduce bits when a metric has stopped getting better, and roll back a reduction after which training diverges.

    Every ``every_n_steps`` optimizer steps the mean of the metric since the last look, over all ranks, is compared
    with the best at the present bits. Without an improvement in ``patience`` looks, the next reduction comes before
    the next batch. Weights, buffers, quantizers and the optimizers' state are kept from just before it; if a weight or
    a learned scale (looked at after every step) or the metric is then NaN or infinite, or the metric worse than before
    by more than ``divergence`` in ``recovery`` looks in a row, or at the end of the run, they are put back with the
    bits they had.
    Data and learning rates go on.

    What is kept is on the CPU and in every checkpoint until the next reduction, or until the last one has settled: the
    size of the weights and the optimizers' state once more. A resumed run decides as one that never stopped.

    Args:
        bits: from the most to the fewest, such as ``[8, 6, 4]``; all layers have the first from the start of the run.
        monitor: a metric that the module logs in every training step, or in validation with ``every_n_steps=None``; or
            ``"sqnr"``, the SQNR of the weights in dB, of the layers' mean noise.
        mode: ``"min"`` or ``"max"``: which way the logged metric gets better. SQNR does upwards.
        every_n_steps: optimizer steps between two looks; None looks after each validation.
        min_delta: what counts as better, as a share of the best value.
        patience: looks without an improvement until bits are reduced.
        guard: the metric that divergence is seen in; None is ``monitor``. Fewer bits have a lower SQNR in any case, so
            with ``monitor="sqnr"`` and no guard only NaN is a divergence.
        divergence: by what factor the guard may be worse than before the reduction: 2.0 lets a loss be twice, and a
            metric to be maximized half of what it was.
        recovery: looks in a row that it may be.
        retries: how often a reduction that was rolled back is tried again; then the run keeps the bits it has.
        layers_at_once: reduce so many at a time, those first that lose least, see :class:`SensitivityBitReduction`;
            None reduces all at once.
        weights: change the weights.
        activations: change the activations too.
        match: glob on layer names; layers that a plan gives bits of their own are left out so.

    Raises:
        ValueError: for settings that are not allowed; on fit where no layer matches, one has a format whose bits do not
            change, weights are sharded, or a callback averages weights, which no roll-back reaches; in training for
            a metric that is not there.
    """

    def __init__(
        self,
        bits: Sequence[int],
        monitor: str = "train/loss",
        *,
        mode: Literal["min", "max"] = "min",
        every_n_steps: int | None = 100,
        min_delta: float = 0.01,
        patience: int = 2,
        guard: str | None = None,
        divergence: float = 2.0,
        recovery: int = 3,
        retries: int = 1,
        layers_at_once: int | None = None,
        weights: bool = True,
        activations: bool = False,
        match: str = "*",
    ) -> None:
        super().__init__(bits, layers_at_once=layers_at_once, weights=weights, activations=activations, match=match)
        self.monitor, self.guard = _name("monitor", monitor), None if guard is None else _name("guard", guard)
        self.every_n_steps = None if every_n_steps is None else check_int("every_n_steps", every_n_steps, 1)
        self.retries = check_int("retries", retries, 0)
        self._rules: dict[str, Any] = {"mode": mode, "min_delta": min_delta, "patience": patience}
        self._rules |= {"divergence": divergence, "recovery": recovery, "rising": monitor == SQNR}
        self._begin_anew()

    def _begin_anew(self) -> None:
        super()._begin_anew()
        self._plateau = Plateau(**self._rules)
        self._sums: list[Tensor | float] = [0.0, 0.0]  # of the monitor and of the guard since the last look
        self._count, self._looked, self._due, self._broken = 0, 0, False, False
        self._snapshot: dict[str, Any] | None = None
        self._rolled_back, self._given_up = 0, False

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "plateau": self._plateau.state_dict(),
            "sums": [float(value) for value in self._sums],
            "seen": [self._count, self._looked, self._due, self._broken],
            "snapshot": self._snapshot,
            "rolled_back": [self._rolled_back, self._given_up],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._plateau.load_state_dict(state_dict["plateau"])
        self._sums = list(state_dict["sums"])
        self._count, self._looked, self._due, self._broken = state_dict["seen"]
        self._snapshot = state_dict["snapshot"]
        self._rolled_back, self._given_up = state_dict["rolled_back"]

    def can_roll_back(self) -> bool:
        return self._snapshot is not None

    def has_final_bits(self) -> bool:
        return self._given_up or super().has_final_bits()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        refuse_sharded(trainer, self)
        if averages_weights(trainer):
            raise ValueError(
                "PlateauBitReduction rolls weights back, and averages of them keep what diverged; leave the averaging "
                "callback out, or use ProgressiveBitReduction or SensitivityBitReduction"
            )
        super().on_train_start(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if not _quantizes(trainer, trainer.global_step - 1):
            self._looked = trainer.global_step
            return
        # Weights and scales are the same on all ranks.
        self._broken = self._snapshot is not None and not _is_sound(pl_module)
        if self.every_n_steps is not None:
            self._add(trainer)
            self._due = trainer.global_step - self._looked >= self.every_n_steps
        is_over = _is_over(trainer)
        # Before the next forward pass, also that of a validation: observers and learned scales refuse NaN.
        if self._broken or (is_over and self.every_n_steps is not None):
            self._look(trainer, pl_module, at_the_end=is_over)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        in_training = trainer.state.fn == "fit" and not trainer.sanity_checking
        if in_training and self.every_n_steps is None and _quantizes(trainer, trainer.global_step):
            self._add(trainer)
            self._due = True
            if _is_over(trainer):
                self._look(trainer, pl_module, at_the_end=True)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self._due and self._look(trainer, pl_module):
            self._plateau.begin(reduced=True)
            self._snapshot = {"stage": self.stage, **take_snapshot(trainer, pl_module)}
            self._reduce(trainer, pl_module, batch, batch_idx, self.stage + 1)
            rank_zero_info(f"PlateauBitReduction: {self.monitor} is flat at step {trainer.global_step}; fewer bits")

    def _add(self, trainer: pl.Trainer) -> None:
        """Add the metrics of now to those of this look, without waiting for the device."""
        for i, name in enumerate((self.monitor, self.guard)):
            if name is not None and name != SQNR:
                value = trainer.callback_metrics.get(name)
                if value is None:
                    known = ", ".join(repr(n) for n in nearest_first(name, trainer.callback_metrics)[:5])
                    raise ValueError(
                        f"PlateauBitReduction({'guard' if i else 'monitor'}={name!r}): there is no such metric now; "
                        f"nearest: {known or 'none is logged'}. Log it in every training step, or look after "
                        "validation with every_n_steps=None"
                    )
                self._sums[i] = self._sums[i] + value.detach().float()
        self._count += 1

    def _look(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *, at_the_end: bool = False) -> bool:
        """Look at the metrics since the last time. Roll back where they diverge; return whether to reduce."""
        values = [float(value) / max(self._count, 1) for value in self._sums]
        if self._broken:
            values = [math.nan, math.nan]
        elif self.monitor == SQNR:
            values[0] = _decibel(float(quantization_penalty(pl_module, match=self.match).detach()))
        elif self.guard is None:
            values[1] = values[0]
        if trainer.world_size > 1 and not self._broken:
            shared = torch.tensor(values, dtype=torch.float64, device=trainer.strategy.root_device)
            values = trainer.strategy.reduce(shared, reduce_op="mean").tolist()
        self._sums, self._count, self._looked = [0.0, 0.0], 0, trainer.global_step
        self._due = self._broken = False
        found = self._plateau.look(*values, at_the_end=at_the_end)
        if found == "diverged" and self._snapshot is not None:
            self._go_back(trainer, pl_module, self._snapshot, values[1])
        if found != "flat" or self._given_up:
            return False
        if self._snapshot is not None:  # the reduction has settled
            self._snapshot, self._rolled_back = None, 0
        return not super().has_final_bits()

    def _go_back(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, snapshot: dict[str, Any], guard: float
    ) -> None:
        self._snapshot = None
        roll_back(trainer, pl_module, snapshot)
        self.stage = snapshot["stage"]
        self._plateau.begin(reduced=False)
        self._rolled_back += 1
        self._given_up = self._rolled_back > self.retries
        self._apply_again(trainer, pl_module)
        rank_zero_warn(
            f"PlateauBitReduction: training diverged ({self.guard or self.monitor}: {guard:.4g}) and is rolled back "
            f"at step {trainer.global_step}; "
            + ("it keeps these bits from now on" if self._given_up else "the reduction will be tried again")
        )

    def remarks(self) -> list[tuple[str, str]]:
        return [(f"when {self.monitor} is flat", self._what() + ", rolled back where training diverges")]


def _name(field_name: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{field_name}={value!r} is not allowed; use the name of a logged metric")
    return value


def _is_sound(module: pl.LightningModule) -> bool:
    """Return whether all weights are finite and learned scales are scales; waits for the device once."""
    norms = torch._foreach_norm([p.detach() for p in module.parameters() if p.numel() and p.is_floating_point()])
    device = norms[0].device
    found = [norm.float().to(device).isfinite() for norm in norms]
    found += [~learned.wrong_values().to(device) for learned in learned_scales(module)]
    return bool(torch.stack(found).all())


def _decibel(noise: float) -> float:
    return -10.0 * math.log10(noise) if noise > 0 else math.inf if noise == 0 else math.nan


def _quantizes(trainer: pl.Trainer, step: int) -> bool:
    schedule = active_schedule(trainer)
    return schedule is not None and schedule.phase(step).quantizing


def _is_over(trainer: pl.Trainer) -> bool:
    """Whether no batch will follow the one that has ended, as far as ``max_steps`` and ``max_epochs`` say."""
    if 0 <= trainer.max_steps <= trainer.global_step:
        return True
    epochs = trainer.max_epochs
    return epochs is not None and 0 <= epochs <= trainer.current_epoch + 1 and trainer.is_last_batch

"""The distance of the weights from their grids as a part of the training loss."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_qat.callbacks.both_lightnings import serve_both
from lightning_qat.callbacks.parity_gate import is_sharded
from lightning_qat.nn import QATLayer
from lightning_qat.transforms.penalty import Reduction, add_penalty_gradient, check_factor, matched_layers
from lightning_qat.validation import check_choice


class QuantizationPenalty(pl.Callback):
    """Train as if ``alpha * quantization_penalty(module)`` were added to the loss of an unchanged LightningModule.

    The penalty depends on the weights alone, so its gradient, ``2 alpha (w - q) / ||w||^2``, is written down and added
    before the optimizer step: after ranks have averaged theirs and a loss scale is taken out, before clipping. That
    is what adding it to the loss of every batch gives, under gradient accumulation too, without a graph and for one
    fake quantization of each weight in an optimizer step. With manual optimization each optimizer's step has the
    gradients of the layers that it trains, after what clipping the module itself does.

    In a phase of float training nothing is added. The penalty is logged as ``quantization/penalty``, without
    ``alpha``; the loss that the module logs does not have it.

    Args:
        alpha: weight of the penalty, 0 or more.
        match: glob on the names of the layers.
        reduction: ``"mean"`` or ``"sum"`` over the layers.

    Raises:
        ValueError: for settings that are not allowed; in training where no layer matches, is sharded, or has sparse
            gradients.
    """

    def __init__(self, alpha: float = 0.01, *, match: str = "*", reduction: Reduction = "mean") -> None:
        serve_both(QuantizationPenalty)
        super().__init__()
        self.alpha = check_factor("alpha", alpha)
        self.match = match
        self.reduction = check_choice("reduction", reduction, ("mean", "sum"))
        self._layers: dict[str, QATLayer] = {}
        self._passes = BackwardPasses()
        self._noise: dict[str, Tensor] = {}

    def remarks(self) -> list[tuple[str, str]]:
        """Return ``(when, what)``, for ``explain`` of the quantization callbacks."""
        what = f"the loss has {self.alpha:g} times the {self.reduction} over layers of the weights' quantization error"
        return [("while quantized", what)]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        refuse_sharded(trainer, self)
        self._layers = matched_layers(pl_module, self.match)
        self._passes = BackwardPasses()
        self._noise = {}

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._passes.count += 1

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        share = self._passes.take(trainer)
        if not share:
            return
        parameters = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self._noise |= add_penalty_gradient(self._layers, self.alpha * share / self._divisor, parameters)

    @property
    def _divisor(self) -> int:
        return len(self._layers) if self.reduction == "mean" else 1

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._noise:
            first = next(iter(self._noise.values()))
            total = torch.stack([noise.to(first) for noise in self._noise.values()]).sum()
            pl_module.log("quantization/penalty", total / self._divisor)
            self._noise = {}

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._layers = {}


serve_both(QuantizationPenalty)  # LightningCLI looks at the class before there is an instance


class BackwardPasses:
    """Counts backward passes since the last optimizer step.

    Automatic optimization divides the loss of each by ``accumulate_grad_batches``, in the last steps of an epoch too,
    which may have fewer; a ``training_step`` that returns None has none.
    """

    def __init__(self) -> None:
        self.count = 0

    def take(self, trainer: pl.Trainer) -> float:
        """Return how many times what is added to the loss counts in the step that comes now, and begin anew."""
        if not trainer.lightning_module.automatic_optimization:
            return 1.0
        count, self.count = self.count, 0
        return count / trainer.accumulate_grad_batches


def refuse_sharded(trainer: pl.Trainer, callback: pl.Callback) -> None:
    """Raise ``ValueError`` where each rank holds a part of the weights only."""
    if is_sharded(trainer):
        raise ValueError(
            f"{type(callback).__name__} needs whole weights, and with {type(trainer.strategy).__name__} each rank has "
            "a part of them; use DDP, or leave the callback out"
        )

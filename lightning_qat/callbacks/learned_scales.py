"""What learned scales need of a run: groups of their own in the optimizer, clipping of their own, and checks."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.optim import Optimizer

from lightning_qat.callbacks.active_schedule import active_schedule
from lightning_qat.callbacks.averaged_weights import _averaging
from lightning_qat.callbacks.base import QuantizationCallback
from lightning_qat.callbacks.module_hooks import _stand_in, restore_hook
from lightning_qat.config import check_bool, check_int
from lightning_qat.nn.computed_weight import weight_now
from lightning_qat.quantizers.clipping import LearnedClipping
from lightning_qat.quantizers.fake_quantizer import ActivationQuantizer, FakeQuantizer
from lightning_qat.quantizers.learned_scale import check_scales
from lightning_qat.transforms.param_groups import learned_scales, separate_scales
from lightning_qat.transforms.prepare import qat_layers

#: Through which gradients are clipped: Lightning's own call, and that of a manual optimization.
_CLIPPING = ("configure_gradient_clipping", "clip_gradients")


class LearnedScales(QuantizationCallback):
    """Train scales and zero points by gradient (LSQ, LSQ+) beside the weights.

    ``QuantizationAwareTraining(QATConfig(..., learnable_step_size=True))`` does what this does by itself; one in the
    Trainer's list sets the numbers, and trains a model that was prepared by hand.

    Scales get a group of their own in the optimizer with their layer's weight, whatever ``configure_optimizers``
    returns, without weight decay; schedulers go on with it. They begin where the squared error is least: those of
    weights when quantization starts, those of activations with what calibration saw, or the first batch. While they
    stand still (before the start, frozen) they get no gradient. Where a scale is derived anew because its bits change,
    the optimizer forgets it: momentum and the size of gradients were those of another grid.

    Args:
        lr: learning rate of the scales; None is that of the group which has their layer's weight. With Adam about
            the share of itself that a scale moves by in a step. Schedules change it by the same factors.
        clip: largest norm of all scales' gradients together, None for no limit. The Trainer's ``gradient_clip_val``
            and ``clip_gradients`` see the other gradients alone: those of scales would count in the norm of the
            weights.
        of_data: learn the scale of a layer's input by gradient also where the input needs none: the data, which the
            first layers are given. False leaves it at that of least squared error and saves the gradient of those
            layers' input, which nothing else needs: most of what learned scales cost.
        check_every: optimizer steps between two looks for a scale that is none any more, which read from the device.
            There is one before every checkpoint and at the end in any case.

    Raises:
        ValueError: on fit, for a model without learned scales, or a scheduler that cannot be extended; while training,
            for a scale that would be zero, infinite or NaN, naming the layer.
    """

    def __init__(
        self, lr: float | None = None, clip: float | None = 1.0, *, of_data: bool = True, check_every: int = 100
    ) -> None:
        super().__init__()
        for name, value in (("lr", lr), ("clip", clip)):
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if value is not None and not (number and 0 < value < math.inf):
                raise ValueError(f"{name}={value!r} is not allowed; use a positive number or None")
        self.lr, self.clip = lr, clip
        check_bool("of_data", of_data)
        self.of_data = of_data
        self.check_every = check_int("check_every", check_every, 1)
        self._scales: list[tuple[FakeQuantizer, list[nn.Parameter]]] = []
        self._in_optimizer: dict[int, list[nn.Parameter]] = {}
        self._checked = 0

    def remarks(self) -> list[tuple[str, str]]:
        rate = "the rate of their layer's weight" if self.lr is None else f"a rate of {self.lr:g}"
        clip = "not clipped" if self.clip is None else f"clipped to a norm of {self.clip:g}"
        return [("while quantized", f"scales learn by gradient, at {rate}, gradients {clip}")]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        layers = [layer for _, layer in qat_layers(pl_module)]
        quantizers = [q for layer in layers for q in (layer.weight_quantizer, layer.input_quantizer) if q is not None]
        self._scales = [(q, list(q.learned.parameters())) for q in quantizers if q.learned is not None]
        if not self._scales:
            raise ValueError(
                f"{type(pl_module).__name__} has no learned scale; prepare it with a plan that has some, such as "
                "QuantizationAwareTraining(QATConfig('int4', learnable_step_size=True))"
            )
        for quantizer, _ in self._scales:
            if isinstance(quantizer, ActivationQuantizer):
                quantizer.learns_of_data = self.of_data
        self._separate(trainer, pl_module)
        for name in _CLIPPING:
            _stand_in(pl_module, name, self._hiding(getattr(pl_module, name)))

    def _separate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Group the scales. Optimizers are there, made by whatever form, and their state is not restored yet."""
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        separate_scales(pl_module, trainer.optimizers, schedulers, self.lr)
        known = {id(p) for _, parameters in self._scales for p in parameters}
        self._in_optimizer = {
            id(o): [p for group in o.param_groups for p in group["params"] if id(p) in known]
            for o in trainer.optimizers
        }

    def _hiding(self, clip: Callable[..., Any]) -> Callable[..., Any]:
        def hook(*args: Any, **kwargs: Any) -> Any:
            with _without_gradients([p for _, parameters in self._scales for p in parameters]):
                return clip(*args, **kwargs)

        return hook

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._separate(trainer, pl_module)  # tuners make the optimizers anew; otherwise there is nothing to do

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._begin_learning(trainer, pl_module)

    def _begin_learning(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let all weights' scales begin at once when quantization starts: ranks may run different layers."""
        if all(q.learned is None or q.learned.ready for q, _ in self._scales if not isinstance(q, ActivationQuantizer)):
            return
        schedule = active_schedule(trainer) if self._peers(trainer) else None
        if schedule is not None and schedule.phase(trainer.global_step).quantizing:
            for _, layer in qat_layers(pl_module):
                layer.weight_quantizer.begin_learning(weight_now(layer))

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        with torch.enable_grad():
            still = [parameters for quantizer, parameters in self._scales if not quantizer.learns_now]
        for parameters in still:  # a gradient of 0, as ranks need it, would let momentum go on
            for parameter in parameters:
                parameter.grad = None
        stepping = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self._forget_other_grids(optimizer, stepping)
        for quantizer, _ in self._scales:
            if isinstance(quantizer.learned, LearnedClipping) and id(quantizer.learned.exponent) in stepping:
                quantizer.learned.add_decay()
        mine = self._in_optimizer.get(id(getattr(optimizer, "_optimizer", optimizer)), [])
        if self.clip is not None and any(parameter.grad is not None for parameter in mine):
            nn.utils.clip_grad_norm_(mine, self.clip)

    def _forget_other_grids(self, optimizer: Optimizer, stepping: set[int]) -> None:
        state = getattr(optimizer, "_optimizer", optimizer).state
        for quantizer, parameters in self._scales:
            learned = quantizer.learned
            if learned is not None and learned.renewed and id(learned.exponent) in stepping:
                learned.renewed = False
                for parameter in parameters:
                    state.pop(parameter, None)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if trainer.global_step >= self._checked + self.check_every or trainer.global_step < self._checked:
            self._check(trainer)

    def _check(self, trainer: pl.Trainer) -> None:
        self._checked = trainer.global_step
        if any(peer.can_roll_back() for peer in self._peers(trainer)):
            return
        check_scales([quantizer.learned for quantizer, _ in self._scales if quantizer.learned is not None])

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._check(trainer)
        super().on_save_checkpoint(trainer, pl_module, checkpoint)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        # Weights are averaged, scales are not: what becomes the module has its scales.
        for callback in _averaging(trainer, "StochasticWeightAveraging"):
            if callback._average_model is not None:
                pairs = zip(learned_scales(callback._average_model), learned_scales(pl_module), strict=True)
                for average, current in pairs:
                    average.load_state_dict(current.state_dict())

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._check(trainer)
        self._leave(pl_module)
        super().on_train_end(trainer, pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._leave(pl_module)
        super().on_exception(trainer, pl_module, exception)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._leave(pl_module)
        super().teardown(trainer, pl_module, stage)

    def _leave(self, pl_module: pl.LightningModule) -> None:
        for name in _CLIPPING:
            restore_hook(pl_module, name)


@contextlib.contextmanager
def _without_gradients(parameters: list[nn.Parameter]) -> Iterator[None]:
    kept = [(parameter, parameter.grad) for parameter in parameters if parameter.grad is not None]
    for parameter, _ in kept:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in kept:
            parameter.grad = gradient

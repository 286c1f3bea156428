"""Weights that flip between two codes: how many there are, and what to do about them."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch.optim import Optimizer

from lightning_qat.callbacks.both_lightnings import serve_both
from lightning_qat.callbacks.quantization_penalty import BackwardPasses, refuse_sharded
from lightning_qat.nn import QATLayer
from lightning_qat.nn.computed_weight import weight_now
from lightning_qat.tracking import log_table
from lightning_qat.transforms.oscillation import (
    OSCILLATING,
    LayerOscillation,
    add_dampening_gradient,
    codes_now,
    gradient_of,
    has_ordered_codes,
    hold_frozen,
    is_in_parameter,
    untouchable_ends,
)
from lightning_qat.transforms.param_groups import learned_scales
from lightning_qat.transforms.penalty import check_factor, matched_layers
from lightning_qat.validation import check_int


class WeightOscillation(pl.Callback):
    """Measure, dampen and freeze weights that oscillate between two points of their grid.

    At few bits, weights near the border of two codes flip between them step after step; the network and its BatchNorm
    statistics never settle (Nagel et al. 2022, https://arxiv.org/abs/2203.08797). A weight oscillates in a step if its
    code turns back; the moving average of that is its frequency. Logged: ``quantization/oscillating_weights``, the
    share of weights whose frequency is above 0.005, and ``quantization/frozen_weights``; by layer in :attr:`table`,
    which goes to the loggers at the end of training as ``quantization_oscillation``.

    Measuring alone changes no bit of the training. In a phase of float training nothing is done; when the bits of a
    layer change, it begins anew. Layers of integer formats only: other codes have no order.

    Memory on the device and in checkpoints: 6 bytes for each weight of the layers that match, 11 with freezing.

    Args:
        dampening: weight of a loss that pulls weights to the point of the grid they are rounded to, the squared
            distance summed over all of them (the paper's lambda); its gradient is added as
            :class:`QuantizationPenalty` does it. 0 is none.
        freeze_threshold: a weight whose frequency is above stays at its average code from then on; None freezes none.
            Not at the ends of the grid while the scale is that of the extremes.
        momentum: of the moving averages, how much one step counts.
        every_n_steps: optimizer steps between two looks at the codes; frozen weights are held in every one.
        match: glob on the names of the layers.

    Attributes:
        table: rows of the last log, one dict for each layer.

    Raises:
        ValueError: for settings that are not allowed; in training where no integer layer matches, where a weight is
            sharded, or to be frozen but computed from others (pruning, weight norm).
    """

    def __init__(
        self,
        dampening: float = 0.0,
        freeze_threshold: float | None = None,
        momentum: float = 0.01,
        every_n_steps: int = 1,
        *,
        match: str = "*",
    ) -> None:
        serve_both(WeightOscillation)
        super().__init__()
        self.dampening = check_factor("dampening", dampening)
        self.freeze_threshold = None if freeze_threshold is None else _share("freeze_threshold", freeze_threshold)
        self.momentum = _share("momentum", momentum)
        self.every_n_steps = check_int("every_n_steps", every_n_steps, 1)
        self.match = match
        self.table: list[dict[str, Any]] = []
        self._layers: dict[str, QATLayer] = {}
        self._states: dict[str, LayerOscillation] = {}
        self._passes = BackwardPasses()
        self._step = 0  # the last one that was seen
        self._observed: int | None = None

    @property
    def _freezing(self) -> bool:
        return self.freeze_threshold is not None

    def remarks(self) -> list[tuple[str, str]]:
        """Return ``(when, what)``, for ``explain`` of the quantization callbacks."""
        dampens = f", dampened by {self.dampening:g}" if self.dampening else ""
        freezes = f", frozen from a frequency of {self.freeze_threshold:g} on" if self._freezing else ""
        return [("while quantized", f"weights that flip between two codes are measured{dampens}{freezes}")]

    def state_dict(self) -> dict[str, Any]:
        layers = {name: state.state_dict() for name, state in self._states.items()}
        return {"step": self._step, "observed": self._observed, "layers": layers}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._step, self._observed = state_dict["step"], state_dict["observed"]
        self._states = {
            name: LayerOscillation.from_state_dict(state, freezing=self._freezing)
            for name, state in state_dict["layers"].items()
        }

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        refuse_sharded(trainer, self)
        found = matched_layers(pl_module, self.match)
        self._layers = {name: layer for name, layer in found.items() if has_ordered_codes(layer)}
        if not self._layers:
            raise ValueError(
                f"WeightOscillation(match={self.match!r}): no layer that matches has integer codes; "
                f"{next(iter(found))!r} has {next(iter(found.values())).weight_quantizer.extra_repr()}"
            )
        computed = [name for name, layer in self._layers.items() if not is_in_parameter(layer)]
        if computed and self._freezing:
            raise ValueError(
                f"the weight of layer {computed[0]!r} is computed from other parameters and cannot be frozen; leave "
                "freeze_threshold out, or that layer with match="
            )
        self._passes = BackwardPasses()
        if trainer.global_step == 0:
            self._states, self._step, self._observed, self.table = {}, 0, None, []
        for name, layer in self._layers.items():
            if name in self._states:  # of a checkpoint
                self._states[name].to(weight_now(layer).device)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._passes.count += 1

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        share = self._passes.take(trainer)
        if self.dampening and share:
            parameters = {id(p) for group in optimizer.param_groups for p in group["params"]}
            add_dampening_gradient(self._layers, self.dampening * share, parameters)
        for name, layer in self._layers.items():
            state, quantizer = self._states.get(name), layer.weight_quantizer
            if state is None or state.frozen is None:
                continue
            gradient = gradient_of(layer)
            if gradient is not None and quantizer.quantizing and state.bits == quantizer.bits:
                gradient.masked_fill_(state.frozen, 0.0)  # clipping by norm would count it

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self._step:
            return  # gradients are being accumulated
        self._step = step
        look = self._observed is None or step - self._observed >= self.every_n_steps
        if look:
            self._observed = step
        scales = [learned for learned in learned_scales(pl_module) if learned.exponent.device.type == "cpu"]
        if any(bool(learned.wrong_values()) for learned in scales):
            self._states = {}  # there are no codes; what is done of it is for others, such as a roll-back
            return
        for name, layer in self._layers.items():
            if not layer.weight_quantizer.quantizing:
                self._states.pop(name, None)
            else:
                self._follow(name, layer, look)
        if self._states and (trainer._logger_connector.should_update_logs or trainer.is_last_batch):
            self._log(pl_module)

    def _follow(self, name: str, layer: QATLayer, look: bool) -> None:
        """Keep the state of one layer up with its weight."""
        state, bits = self._states.get(name), layer.weight_quantizer.bits
        if state is None or state.bits != bits:
            if look:
                self._states[name] = LayerOscillation(codes_now(layer), bits, freezing=self._freezing)
            else:
                self._states.pop(name, None)
            return
        if look:
            state.observe(codes_now(layer), self.momentum)
            if self.freeze_threshold is not None:
                state.freeze(self.freeze_threshold, untouchable_ends(layer.weight_quantizer))
        if self._freezing:
            hold_frozen(layer, state)

    def _log(self, module: pl.LightningModule) -> None:
        rows, sums = [], []
        for state in self._states.values():
            frozen = state.frequency.new_zeros(()) if state.frozen is None else state.frozen.sum()
            counts = [(state.frequency > OSCILLATING).sum(), frozen, state.frequency.sum()]
            sums.append(torch.stack([c.float() for c in counts]))
        found = torch.stack([s.to(sums[0].device) for s in sums]).tolist()
        for (name, state), (oscillating, frozen_count, total) in zip(self._states.items(), found, strict=True):
            weights = state.codes.numel()
            shares = {"oscillating": oscillating / weights, "frozen": frozen_count / weights}
            rows.append({"layer": name, "weights": weights, **shares, "mean_frequency": total / weights})
        self.table = rows
        weights = sum(row["weights"] for row in rows)
        module.log("quantization/oscillating_weights", sum(row[0] for row in found) / weights)
        if self._freezing:
            module.log("quantization/frozen_weights", sum(row[1] for row in found) / weights)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.table and trainer.is_global_zero:
            for logger in trainer.loggers:
                log_table(logger, "quantization_oscillation", self.table, trainer.global_step)


serve_both(WeightOscillation)  # LightningCLI looks at the class before there is an instance


def _share(field_name: str, value: Any) -> float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 < value <= 1:
        raise ValueError(f"{field_name}={value!r} is not allowed; use a number above 0 and at most 1")
    return float(value)

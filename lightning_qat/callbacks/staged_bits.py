"""What bit reductions that decide while the run goes on share: stages, and which layers have which bits at each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl

from lightning_qat.callbacks.base import QuantizationCallback
from lightning_qat.callbacks.layer_order import order_by_loss
from lightning_qat.config import check_bool, check_int
from lightning_qat.nn import QATLayer
from lightning_qat.transforms.penalty import matched_layers
from lightning_qat.transforms.phase import Phase


class StagedBitReduction(QuantizationCallback):
    """Reduce bits in stages: of all layers at once, or of a few at a time, those first that lose least.

    Which bits a layer has is a function of :attr:`stage` and :attr:`orders`, which are saved. Both change before a
    batch, so that every checkpoint and every evaluation has what the steps before it trained.

    The mean of the layers' bits is logged as ``quantization/bits``, with a ``match`` as ``quantization/bits/<match>``.

    Attributes:
        stage: how many reductions there were.
        orders: for each level of bits that was begun, the layers in the order in which they leave it.
    """

    def __init__(
        self, bits: Sequence[int], *, layers_at_once: int | None, weights: bool, activations: bool, match: str
    ) -> None:
        super().__init__()
        if not isinstance(bits, Sequence) or len(bits) < 2:
            raise ValueError(f"bits={bits!r} is not allowed; use two or more, such as [8, 6, 4]")
        self.bits = [check_int(f"bits[{i}]", value, 2, 16) for i, value in enumerate(bits)]
        if any(after >= before for before, after in zip(self.bits, self.bits[1:], strict=False)):
            raise ValueError(f"bits={self.bits} is not allowed; each has to be less than the one before")
        for name, value in (("weights", weights), ("activations", activations)):
            check_bool(name, value)
        if not (weights or activations):
            raise ValueError("weights=False with activations=False changes nothing; set one of them")
        self.layers_at_once = None if layers_at_once is None else check_int("layers_at_once", layers_at_once, 1)
        self.weights, self.activations, self.match = weights, activations, match
        self.stage = 0
        self.orders: list[list[str]] = []
        self._names: list[str] = []

    @property
    def state_key(self) -> str:
        return self._generate_state_key(match=self.match)

    def state_dict(self) -> dict[str, Any]:
        return {"bits": list(self.bits), "stage": self.stage, "orders": [list(order) for order in self.orders]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["bits"] != self.bits:
            raise ValueError(
                f"{type(self).__name__} of the checkpoint has bits={state_dict['bits']}, and this one {self.bits}; a "
                "run goes on with the bits that it began with"
            )
        self.stage, self.orders = state_dict["stage"], [list(order) for order in state_dict["orders"]]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and trainer.global_step == 0:
            self._begin_anew()

    def _begin_anew(self) -> None:
        self.stage, self.orders = 0, []

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        layers = matched_layers(pl_module, self.match)
        for name, layer in layers.items():
            _check_layer(name, layer, self.bits if self.weights else [])
        self._names = list(layers)

    @property
    def _parts(self) -> int:
        """How many stages lie between two numbers of bits."""
        return 1 if self.layers_at_once is None else math.ceil(len(self._names) / self.layers_at_once)

    @property
    def last_stage(self) -> int:
        """The stage at which every layer has the fewest bits."""
        return (len(self.bits) - 1) * self._parts

    def bits_now(self) -> dict[str, int]:
        """Return the bits of each layer at this stage."""
        level, part = divmod(self.stage, self._parts)
        bits = dict.fromkeys(self._names, self.bits[level])
        if part:
            bits |= dict.fromkeys(self.orders[level][: part * int(self.layers_at_once or 0)], self.bits[level + 1])
        return bits

    def refine(self, phase: Phase) -> Phase:
        if not self._names:
            return phase
        bits = self.bits_now()
        if self.weights:
            phase = replace(phase, weight_bits_of={**phase.weight_bits_of, **bits})
        return replace(phase, activation_bits_of={**phase.activation_bits_of, **bits}) if self.activations else phase

    def has_final_bits(self) -> bool:
        return self.stage >= self.last_stage

    def _reduce(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, stage: int
    ) -> None:
        """Go on to ``stage``. What a layer loses is measured where the first of a level are to be chosen."""
        for following in range(self.stage + 1, stage + 1):
            level = (following - 1) // self._parts
            if self._parts > 1 and len(self.orders) <= level:
                forward = next(
                    (f for f in (p.calibration_forward() for p in reversed(self._peers(trainer))) if f), None
                )
                order = order_by_loss(
                    trainer, pl_module, batch, batch_idx, self._names, self.bits[level + 1], forward,
                    weights=self.weights, activations=self.activations,
                )  # fmt: skip
                self.orders = [*self.orders[:level], order]
            self.stage = following
            self._apply_again(trainer, pl_module)

    def _run_epochs(self, trainer: pl.Trainer) -> int | None:
        return next(peer._max_epochs for peer in self._peers(trainer) if peer._leads(trainer))

    def _apply_again(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for peer in self._peers(trainer):
            peer._apply(trainer, pl_module)  # the one that leads does

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._names and (trainer._logger_connector.should_update_logs or trainer.is_last_batch):
            bits = self.bits_now().values()
            where = "" if self.match == "*" else f"/{self.match}"  # there may be several of these
            pl_module.log(f"quantization/bits{where}", sum(bits) / len(bits))

    def _what(self) -> str:
        """Return, in words, what is reduced."""
        what = "weights and activations" if self.weights and self.activations else "weights"
        where = "" if self.match == "*" else f" in {self.match}"
        few = "" if self.layers_at_once is None else f", {self.layers_at_once} layers at a time, least loss first"
        return f"{what if self.weights else 'activations'} at {', then '.join(map(str, self.bits))} bits{where}{few}"


def _check_layer(name: str, layer: QATLayer, bits: list[int]) -> None:
    quantizer = layer.weight_quantizer
    for value in bits:
        try:
            quantizer.scheme.check_bits(value, quantizer.format)
        except ValueError as error:
            raise ValueError(f"the weight of layer {name!r}: {error}; leave the layer out with match=") from None

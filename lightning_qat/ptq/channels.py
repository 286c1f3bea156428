"""Multiplying channels: the rows of what makes them, the columns of what reads them.

Parameters are replaced, never written to: the model that is quantized may share them with the user's own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qat.nn.attention import INPUT_PROJECTIONS, Projection
from lightning_qat.nn.recurrent import RecurrentWeight
from lightning_qat.ptq.probing import wide_dtype


@dataclass(frozen=True, eq=False)
class Slot:
    """Where a weight or a bias is kept.

    Args:
        owner: of the parameter.
        name: of the parameter.
        rows: those of it that are meant; None is all. The projections of an attention are parts of one parameter.
    """

    owner: nn.Module
    name: str
    rows: slice | None = None

    @property
    def parameter(self) -> nn.Parameter:
        """All of the parameter."""
        found: Any = self.owner._parameters[self.name]
        return found

    @property
    def value(self) -> Tensor:
        """What is meant, without gradients."""
        whole = self.parameter.detach()
        return whole if self.rows is None else whole[self.rows]

    def replace(self, value: Tensor) -> None:
        """Give the owner a new parameter with this value."""
        old = self.parameter
        if self.rows is not None:
            whole = old.detach().clone()
            whole[self.rows] = value.to(whole.dtype)
            value = whole
        self.owner._parameters[self.name] = nn.Parameter(value.to(old.dtype), old.requires_grad)


def slot_of(module: nn.Module, name: str) -> Slot | None:
    """Return where ``"weight"`` or ``"bias"`` of ``module`` is kept; None if it has none or computes it."""
    slot: Slot | None = Slot(module, name)
    if isinstance(module, Projection):
        attention, size = module.attention, module.out_features
        rows = slice(module.part * size, (module.part + 1) * size)
        slot = Slot(attention, f"in_proj_{name}", rows)
        if name == "weight" and attention._parameters.get("in_proj_weight") is None:
            slot = Slot(attention, f"{INPUT_PROJECTIONS[module.part]}_weight")
    return slot if slot is not None and slot.owner._parameters.get(slot.name) is not None else None


def computes_weight(layer: nn.Module) -> bool:
    """Return whether the weight of ``layer`` is no parameter: pruned, normed or parametrized."""
    if isinstance(layer, RecurrentWeight):
        return layer.owner._parameters.get(layer.parameter) is None
    return slot_of(layer, "weight") is None


@dataclass(frozen=True, eq=False)
class Source:
    """A module whose output channels can be multiplied.

    Args:
        name: within the block.
        module: with a ``weight`` of one row, or one number, for each channel, and maybe a ``bias``.
        offset: what is added to the weight before it multiplies: 1 in norms that store ``weight - 1``.
    """

    name: str
    module: nn.Module
    offset: float = 0.0

    @property
    def slots(self) -> dict[str, Slot]:
        """Weight and bias by name."""
        found = {name: slot_of(self.module, name) for name in ("weight", "bias")}
        return {name: slot for name, slot in found.items() if slot is not None}

    @property
    def channels(self) -> int:
        """How many there are."""
        return int(self.slots["weight"].value.shape[0])

    @torch.no_grad()
    def multiply(self, factor: Tensor) -> None:
        """Multiply the output by ``factor``, ``[channels]``."""
        for name, slot in self.slots.items():
            value, offset = slot.value, self.offset if name == "weight" else 0.0
            rows = factor.to(value.device).view(-1, *[1] * (value.dim() - 1))
            slot.replace((value.to(wide_dtype(value)) + offset).mul_(rows).sub_(offset))


@torch.no_grad()
def multiply_columns(layer: nn.Module, factor: Tensor) -> None:
    """Multiply the columns of a Linear's weight by ``factor``, ``[in_features]``."""
    slot: Any = slot_of(layer, "weight")
    slot.replace(slot.value.to(wide_dtype(slot.value)) * factor.to(slot.value.device))


def has_channels(module: nn.Module) -> bool:
    """Return whether a module may multiply each channel of its output: a Linear, or one with a vector ``weight``."""
    weight, bias = slot_of(module, "weight"), slot_of(module, "bias")
    if weight is None or not weight.parameter.is_floating_point() or weight.parameter.is_meta:
        return False
    if not (isinstance(module, nn.Linear) or weight.parameter.dim() == 1):
        return False
    return bias is None or bias.value.shape == weight.value.shape[:1]


@contextlib.contextmanager
def multiplied(
    sources: Iterable[tuple[Source, Tensor]], layers: Iterable[tuple[nn.Module, Tensor]] = ()
) -> Iterator[None]:
    """Multiply channels of sources and columns of layers inside; the parameters are the old ones afterwards."""
    sources, layers = list(sources), list(layers)
    slots = [slot for source, _ in sources for slot in source.slots.values()]
    slots += [slot for layer, _ in layers if (slot := slot_of(layer, "weight")) is not None]
    saved = [(slot, slot.parameter) for slot in slots]
    try:
        for source, factor in sources:
            source.multiply(factor)
        for layer, factor in layers:
            multiply_columns(layer, factor)
        yield
    finally:
        for slot, parameter in saved:
            slot.owner._parameters[slot.name] = parameter


def shared_parameters(model: nn.Module) -> frozenset[int]:
    """Return the ids of parameters that several modules, or one in several places, have: they are not scaled."""
    seen: set[int] = set()
    twice: set[int] = set()
    for _, module in model.named_modules(remove_duplicate=False):
        for parameter in module._parameters.values():
            if parameter is not None:
                (twice if id(parameter) in seen else seen).add(id(parameter))
    return frozenset(twice)

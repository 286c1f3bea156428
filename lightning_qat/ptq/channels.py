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
    def parameters(self) -> dict[str, nn.Parameter]:
        """Weight and bias by name."""
        found = {name: self.module._parameters.get(name) for name in ("weight", "bias")}
        return {name: parameter for name, parameter in found.items() if parameter is not None}

    @property
    def channels(self) -> int:
        """How many there are."""
        return int(self.parameters["weight"].shape[0])

    @torch.no_grad()
    def multiply(self, factor: Tensor) -> None:
        """Multiply the output by ``factor``, ``[channels]``."""
        for name, parameter in self.parameters.items():
            offset = self.offset if name == "weight" else 0.0
            rows = factor.to(parameter.device).view(-1, *[1] * (parameter.dim() - 1))
            _replace(self.module, name, (parameter.float() + offset).mul_(rows).sub_(offset))


@torch.no_grad()
def multiply_columns(layer: nn.Module, factor: Tensor) -> None:
    """Multiply the columns of a Linear's weight by ``factor``, ``[in_features]``."""
    weight: Any = layer._parameters["weight"]
    _replace(layer, "weight", weight.float() * factor.to(weight.device))


def _replace(module: nn.Module, name: str, value: Tensor) -> None:
    old: Any = module._parameters[name]
    module._parameters[name] = nn.Parameter(value.to(old.dtype), old.requires_grad)


def has_channels(module: nn.Module) -> bool:
    """Return whether a module may multiply each channel of its output: a Linear, or one with a vector ``weight``."""
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    if weight is None or not weight.is_floating_point() or weight.is_meta:
        return False
    if not (isinstance(module, nn.Linear) or weight.dim() == 1):
        return False
    return bias is None or bias.shape == weight.shape[:1]


@contextlib.contextmanager
def multiplied(
    sources: Iterable[tuple[Source, Tensor]], layers: Iterable[tuple[nn.Module, Tensor]] = ()
) -> Iterator[None]:
    """Multiply channels of sources and columns of layers inside; the parameters are the old ones afterwards."""
    sources, layers = list(sources), list(layers)
    modules = [source.module for source, _ in sources] + [layer for layer, _ in layers]
    saved = [(module, dict(module._parameters)) for module in modules]
    try:
        for source, factor in sources:
            source.multiply(factor)
        for layer, factor in layers:
            multiply_columns(layer, factor)
        yield
    finally:
        for module, parameters in saved:
            module._parameters.update(parameters)


def shared_parameters(model: nn.Module) -> frozenset[int]:
    """Return the ids of parameters that several modules, or one in several places, have: they are not scaled."""
    seen: set[int] = set()
    twice: set[int] = set()
    for _, module in model.named_modules(remove_duplicate=False):
        for parameter in module._parameters.values():
            if parameter is not None:
                (twice if id(parameter) in seen else seen).add(id(parameter))
    return frozenset(twice)

"""Names that a layer of the user's and a prepared or converted one both have: the user's code reads its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

#: Ours where they are, by design.
_MEANT = {"weight", "bias"}


class GivingWay:
    """A computed attribute that gives way to what the user's layer keeps under its name, as ``self.scale``."""

    def __init__(self, compute: Callable[[Any], Any]) -> None:
        self.compute = compute
        self.__doc__ = compute.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, layer: Any, owner: type | None = None) -> Any:
        if layer is None:
            return self
        for kept in (layer._parameters, layer._buffers, layer._modules):  # __dict__ comes before this anyway
            if self.name in kept:
                return kept[self.name]
        return self.compute(layer)


def check_names(layer: nn.Module, name: str, base: type[nn.Module], classes: tuple[type, ...]) -> None:
    """Raise where ``classes``, which ``layer`` would take on, hide something that it has.

    Args:
        layer: a float layer.
        name: of it, for messages.
        base: the float class that it is or derives from.
        classes: the prepared and the converted one.

    Raises:
        ValueError: naming the layer and what would be hidden.
    """
    ours = {key: getattr(kind, key) for kind in classes for key in dir(kind) if not hasattr(base, key)}
    kept = {*layer.__dict__, *layer._parameters, *layer._buffers, *layer._modules}
    hidden = {key for key in kept if key in ours and not isinstance(ours[key], GivingWay)}
    for kind in type(layer).__mro__[: type(layer).__mro__.index(base)]:
        hidden |= vars(kind).keys() & ours.keys()
    hidden |= kept & {"weight_quantizer", "input_quantizer"}
    for key in sorted(hidden - _MEANT):
        raise ValueError(
            f"layer {name!r} ({type(layer).__name__}) has {key!r}, which prepared and converted layers have too; "
            f"rename it, or leave the layer in float with LayerRule({name!r})"
        )

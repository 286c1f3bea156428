"""Attentions and recurrent layers in a saved model: which are split, and splitting those of a freshly built one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from lightning_qat.nn import QuantizedMultiheadAttention, RecurrentLayer, attention, recurrent


class QuantizedFileError(ValueError):
    """A saved model is missing, damaged, altered, of another version or of another model."""


def split_layers_saved(model: nn.Module) -> dict[str, Any]:
    """Return what the manifest of a converted ``model`` has of them, by name."""
    modules = list(model.named_modules())
    return {
        "attentions": {
            n: {"product_bits": m.product_bits} for n, m in modules if isinstance(m, QuantizedMultiheadAttention)
        },
        "recurrent": {
            n: [c.parameter for c in m.children() if isinstance(c, recurrent.QuantizedRecurrentWeight)]
            for n, m in modules
            if isinstance(m, RecurrentLayer)
        },
    }


@contextlib.contextmanager
def split_as_saved(folder: Path, model: nn.Module, manifest: dict[str, Any]) -> Iterator[None]:
    """Give attentions and recurrent layers of ``model`` layers of their own, as conversion did.

    It is undone if what follows inside fails.

    Args:
        folder: the manifest's, for messages.
        model: a freshly built float model.
        manifest: of the saved model.

    Raises:
        QuantizedFileError: a layer is not there, or is another one.
    """
    modules, done = dict(model.named_modules()), []

    def ready(name: str, kind: str, room: Any, weights: list[str]) -> nn.Module:
        module = modules.get(name)
        if module is None or not room.can_be_split(module) or not {*weights} <= module._parameters.keys():
            found = f"a {type(module).__name__} there" if module is not None else "nothing of that name"
            raise QuantizedFileError(f"{folder} holds {kind} {name!r}, and the model has {found}; build the same model")
        held = {**module.__dict__, "_parameters": {**module._parameters}, "_modules": {**module._modules}}
        done.append((module, type(module), held))
        room.split(module)
        return module

    try:
        for name, entry in manifest.get("attentions", {}).items():
            split: Any = ready(name, "an nn.MultiheadAttention", attention, [])
            attention.own_projections(split, entry["product_bits"])
        for name, weights in manifest.get("recurrent", {}).items():
            recurrent.own_weights(ready(name, "a recurrent layer", recurrent, weights), weights)
        yield
    except BaseException:
        for module, before, held in done:
            module.__class__ = before
            module.__dict__.update(held)
        raise

"""The mode that a model runs in where the inputs of its layers are watched."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from lightning_qat.nn import QATMultiheadAttention
from lightning_qat.transforms.without_cache import without_cache


@contextlib.contextmanager
def as_calibrated(model: nn.Module) -> Iterator[None]:
    """Let ``model`` run as its layers are to be watched: in evaluation mode, without a cache of keys and values."""
    modes = {module: module.training for module in model.modules()}
    attentions = [module for module in modes if isinstance(module, QATMultiheadAttention)]
    called = [attention.__dict__.get("calls_projections") for attention in attentions]
    try:
        model.eval()
        for attention in attentions:
            attention.calls_projections = True
        with without_cache(model):
            yield
    finally:
        for attention, before in zip(attentions, called, strict=True):
            attention.__dict__.pop("calls_projections", None)
            if before is not None:
                attention.calls_projections = before
        for module, training in modes.items():
            module.training = training

"""What ``save_pretrained`` of a converted transformers model does: it says what to call instead."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import nn


class _Refusal:
    """In the place of a model's ``save_pretrained``; an object, so that models are copied and pickled as before."""

    def __call__(self, *_: Any, **__: Any) -> NoReturn:
        raise ValueError(
            "save_pretrained would write a folder that from_pretrained fills with fresh weights where this model has "
            "packed integers; use lightning_qat.export(model, folder, format='gptq') (or 'awq', 'bitsandbytes', "
            "'compressed_tensors') for what transformers loads, or save_quantized(model, folder)"
        )


def refuse_save_pretrained(model: nn.Module) -> None:
    """Let every part of a converted ``model`` that has a ``save_pretrained`` refuse it."""
    for module in model.modules():
        if callable(getattr(type(module), "save_pretrained", None)):
            module.__dict__["save_pretrained"] = _Refusal()


def allow_save_pretrained(model: nn.Module) -> None:
    """Undo :func:`refuse_save_pretrained`: ``model`` is in float."""
    for module in model.modules():
        if isinstance(module.__dict__.get("save_pretrained"), _Refusal):
            del module.__dict__["save_pretrained"]

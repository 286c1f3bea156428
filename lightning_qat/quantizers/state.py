"""Quantization state that survives dtype casts and loads from checkpoints of float models."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn


class KeepsDtype(nn.Module):
    """A module whose own buffers keep their dtype and value when the model is cast.

    ``module.half()`` and Lightning's "bf16-true" cast every floating buffer. A scale rounded to
    bfloat16 is another grid, so buffers here follow to the device only.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self


class QuantizationState(KeepsDtype):
    """Quantization state that is optional in a state dict.

    A state dict without any key of this module (a float checkpoint) leaves it fresh instead of being
    an error; one with some of its keys only is still reported as incomplete.
    """

    @property
    def device(self) -> torch.device:
        """Where its tensors are. Not by way of a scale: a learned one that broke raises where it is asked for."""
        return next(chain(self.parameters(), self.buffers())).device

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        if any(key.startswith(prefix) for key in state_dict):
            super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def reset_parameters(self) -> None:
        """Be fresh: sharded strategies call this on modules made on the meta device, after ``to_empty``."""
        reset = getattr(self, "reset", None)
        if reset is not None:
            reset()


def check_same_format(whose: str, trained: dict[str, Any] | None, prepared: dict[str, Any]) -> None:
    """Raise ``ValueError`` if a quantizer's state is of another format than the model is prepared with.

    Its tensors may have the same shapes and would be read otherwise. Bits may differ: they change while training.

    Args:
        whose: names the quantizer.
        trained: the format in the state; None in checkpoints before it was saved.
        prepared: the format now.
    """
    if trained is not None and {**trained, "bits": 0} != {**prepared, "bits": 0}:
        raise ValueError(
            f"the {whose} was trained as {trained} and the model is prepared with {prepared}; prepare it with the plan "
            "of the checkpoint"
        )


def in_backward() -> bool:
    """Whether a backward pass is running: activation checkpointing then repeats a forward."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1

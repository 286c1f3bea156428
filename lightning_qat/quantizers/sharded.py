"""Weights of which a rank holds a part: whole in the forward pass, sharded outside."""

from __future__ import annotations

import torch
from torch import Tensor


def is_sharded(weight: Tensor | None) -> bool:
    """Return whether ``weight`` is a ``DTensor``."""
    return hasattr(weight, "full_tensor")


@torch.no_grad()
def whole_weight(weight: Tensor, shape: torch.Size, name: str) -> Tensor:
    """Return all of ``weight``; of a sharded one every rank has to ask.

    Args:
        weight: outside the forward pass.
        shape: of the whole.
        name: of the layer.

    Raises:
        RuntimeError: if what is there is neither the weight nor a ``DTensor``.
    """
    if is_sharded(weight):
        whole: Tensor = weight.full_tensor()  # type: ignore[attr-defined]
        return whole
    if weight.shape != shape:
        raise RuntimeError(
            f"the weight of layer {name!r} has the shape {list(weight.shape)} outside the forward pass, not "
            f"{list(shape)}: the strategy flattens or partitions it (FSDPStrategy, DeepSpeed stage 3). Use "
            "ModelParallelStrategy with fully_shard (FSDP2), or DDP"
        )
    return weight


def check_whole(weight: Tensor, name: str) -> None:
    """Raise ``RuntimeError`` if ``weight`` is sharded in the forward pass of its layer."""
    if is_sharded(weight):
        raise RuntimeError(
            f"the weight of layer {name!r} is sharded in its forward pass, as tensor parallelism does it, which fake "
            f"quantization does not take; shard with fully_shard (FSDP2), or leave the layer in float with "
            f"LayerRule({name!r})"
        )

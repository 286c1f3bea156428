"""The check that a tensor has no value without a code."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def check_finite(tensor: Tensor) -> None:
    """Raise ``ValueError`` naming the first NaN or infinity of ``tensor`` and how many there are."""
    if not tensor.numel() or all(math.isfinite(float(end)) for end in torch.aminmax(tensor)):
        return  # NaN and infinity come out of the extremes: one pass
    places = (~torch.isfinite(tensor)).nonzero()
    first = tuple(places[0].tolist())
    raise ValueError(
        f"tensor holds {float(tensor[first])} at index {first} ({len(places)} of {tensor.numel()} values are NaN or "
        "infinite), which has no code; replace it, as by torch.nan_to_num"
    )

"""The check that a tensor has no value without a code."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_qat.native import fake_quantize as native
from lightning_qat.ops.affine_cpu import takes_pieces


def check_finite(tensor: Tensor) -> None:
    """Raise ``ValueError`` naming the first NaN or infinity of ``tensor`` and how many there are."""
    if not tensor.numel() or all(math.isfinite(end) for end in _ends(tensor)):
        return  # NaN and infinity come out of the extremes: one pass
    places = (~torch.isfinite(tensor)).nonzero()
    first = tuple(places[0].tolist())
    raise ValueError(
        f"tensor holds {float(tensor[first])} at index {first} ({len(places)} of {tensor.numel()} values are NaN or "
        "infinite), which has no code; replace it, as by torch.nan_to_num"
    )


def _ends(tensor: Tensor) -> tuple[float, float]:
    # 4096 x 4096 on two cores: PyTorch's pass takes three times as long.
    found = native.observe(tensor) if tensor.is_contiguous() and takes_pieces(tensor.detach()) else None
    if found is not None:
        return found
    low, high = torch.aminmax(tensor)
    return float(low), float(high)

"""Stored bytes to scaled values on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_qat.native.library import Family, threads_for

_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_FAMILY = Family("lookup", {f"{what}_{name}": "ppppqpqi" for what in ("values", "pairs") for name in _NAMES.values()})


def write_lookups(
    table: Tensor, stored: Tensor, scale: Tensor, zero_point: Tensor | None, run: int, result: Tensor
) -> bool:
    """Write ``(table[stored] - zero_point) * scale`` into ``result``; return whether it was done.

    Args:
        table: 256 entries: float32, or of two float32 as one float64.
        stored: uint8, contiguous; with two values to a byte the last may have one.
        scale: float32, contiguous, one for each run.
        zero_point: likewise, or None for 0.
        run: consecutive elements that share a scale, of any number.
        result: contiguous, not empty.
    """
    functions, name = _FAMILY.functions(), _NAMES.get(result.dtype)
    if functions is None or name is None or not result.is_cpu:
        return False
    function = getattr(functions, f"{'values' if table.element_size() == 4 else 'pairs'}_{name}")
    if function is None:
        return False
    zero = 0 if zero_point is None else zero_point.data_ptr()
    addresses = table.data_ptr(), stored.data_ptr(), scale.data_ptr(), zero
    function(*addresses, run, result.data_ptr(), result.numel(), threads_for(result.numel()))
    return True

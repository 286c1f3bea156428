"""Stored bytes to scaled values on the CPU."""

from __future__ import annotations

from torch import Tensor

from lightning_qat.native.library import FloatFamily, threads_for

_FAMILY = FloatFamily("lookup", {"values": "ppppqpqi", "pairs": "ppppqpqi"})


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
    function = _FAMILY.of("values" if table.element_size() == 4 else "pairs", result.dtype)
    if function is None or not result.is_cpu:
        return False
    zero = 0 if zero_point is None else zero_point.data_ptr()
    addresses = table.data_ptr(), stored.data_ptr(), scale.data_ptr(), zero
    function(*addresses, run, result.data_ptr(), result.numel(), threads_for(result.numel()))
    return True

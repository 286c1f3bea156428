"""Products of few float32 rows with weights in 4 or 8 bits, which are read as they are stored."""

from __future__ import annotations

from ctypes import byref, c_int32
from functools import lru_cache

import torch
from torch import Tensor

from lightning_qat.native.library import Family, threads_for

_FAMILY = Family(
    "linear_float",
    {"linear_float4": "pqqpqpqppqqpppi", "linear_float8": "pqqqpqpqqppi", "linear_float_vectors": "p"},
)

#: Codes of a vector of the 4-bit kernel, and what a group has to be a multiple of: one lane holds eight.
_BLOCK, _WORD = 128, 8
#: What the kernel keeps for each.
_BLOCK_NUMBERS = 18
#: Codes of a vector of the 8-bit kernel.
_LANES = 16


def has_linear_float() -> bool:
    """Return whether these kernels can be used, on this thread and now, and this processor has what makes them fast."""
    return _FAMILY.functions() is not None and _has_vectors()


@lru_cache(maxsize=1)
def _has_vectors() -> bool:
    found = c_int32(0)
    _FAMILY.functions().linear_float_vectors(byref(found))
    return bool(found.value)


def fits_float4(columns: int, group_size: int) -> bool:
    """Return whether the kernel takes rows of so many 4-bit codes, of which ``group_size`` share a scale."""
    return columns % 2 == 0 and (group_size == columns or (columns % group_size == 0 and group_size % _WORD == 0))


def fits_float8(columns: int, group_size: int) -> bool:
    """Return whether the kernel takes rows of so many 8-bit codes, of which ``group_size`` share a scale."""
    return group_size == columns or (columns % group_size == 0 and group_size % _LANES == 0)


def linear_float4(
    x: Tensor,
    packed: Tensor,
    table: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    *,
    high_first: bool,
) -> Tensor | None:
    """Return ``x @ weight.T + bias``, or None where there is no kernel.

    A weight is ``(table[code] - zero) * scale``, in float32, and so are the sums.

    Args:
        x: contiguous float32, ``[tokens, columns]``.
        packed: contiguous uint8, two codes to a byte, row by row.
        table: 16 numbers, float32.
        scale: contiguous float32, ``[rows, groups]``.
        zero: likewise, or None.
        bias: contiguous float32, ``[rows]``, or None.
        high_first: the first code of a byte is in its high half.
    """
    functions = _FAMILY.functions()
    if functions is None:
        return None
    (tokens, columns), (rows, groups) = x.shape, scale.shape
    blocks = -(-columns // _BLOCK)
    scratch, out = x.new_empty(blocks * (tokens * _BLOCK + _BLOCK_NUMBERS)), x.new_empty((tokens, rows))
    functions.linear_float4(
        x.data_ptr(), tokens, columns, packed.data_ptr(), rows, table.data_ptr(), high_first, scale.data_ptr(),
        None if zero is None else zero.data_ptr(), groups, columns // groups,
        None if bias is None else bias.data_ptr(), scratch.data_ptr(), out.data_ptr(), threads_for(rows * columns),
    )  # fmt: skip
    return out


def linear_float8(x: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor | None:
    """Return ``x @ weight.T + bias``, or None where there is no kernel; a weight is ``value * scale``.

    Args:
        x: contiguous float32, ``[tokens, columns]``.
        values: contiguous int8, ``[rows, columns]``.
        scale: contiguous float32, ``[rows, groups]``.
        bias: contiguous float32, ``[rows]``, or None.
    """
    functions = _FAMILY.functions()
    if functions is None:
        return None
    (tokens, columns), (rows, groups) = x.shape, scale.shape
    if columns % _LANES:
        x = torch.nn.functional.pad(x, (0, -columns % _LANES))
    out = x.new_empty((tokens, rows))
    functions.linear_float8(
        x.data_ptr(), tokens, columns, x.shape[1], values.data_ptr(), rows, scale.data_ptr(), groups,
        columns // groups, None if bias is None else bias.data_ptr(), out.data_ptr(), threads_for(rows * columns),
    )  # fmt: skip
    return out

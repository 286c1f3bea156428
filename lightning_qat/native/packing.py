"""Codes of less than 8 bits to bytes and back on the CPU; see :mod:`lightning_qat.ops.packing` for where they are.

Tensors are contiguous and have one byte to a code. Each function is told by its result if it did nothing.
"""

from __future__ import annotations

from torch import Tensor

from lightning_qat.native.library import Family, threads_for

_FAMILY = Family(
    "packing", {"pack_bits": "ppqiii", "unpack_bits": "ppqiii", "pack_nibbles": "ppqii", "unpack_nibbles": "ppqi"}
)


def pack_bits(codes: Tensor, packed: Tensor, bits: int, offset: int) -> bool:
    """Write codes of 2 to 7 bits, ``offset`` added, as a stream without waste; return whether it was done."""
    functions, count = _FAMILY.functions(), codes.numel()
    if functions is None:
        return False
    functions.pack_bits(codes.data_ptr(), packed.data_ptr(), count, bits, offset, threads_for(count))
    return True


def unpack_bits(packed: Tensor, codes: Tensor, bits: int, offset: int) -> bool:
    """Write the codes of a stream, less ``offset``; return whether it was done."""
    functions, count = _FAMILY.functions(), codes.numel()
    if functions is None:
        return False
    functions.unpack_bits(packed.data_ptr(), codes.data_ptr(), count, bits, offset, threads_for(count))
    return True


def pack_nibbles(codes: Tensor, packed: Tensor, fill: int) -> bool:
    """Write two codes a byte, the first in the high nibble, ``fill`` beside a last one; return whether it was done."""
    functions, count = _FAMILY.functions(), codes.numel()
    if functions is None:
        return False
    functions.pack_nibbles(codes.data_ptr(), packed.data_ptr(), count, fill, threads_for(count))
    return True


def unpack_nibbles(packed: Tensor, codes: Tensor) -> bool:
    """Write the codes of such bytes; return whether it was done."""
    functions, count = _FAMILY.functions(), codes.numel()
    if functions is None:
        return False
    functions.unpack_nibbles(packed.data_ptr(), codes.data_ptr(), count, threads_for(count))
    return True

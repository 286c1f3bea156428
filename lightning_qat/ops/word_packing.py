"""Codes in 32-bit words, the first in the lowest bits, as GPTQ, AWQ and compressed-tensors files have them."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_qat.ops.packing import pack_bits, unpack_bits

#: Column of each nibble of an AWQ word, from the lowest bits up.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Return int32 ``[rows, ceil(columns * bits / 32)]``: each row is a stream without waste, lowest bits first.

    Args:
        codes: integers ``0 .. 2**bits - 1``, ``[rows, columns]``.
        bits: 2 to 8. Codes of 3, 5, 6 and 7 bits go across the ends of words; the last word is filled up with 0.
    """
    rows, columns = codes.shape
    filled = torch.nn.functional.pad(codes, (0, -columns % 32))  # 32 codes fill whole words, whatever their bits
    packed = pack_bits(filled, bits, signed=False).view(torch.int32).reshape(rows, -1)
    return packed[:, : -(-columns * bits // 32)].contiguous()


def unpack_words(words: Tensor, bits: int, columns: int) -> Tensor:
    """Return the codes, uint8 ``[rows, columns]``, that :func:`pack_words` packed."""
    rows, count = words.shape
    if count != -(-columns * bits // 32):
        raise ValueError(f"{count} words of 32 bits a row do not hold {columns} codes of {bits} bits")
    filled = torch.nn.functional.pad(words, (0, -count % bits))
    shape = torch.Size((rows, filled.shape[1] * 32 // bits))
    return unpack_bits(filled.contiguous().view(torch.uint8).reshape(-1), bits, shape, signed=False)[:, :columns]


def pack_awq_words(codes: Tensor) -> Tensor:
    """Return int32 ``[rows, columns / 8]``: nibble ``i`` of word ``c`` is column ``8 c + AWQ_ORDER[i]``.

    Args:
        codes: integers 0 to 15, ``[rows, columns]``; ``columns`` is a multiple of 8.
    """
    rows, columns = codes.shape
    order = torch.tensor(AWQ_ORDER, device=codes.device)
    return pack_words(codes.reshape(rows, columns // 8, 8)[:, :, order].reshape(rows, columns), 4)


def unpack_awq_words(words: Tensor) -> Tensor:
    """Return the codes, uint8 ``[rows, words * 8]``, that :func:`pack_awq_words` packed."""
    rows, count = words.shape
    places = torch.tensor(AWQ_ORDER, device=words.device).argsort()
    return unpack_words(words, 4, count * 8).reshape(rows, count, 8)[:, :, places].reshape(rows, count * 8)

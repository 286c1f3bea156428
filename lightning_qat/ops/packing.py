"""Integer codes of 2 to 16 bits as a byte stream without waste, and back.

The stream is one-dimensional, in the order of the flattened codes, lowest bits first: code ``i`` of
``bits`` bits occupies the bits ``i * bits`` to ``(i + 1) * bits - 1``, bit ``k`` being bit ``k % 8`` of
byte ``k // 8``. With 4 bits the low nibble is the even element. More than 8 bits are stored as 16,
two little-endian bytes. Signed codes are stored offset by ``2**(bits-1)``, so that bytes are unsigned.
"""

from __future__ import annotations

import sys
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_qat.native import packing as native
from lightning_qat.ops.affine import codes_dtype
from lightning_qat.ops.affine_cpu import takes_pieces
from lightning_qat.ops.workspace import advise_huge_pages

if TYPE_CHECKING:
    from collections.abc import Sequence

#: Runs of 8 codes that the 3, 5, 6 and 7 bit paths expand to 64-bit integers at a time: 4 MiB of scratch.
_CHUNK_RUNS = 64 * 1024
_BYTES = (torch.int8, torch.uint8)


def packed_size(count: int, bits: int) -> int:
    """Return the bytes that ``count`` codes of ``bits`` bits take, the last byte being padded.

    Raises:
        ValueError: if ``bits`` is not an integer from 2 to 16.
    """
    codes_dtype(bits, signed=False)
    return 2 * count if bits > 8 else -(-count * bits // 8)


def pack_bits(codes: Tensor, bits: int, *, signed: bool) -> Tensor:
    """Return the codes as a new one-dimensional uint8 tensor of ``packed_size(codes.numel(), bits)`` bytes.

    Args:
        codes: any integer dtype, shape and strides.
        bits: 2 to 16; 9 to 16 take two bytes each.
        signed: codes are ``-2**(bits-1) .. 2**(bits-1) - 1`` instead of ``0 .. 2**bits - 1``.

    Raises:
        ValueError: if ``bits`` or a code is out of range, or the dtype is no integer.
    """
    if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
        raise ValueError(f"codes have dtype {codes.dtype}; use an integer dtype")
    size, offset = packed_size(codes.numel(), bits), 2 ** (bits - 1) if signed else 0
    _check_range(codes, bits, offset)
    flat = codes.reshape(-1)
    if bits > 8:
        return _pack_two_bytes(flat, offset)
    if bits == 8:
        # Adding 128 modulo 256 is flipping the highest bit.
        return flat.to(torch.uint8, copy=True).bitwise_xor_(offset)
    narrow = flat.contiguous() if flat.dtype in _BYTES else flat.to(torch.int8)
    if takes_pieces(codes):
        packed = advise_huge_pages(torch.empty(size, dtype=torch.uint8, device="cpu"))
        if native.pack_bits(narrow, packed, bits, offset):
            return packed
    unsigned = (narrow.to(torch.int8) + offset).view(torch.uint8)
    return _pack_within_byte(unsigned, bits) if bits in (2, 4) else _pack_across_bytes(unsigned, bits, size)


def unpack_bits(packed: Tensor, bits: int, shape: Sequence[int], *, signed: bool) -> Tensor:
    """Return the codes that :func:`pack_bits` packed.

    Args:
        packed: uint8, one-dimensional.
        bits: 2 to 16.
        shape: of the codes.
        signed: as packed.

    Returns:
        A new tensor of ``shape``: int8 or uint8 up to 8 bits, int16 or int32 above.

    Raises:
        ValueError: if ``packed`` is not uint8 or not as long as ``shape`` and ``bits`` say.
    """
    count = prod(shape)
    size, dtype = packed_size(count, bits), codes_dtype(bits, signed)
    if packed.dtype != torch.uint8 or packed.numel() != size or packed.dim() != 1:
        raise ValueError(
            f"packed is {packed.dtype} of shape {tuple(packed.shape)}; codes of shape {tuple(shape)} "
            f"with bits={bits} take torch.uint8 of shape ({size},)"
        )
    offset = 2 ** (bits - 1) if signed else 0
    if bits > 8:
        codes = packed[1::2].to(torch.int32).mul_(256).add_(packed[0::2]).sub_(offset)
        return codes.to(dtype).reshape(tuple(shape))
    if bits == 8:
        return packed.bitwise_xor(offset).view(dtype).reshape(tuple(shape))
    if takes_pieces(packed):
        codes = advise_huge_pages(torch.empty(tuple(shape), dtype=dtype, device="cpu"))
        if native.unpack_bits(packed.contiguous(), codes, bits, offset):
            return codes
    unsigned = _unpack_within_byte(packed, bits) if bits in (2, 4) else _unpack_across_bytes(packed, bits, count)
    return (unsigned[:count].view(torch.int8) - offset).view(dtype).reshape(tuple(shape))


def _check_range(codes: Tensor, bits: int, offset: int) -> None:
    if codes.numel() == 0:
        return
    low, high = -offset, 2**bits - 1 - offset
    smallest, largest = (int(v) for v in torch.aminmax(codes))
    if smallest < low or largest > high:
        raise ValueError(
            f"codes reach from {smallest} to {largest}; bits={bits}, signed={offset > 0} stores {low} to {high}"
        )


def _pack_two_bytes(flat: Tensor, offset: int) -> Tensor:
    unsigned = flat.to(torch.int32) + offset
    packed = torch.empty(len(flat), 2, dtype=torch.uint8, device=flat.device)
    packed[:, 0] = unsigned  # Conversion to an unsigned type is modulo 256.
    packed[:, 1] = unsigned >> 8
    return packed.view(-1)


def _pack_within_byte(unsigned: Tensor, bits: int) -> Tensor:
    """Pack 2 or 4 bits: several whole codes in each byte."""
    per_byte = 8 // bits
    if bits == 4 and sys.byteorder == "little" and unsigned.storage_offset() % 2 == 0:
        # Two codes as one number of 16 bits: a quarter of the time of picking every other byte.
        even = unsigned if len(unsigned) % 2 == 0 else torch.nn.functional.pad(unsigned, (0, 1))
        pairs = even.view(torch.int16)
        return (pairs | (pairs >> 4)).to(torch.uint8)
    lanes = torch.nn.functional.pad(unsigned, (0, -len(unsigned) % per_byte)).view(-1, per_byte)
    packed = lanes[:, 0].clone()
    for lane in range(1, per_byte):
        packed |= lanes[:, lane] << (lane * bits)
    return packed


def _unpack_within_byte(packed: Tensor, bits: int) -> Tensor:
    per_byte = 8 // bits
    lanes = [(packed >> (lane * bits)) & (2**bits - 1) for lane in range(per_byte)]
    return torch.stack(lanes, dim=1).view(-1)


def _pack_across_bytes(unsigned: Tensor, bits: int, size: int) -> Tensor:
    """Pack 3, 5, 6 or 7 bits: 8 codes fill ``bits`` bytes and fit a 64-bit integer."""
    runs = torch.nn.functional.pad(unsigned, (0, -len(unsigned) % 8)).view(-1, 8)
    code_shifts = torch.arange(8, device=unsigned.device) * bits
    byte_shifts = torch.arange(bits, device=unsigned.device) * 8
    packed = unsigned.new_empty(len(runs), bits)
    for start in range(0, len(runs), _CHUNK_RUNS):
        words = (runs[start : start + _CHUNK_RUNS].to(torch.int64) << code_shifts).sum(dim=1, keepdim=True)
        packed[start : start + _CHUNK_RUNS] = (words >> byte_shifts) & 255
    return packed.view(-1)[:size].clone()


def _unpack_across_bytes(packed: Tensor, bits: int, count: int) -> Tensor:
    runs = torch.nn.functional.pad(packed, (0, -len(packed) % bits)).view(-1, bits)
    code_shifts = torch.arange(8, device=packed.device) * bits
    byte_shifts = torch.arange(bits, device=packed.device) * 8
    unsigned = packed.new_empty(len(runs), 8)
    for start in range(0, len(runs), _CHUNK_RUNS):
        words = (runs[start : start + _CHUNK_RUNS].to(torch.int64) << byte_shifts).sum(dim=1, keepdim=True)
        unsigned[start : start + _CHUNK_RUNS] = (words >> code_shifts) & (2**bits - 1)
    return unsigned.view(-1)[:count]

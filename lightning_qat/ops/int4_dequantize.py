"""From packed 4-bit integers straight to values: two codes looked up at once, no unpacked copy.

For layouts in which the elements that share a scale lie next to each other: per tensor, per row, per group.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_qat.ops.affine import dequantize_affine
from lightning_qat.ops.lookup_cpu import write_lookups
from lightning_qat.ops.packing import unpack_bits
from lightning_qat.ops.workspace import advise_huge_pages

if TYPE_CHECKING:
    from collections.abc import Sequence


def int4_run(shape: Sequence[int], axis: int | None, group_size: int | None) -> int | None:
    """Return how many neighbouring elements share a scale, or None where they are no neighbours.

    Args:
        shape: of the tensor.
        axis: of the channels.
        group_size: elements of a group.
    """
    if group_size is not None:
        return group_size
    if axis is None:
        return prod(shape)
    return prod(shape[1:]) if axis == 0 else None


def dequantize_int4(
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    shape: Sequence[int],
    run: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return ``(code - zero_point) * scale``, computed in float32 and then cast.

    Equal to unpacking and ``dequantize_affine``, bit for bit.

    Args:
        packed: of ``pack_bits(codes, 4, signed=zero_point is None)``.
        scale: one for each run, in order.
        zero_point: shaped as ``scale``; None for signed codes.
        shape: of the result.
        run: see :func:`int4_run`.
        dtype: of the result, floating point.
    """
    return int4_dequantize_op(packed, scale, zero_point, prod(shape), run, dtype).view(tuple(shape))


@torch.library.custom_op("lightning_qat::int4_dequantize", mutates_args=())
def int4_dequantize_op(
    packed: Tensor, scale: Tensor, zero_point: Tensor | None, numel: int, run: int, dtype: torch.dtype
) -> Tensor:
    """The unchecked op behind :func:`dequantize_int4`: one-dimensional values."""
    return reference_int4_dequantize(packed, scale, zero_point, numel, run, dtype)


def reference_int4_dequantize(
    packed: Tensor, scale: Tensor, zero_point: Tensor | None, numel: int, run: int, dtype: torch.dtype
) -> Tensor:
    """The definition, by way of the codes."""
    if not numel:
        return scale.new_empty(0, dtype=dtype)
    codes = unpack_bits(packed, 4, (numel,), signed=zero_point is None)
    zero = None if zero_point is None else zero_point.reshape(-1)
    return dequantize_affine(codes, scale.reshape(-1), zero, group_size=run, dtype=dtype)


@int4_dequantize_op.register_fake
def _(packed: Tensor, scale: Tensor, zero_point: Tensor | None, numel: int, run: int, dtype: torch.dtype) -> Tensor:
    return scale.new_empty(numel, dtype=dtype)


@int4_dequantize_op.register_kernel("cpu")
def int4_dequantize_cpu(
    packed: Tensor, scale: Tensor, zero_point: Tensor | None, numel: int, run: int, dtype: torch.dtype
) -> Tensor:
    """The definition by table: 4096 x 4096 in groups of 128 takes a seventh of the time."""
    result = advise_huge_pages(torch.empty(numel, dtype=dtype, device="cpu"))
    if not numel:
        return result
    packed, scales = packed.reshape(-1), scale.reshape(-1).float()
    zeros = None if zero_point is None else torch.round(zero_point.reshape(-1).float())
    table = _pair_table(zero_point is None)
    if run % 2 and numel > run:  # runs begin in the middle of a byte
        packed = torch.stack((packed & 15, packed >> 4), dim=1).view(-1)[:numel]
        table = table.view(torch.float32)[::2][:16].contiguous()
    write_lookups(table, packed, scales, zeros, run, result)
    return result


@lru_cache(maxsize=2)
def _pair_table(signed: bool) -> Tensor:
    """Return both codes of every byte as numbers, the low nibble first, as one 8-byte element that is only copied."""
    byte, offset = torch.arange(256, device="cpu"), 8 if signed else 0
    pairs = torch.stack(((byte & 15) - offset, (byte >> 4) - offset), dim=1)
    return pairs.to(torch.float32).view(torch.float64).view(-1)

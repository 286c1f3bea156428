"""Products of few float tokens and packed weights on the CPU, by kernels of our own that read a weight as it is stored.

Four bits, integers or a codebook, and int8. Every weight is the one that the definition dequantizes, in float32, so are
the inputs, and sums are float32, so a product is as near to the exact one as PyTorch's with the dequantized weight. NaN
and infinities go the way of floats. A token's output does not depend on how many there are, nor on the threads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_qat.native.linear_float import fits_float4, fits_float8, has_linear_float, linear_float4, linear_float8
from lightning_qat.ops.codebook_tables import codebook

#: Tokens times weights, by the bits of a code, up to which this is faster than what there is for more tokens of weights
#: without groups: digits of eight bits. One core, milliseconds of this and of them, int8: 4096 x 4096, four tokens 2.2
#: and 2.4, eight 3.8 and 3.0; 2048 x 2048, twelve tokens 1.5 and 1.6, sixteen 1.7 and 1.5.
_PRODUCTS_WITHOUT_GROUPS = {4: 128 * 2**20, 8: 64 * 2**20}
#: For weights in groups or blocks that is dequantizing: int4 in groups of 128, 64 tokens 20 and 45, 128 tokens 41 and
#: 59; nf4, 64 tokens 28 and 45. In 16 bits a product costs next to nothing: 64 tokens 21 and 26, nf4 29 and 26.
_MOST_IN_WIDE_GROUPS, _MOST_IN_GROUPS = 128, 64
#: Codes in groups this wide have a table of their values made for each.
_WIDE_GROUP = 128

#: With fewer weights dequantizing them for a product of the library takes no longer than this room's calls.
_FEWEST_WEIGHTS = 128 * 128


@dataclass(frozen=True)
class FloatWeight:
    """A weight as :func:`float_linear` reads it.

    Attributes:
        codes: uint8, two to a byte, or int8 ``[out_features, in_features]``; as they are stored, where possible.
        scale: float32, ``[out_features, groups]``.
        zero: likewise, or None.
        table: what 4-bit codes stand for; None for int8.
        high_first: whether the first code of a byte is in its high half.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    table: Tensor | None
    high_first: bool


def four_bits_fit(rows: int, columns: int, group_size: int) -> bool:
    """Return whether 4-bit codes ``[rows, columns]``, ``group_size`` of which share a scale, are read as stored."""
    return _pays(rows, columns) and fits_float4(columns, group_size)


def eight_bits_fit(rows: int, columns: int, group_size: int) -> bool:
    """Return whether int8 codes ``[rows, columns]``, ``group_size`` of which share a scale, are read as stored."""
    return _pays(rows, columns) and fits_float8(columns, group_size)


def most_tokens(bits: int, rows: int, columns: int, group_size: int, dtype: torch.dtype) -> int:
    """Return up to how many tokens this is the fastest way, as measured.

    Args:
        bits: of the codes as they are read, 4 or 8.
        rows: of the weight.
        columns: of the weight.
        group_size: columns that share a scale.
        dtype: of the input.
    """
    if group_size >= columns:
        return max(1, min(_MOST_IN_GROUPS, _PRODUCTS_WITHOUT_GROUPS[bits] // (rows * columns)))
    most = _MOST_IN_WIDE_GROUPS if bits == 4 and group_size % _WIDE_GROUP == 0 else _MOST_IN_GROUPS
    return most if dtype == torch.float32 else most // 2


def _pays(rows: int, columns: int) -> bool:
    return rows * columns >= _FEWEST_WEIGHTS and has_linear_float()


def of_four_bits(
    packed: Tensor, scale: Tensor, zero: Tensor | None, rows: int, group_size: int, name: str | None
) -> FloatWeight:
    """Return a weight of 4-bit codes.

    Args:
        packed: of ``pack_bits``, or with ``name`` of ``pack_nibbles``.
        scale: of each ``group_size`` codes, in order.
        zero: shaped as ``scale``, of unsigned integers; None says that they are signed.
        rows: of the weight.
        group_size: a divisor of its columns.
        name: of a codebook; None for integers.
    """
    if name is None:
        table = torch.arange(16, dtype=torch.float32, device="cpu") - (8.0 if zero is None else 0.0)
    else:
        table = codebook(name, torch.device("cpu"))
    steps = scale.detach().to(torch.float32).reshape(rows, -1).contiguous()
    offset = None if zero is None else torch.round(zero.to(torch.float32)).reshape(rows, -1).contiguous()
    return FloatWeight(packed.contiguous(), steps, offset, table.contiguous(), name is not None)


def of_eight_bits(values: Tensor, scale: Tensor) -> FloatWeight:
    """Return a weight of int8 values.

    Args:
        values: code - zero point, ``[out_features, in_features]``.
        scale: one, or for each row, or for each group of each row, in order.
    """
    rows = values.shape[0]
    steps = scale.detach().to(torch.float32).reshape(-1)
    steps = (steps.expand(rows) if steps.numel() == 1 else steps).reshape(rows, -1)
    return FloatWeight(values.contiguous(), steps.contiguous(), None, None, False)


def float_linear(x: Tensor, weight: FloatWeight, bias: Tensor | None) -> Tensor:
    """Return ``x @ weight.T + bias`` in the dtype of ``x``, summed in float32.

    Args:
        x: ``[..., in_features]``, floating point up to 32 bits, not empty.
        weight: of :func:`of_four_bits` or :func:`of_eight_bits`.
        bias: ``[out_features]`` or None.
    """
    # Each operation that changes nothing costs its call.
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    rows = rows if rows.dtype == torch.float32 else rows.to(torch.float32)
    shift = bias if bias is None or bias.dtype == torch.float32 else bias.to(torch.float32)
    shift = None if shift is None else shift.contiguous()
    result: Any
    if weight.table is None:
        result = linear_float8(rows.contiguous(), weight.codes, weight.scale, shift)
    else:
        held = (weight.codes, weight.table, weight.scale, weight.zero)
        result = linear_float4(rows.contiguous(), *held, shift, high_first=weight.high_first)
    result = result if x.dim() == 2 else result.view(*x.shape[:-1], -1)
    return result if x.dtype == torch.float32 else result.to(x.dtype)

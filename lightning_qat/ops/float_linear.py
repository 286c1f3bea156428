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

#: Tokens up to which this is faster than what there is for more.
FEW_TOKENS = 32
#: The same for weights in groups or blocks and float32, which for more tokens are dequantized: 4096 x 4096 in groups of
#: 128, one core: 64 tokens 20 ms, dequantizing and multiplying 40.
FEW_TOKENS_IN_GROUPS = 64

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

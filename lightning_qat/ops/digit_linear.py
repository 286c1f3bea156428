"""Products of float inputs and integer weights on the CPU: the inputs as digits of eight bits.

Weight-only quantization keeps the inputs in float. Dequantizing a weight to multiply it costs more than the
product, so here the input takes on integers instead: every value becomes a number of 31 bits, in fixed point
relative to the largest magnitude of its block (its token, or its token's share of a group of weights), and that
four digits of eight bits around zero::

    x = 2**e * (d3 * 2**24 + d2 * 2**16 + d1 * 2**8 + d0) * 2**-30,   -128 <= d <= 127,  |x| < 2**e

Each digit is a row of oneDNN's uint8 x int8 kernel (:mod:`lightning_qat.ops.integer_linear`), which sums exactly in
int32; the sums of the four rows, and of the groups, are put together in float32. So the weights are read as int8,
once for the four digits of several tokens.

The error, against exact arithmetic. Float32 values of at least ``2**-6`` of the largest of their block are digits
exactly; the rest are off by at most ``2**(e - 31) <= 2**-30`` of it, which float32 itself loses when it adds them to a
sum of that size: the whole sum is off by at most ``2**-30 * max|x| * sum|w|`` in a block, whatever the weights.
Rounding: ``|d| * 2**(8 * i) <= 2 |x|`` for every digit, in the same units, so the float32 arithmetic on the sums errs
by a few ``2**-24 * sum|x w|``, as float32 products do.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from lightning_qat.ops.integer_linear import (
    MAX_TERMS,
    SIGNED_OFFSET,
    LinearWeight,
    linear_is_exact,
    multiply_codes,
    pack_linear,
)

#: Digits of an input.
DIGITS = 4

#: Columns and groups of one product: the digits of several groups are its rows, each zero in the columns of the
#: others. 4096 x 4096 in groups of 128, one token: 0.76 ms in 16 products of two groups, 0.65 in 8 of four (which for
#: more tokens is slower, by up to a half), 0.77 in 4 of eight, 1.15 in 32 of one.
_COLUMNS = 512
_GROUPS = 4

#: Tokens that are computed at once, and these times the groups of the weight: what lies between stays small.
_TOKENS = 32
_TOKEN_GROUPS = 512

#: With fewer weights dequantizing them takes less than the steps around an integer product: 512 x 512 takes 0.10 ms
#: so and 0.15 in digits, 1024 x 1024 takes 1.6 and 0.6.
_FEWEST_WEIGHTS = 1024 * 1024

#: Groups this wide go one to a product, or nearly so.
_WIDE_GROUP = 256

#: Tokens for each weight of a group up to which digits are faster. 4096 x 4096 in 4 bits, milliseconds of one core: a
#: token costs 3.7, 2.1 and 1.1 in groups of 32, 64 and 128; dequantizing 25, and 0.6 a token. Groups of 256 and more,
#: one to a product, cost 0.4 a token, weights without groups 0.2.
_TOKENS_PER_COLUMN = 0.25

#: Added to a number of 31 bits, it makes each byte a digit plus 128 (0x80808080 as int32).
_OFFSETS = 0x80808080 - 2**32

#: 1.0 in fixed point; values are below 2.0, beside the power of two of their block.
_ONE = 2.0**29

#: What the lowest digit counts for: see ``DigitWeight.digit_values``.
_LOWEST = 2.0**48

_EXPONENT_BITS = 0x7F800000
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class DigitWeight:
    """A weight as :func:`digit_linear` reads it: int8 codes, a second copy beside the layer's, and no float one.

    Attributes:
        parts: one for each product, ``step`` groups wide.
        scale: ``[parts, 1, step, out_features]``; None without groups, where the kernel has it.
        step: groups of a part.
        groups: of the weight; 1 without groups.
        exponent: scales are kept relative to this power of two.
        digit_values: what the digits count for, from the lowest, times a power of two that keeps their float32 sums,
            whatever the scales, clear of underflow and overflow.
    """

    parts: tuple[LinearWeight, ...]
    scale: Tensor | None
    step: int
    groups: int
    exponent: int
    digit_values: Tensor
    out_features: int


def pack_digits(values: Tensor, scale: Tensor, group_size: int | None = None) -> DigitWeight:
    """Return a weight as :func:`digit_linear` reads it.

    Args:
        values: code - zero point, int8, ``[out_features, in_features]``.
        scale: finite; one element, ``[out_features]``, or with ``group_size`` ``[out_features, groups]``.
        group_size: columns that share a scale; must divide ``in_features``. None is all of them.

    Raises:
        ValueError: if one exact sum would be longer than ``MAX_TERMS``.
    """
    columns = values.shape[1]
    size = columns if group_size is None else group_size
    if size > MAX_TERMS:
        raise ValueError(f"sums of {size} products do not fit int32; use group_size={MAX_TERMS} or less")
    scale = scale.detach().double()
    exponent = math.frexp(scale.abs().max().item())[1]
    relative = (scale * 2.0**-exponent).float()
    digit_values = relative.new_tensor([_LOWEST * 256.0**i for i in range(DIGITS)])
    if size == columns:
        return DigitWeight((pack_linear(values, relative, few=False),), None, 1, 1, exponent, digit_values, len(values))
    groups = columns // size
    step = max(n for n in range(1, _GROUPS + 1) if groups % n == 0 and (n == 1 or n * size <= _COLUMNS))
    parts = tuple(pack_linear(part, relative.new_ones(1), few=False) for part in values.split(step * size, 1))
    by_part = relative.t().reshape(len(parts), 1, step, -1)
    return DigitWeight(parts, by_part, step, groups, exponent, digit_values, len(values))


def digit_linear(x: Tensor, weight: DigitWeight, bias: Tensor | None) -> Tensor:
    """Return ``x @ weight.T + bias`` in the dtype of ``x``, to float32's precision.

    Args:
        x: ``[..., in_features]``, floating point up to 32 bits, finite, not empty.
        weight: of :func:`pack_digits`.
        bias: ``[out_features]`` or None.
    """
    rows = x.reshape(-1, weight.groups, x.shape[-1] // weight.groups).to(torch.float32).contiguous()
    # The exponent bits of the largest magnitude are, as a float, the power of two that is at most as large.
    bits = torch.linalg.vector_norm(rows, math.inf, 2, keepdim=True).view(torch.int32).bitwise_and_(_EXPONENT_BITS)
    powers = bits.view(torch.float32).clamp_min_(_TINY)
    most = max(1, min(_TOKENS, _TOKEN_GROUPS // weight.groups))
    blocks = zip(rows.split(most), powers.split(most), strict=True)
    results = [_multiply(*block, weight, bias) for block in blocks]
    result = results[0] if len(results) == 1 else torch.cat(results)
    return result.view(*x.shape[:-1], result.shape[-1]).to(x.dtype)


def digits_pay(tokens: int, weight: tuple[int, int], group_size: int | None) -> bool:
    """Return whether :func:`digit_linear` is faster than dequantizing the weight, as measured.

    Args:
        tokens: rows of the input.
        weight: ``(out_features, in_features)``.
        group_size: columns that share a scale, or None.
    """
    if weight[0] * weight[1] < _FEWEST_WEIGHTS:
        return False
    return group_size is None or group_size >= _WIDE_GROUP or tokens <= _TOKENS_PER_COLUMN * group_size


@lru_cache(maxsize=1)
def digits_are_exact() -> bool:
    """Return whether this machine sums digits exactly: its kernel does, and the lowest byte comes first."""
    return linear_is_exact() and sys.byteorder == "little"


def _multiply(rows: Tensor, powers: Tensor, weight: DigitWeight, bias: Tensor | None) -> Tensor:
    """Return the outputs, float32, of some tokens ``[tokens, groups, columns]``."""
    tokens, step, parts = rows.shape[0], weight.step, len(weight.parts)
    # Exact: both are steps by powers of two, and what gets too small for float32 is zero in fixed point.
    numbers = torch.div(rows, powers).mul_(_ONE).round_().to(torch.int32).add_(_OFFSETS)
    digits = _digit_rows(numbers, step)
    largest = powers.amax(1)
    factors = torch.div(powers, largest.unsqueeze(1)) * weight.digit_values
    factors = factors.view(tokens, parts, step, DIGITS).transpose(0, 1).reshape(-1, 1, DIGITS)
    sums = [multiply_codes(digits[i], 1.0, SIGNED_OFFSET, part, None) for i, part in enumerate(weight.parts)]
    stacked = sums[0] if parts == 1 else torch.cat(sums)
    products = torch.bmm(factors, stacked.view(-1, DIGITS, weight.out_features))
    if weight.scale is None:
        total = products.view(tokens, -1)
    elif tokens == 1:  # one sum over all groups is faster than one over two dimensions
        total = products.view(parts * step, -1).mul_(weight.scale.view(parts * step, -1)).sum(0, keepdim=True)
    else:
        total = products.view(parts, tokens, step, -1).mul_(weight.scale).sum((0, 2))
    # In float64, whose range no product of powers leaves.
    result = torch.mul(total, largest.double().mul_(2.0**weight.exponent / (_ONE * _LOWEST)))
    return (result if bias is None else result.add_(bias)).float()


def _digit_rows(numbers: Tensor, step: int) -> Tensor:
    """Return the bytes of int32 ``[tokens, groups, columns]`` as ``[parts, tokens * step * DIGITS, step * columns]``.

    A row holds one digit, from the lowest, of one of the ``step`` groups of a part; in the columns of the others it
    is zero.
    """
    tokens, groups, columns = numbers.shape
    digits = numbers.view(torch.uint8).view(tokens, groups // step, step, columns, DIGITS).permute(1, 0, 4, 3, 2)
    if step == 1:
        return digits.squeeze(4).reshape(groups, -1, columns)
    rows = digits.new_full((groups // step, tokens, step, DIGITS, step, columns), SIGNED_OFFSET)
    rows.diagonal(0, 2, 4).copy_(digits)
    return rows.view(groups // step, -1, step * columns)

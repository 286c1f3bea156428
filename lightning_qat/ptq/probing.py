"""Which channel of a source makes each input channel of a layer, told by powers of two.

Multiplying by a power of two is exact in floating point, and so is everything linear that follows: channels that come
out multiplied by just the power they were given carry its exponent, and some digits of these are the channel's number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import gcd

import torch
from torch import Tensor

#: Powers of two that a channel is multiplied by: 2**-4 to 2**-1 and 2**1 to 2**4. Further ones leave the range of
#: float16, and 2**0 is what inputs have that the channel has no part in.
LEVELS = 8
_HALF = LEVELS // 2
#: What is said of a channel that is 0 everywhere.
SILENT = -1
#: Units in the last place of the largest number that may differ.
_INPUT_UNITS = 16
#: Share of the largest number that is no rounding in any dtype. 256 units of bfloat16 would be twice the largest.
_LARGEST_SHARE = 2**-4
#: Units in the last place of a number itself, and the share of all numbers that may differ by more: powers of two are
#: exact in any dtype, so that what differs is what another reader makes of them.
_OWN_UNITS, _MOST_OFF = 4, 1 / 8

#: Gives the source's channels these levels and returns those that the layer's inputs got, or None.
Probe = Callable[[Tensor], "Tensor | None"]


def factor_of(levels: Tensor) -> Tensor:
    """Return the powers of two of levels ``0 .. LEVELS - 1``, float32."""
    return torch.exp2((levels - _HALF + (levels >= _HALF)).float())


def channels_told(count: int, size: int, probe: Probe) -> Tensor | None:
    """Return the channel, of ``count``, that makes each of ``size`` inputs, int64; None if some have no single one."""
    numbers = torch.arange(count) * _coprime(count) % count  # neighbours get digits far apart
    code, position = torch.zeros(size, dtype=torch.int64), 1
    while position < max(count, 2):
        digits = numbers // position % LEVELS
        levels = probe(digits)
        if levels is None:
            return None
        silent = levels == SILENT
        if count == size and position == 1 and bool(((levels == digits) | silent).all()):
            return torch.arange(count)  # one to one; whether by chance is left to the proof, which takes other powers
        if bool(silent.any()):
            return None
        code += levels * position
        position *= LEVELS
    if bool((code >= count).any()):
        return None
    channel = torch.empty(count, dtype=torch.int64)
    channel[numbers] = torch.arange(count)
    return channel[code]


def _coprime(count: int) -> int:
    """Return a number near the golden section of ``count`` without a divisor in common with it."""
    factor = max(int(count * 0.618), 1)
    while gcd(factor, count) > 1:
        factor -= 1
    return factor


def levels_between(before: Sequence[Tensor], after: Sequence[Tensor]) -> Tensor | None:
    """Return which level multiplied each channel of a layer's inputs, int64 ``[size]``; None if not all have one.

    Args:
        before: inputs of all calls, ``[..., size]``.
        after: the same with a source's channels multiplied.
    """
    if len(before) != len(after) or any(a.shape != b.shape for a, b in zip(before, after, strict=True)):
        return None
    size = before[0].shape[-1]
    wide = wide_dtype(before[0])
    old, new = (torch.cat([x.reshape(-1, size).to(wide) for x in part]) for part in (before, after))
    if not len(old):
        return None
    largest, grown = old.abs().amax(0), new.abs().amax(0)
    silent = (largest == 0) & (grown == 0)
    ratio = torch.where(silent, 1.0, grown / largest)
    exponent = torch.where(silent, 1.0, ratio.log2().round().nan_to_num(0.0, 0.0, 0.0))
    if not bool(((exponent != 0) & (exponent.abs() <= _HALF)).all()):
        return None
    levels = exponent + _HALF - (exponent > 0).to(exponent.dtype)
    factor = factor_of(levels)
    tolerance = _INPUT_UNITS * rounding(before[0].dtype) * largest * factor
    if not bool(((new - old * factor).abs() <= tolerance).all()):
        return None
    return torch.where(silent, float(SILENT), levels).long().cpu()


def agree(actual: Tensor, expected: Tensor, units: int) -> bool:
    """Return whether two tensors differ by at most some units in the last place of the largest number.

    Where that says little, because few digits are kept, most numbers also have to agree in all but their own last ones.
    """
    if actual.shape != expected.shape:
        return False
    finite, eps = torch.isfinite(expected), rounding(expected.dtype)
    wide = wide_dtype(expected)
    difference, size = (actual.to(wide) - expected.to(wide)).abs(), expected.to(wide).abs()
    largest = float(size[finite].max()) if bool(finite.any()) else 0.0
    coarse = units * eps > _LARGEST_SHARE
    tolerance = _LARGEST_SHARE * largest if coarse else units * eps * largest
    same = actual.eq(expected) | (actual.isnan() & expected.isnan())
    if not bool(torch.where(finite, difference <= tolerance, same).all()):
        return False
    off = finite & (difference > _OWN_UNITS * eps * size)
    return not coarse or int(off.sum()) <= _MOST_OFF * off.numel()


def rounding(dtype: torch.dtype) -> float:
    """Return the unit in the last place of 1; norms of float64 models may compute in float32 inside."""
    return max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """Return what to compute in: float32, or the dtype itself where it is wider."""
    return torch.promote_types(tensor.dtype, torch.float32)

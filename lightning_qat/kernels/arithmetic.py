"""Rounding, clamping and division as the definitions do them, bit for bit, in few instructions.

They hold without fused multiply-adds (``enable_fp_fusion=False``); where one is wanted it is written out.
"""

from __future__ import annotations

import triton
import triton.language as tl

_PROPAGATE = tl.constexpr(tl.PropagateNan.ALL)
#: From here on every float32 is an integer.
_INTEGERS = tl.constexpr(8388608.0)


@triton.jit
def clamp(value, low, high):
    """Return ``value`` within bounds; NaN stays NaN."""
    return tl.minimum(tl.maximum(value, low, propagate_nan=_PROPAGATE), high, propagate_nan=_PROPAGATE)


@triton.jit
def magnitude(value, AXIS: tl.constexpr):
    """Return the largest absolute value along an axis; NaN where there is a NaN.

    Without its sign a float32 is ordered as its bits are, with NaN above infinity. (The reductions of floats leave
    NaN out on a GPU, and a test for it besides takes twice as many instructions.)
    """
    bits = value.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.max(bits, axis=AXIS).to(tl.float32, bitcast=True)


@triton.jit
def round_small(value, signed):
    """Return the nearest integers, halves to the even one, where ``|value| <= 2**23``, with the sign of ``signed``."""
    # Between 2**23 and 2**24 floats are the integers, so the addition rounds.
    rounded = (tl.abs(value) + _INTEGERS) - _INTEGERS
    sign = signed.to(tl.int32, bitcast=True) & -2147483648
    return (rounded.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def round_half_even(value):
    """Return the nearest integers, halves to the even one, of any float32; the sign of a zero stays."""
    return tl.where(tl.abs(value) < _INTEGERS, round_small(value, value), value)


@triton.jit
def divisor_of(step):
    """Return what :func:`divide` needs of a divisor: ``factor, divisor, reciprocal, rest``.

    ``x / step == (x * factor) / divisor``, with a factor that is a power of two and carries the sign, and a divisor
    between 2**-60 and 2**60, so that nothing in :func:`divide` under- or overflows that matters.
    """
    size = tl.abs(step)
    shift = tl.where(size < 2.0**-60, 2.0**100, tl.where(size > 2.0**60, 2.0**-100, 1.0))
    divisor = size * shift
    reciprocal = tl.div_rn(1.0, divisor)
    rest = tl.fma(-divisor, reciprocal, 1.0) * reciprocal
    return tl.where(step < 0, -shift, shift), divisor, reciprocal, rest


@triton.jit
def divide(value, divisor, reciprocal, rest):
    """Return the correctly rounded quotient of ``value``, already multiplied by the factor and clamped.

    Four instructions where ``tl.div_rn`` takes eleven, among them a branch and two of the slow unit, which made the
    kernels wait for arithmetic instead of memory. ``reciprocal + rest`` is 1 / divisor to 47 bits, so the first
    quotient is within 0.5001 units in the last place; the remainder is exact; and correcting by it rounds correctly
    (Markstein 1990; Brisebarre, Muller and Raina 2004), as long as remainders are normal: for quotients of 2**-50
    and more. Smaller ones may differ in the last place, and a zero in its sign; they have the same code.
    """
    quotient = tl.fma(value, reciprocal, value * rest)
    remainder = tl.fma(-divisor, quotient, value)
    return tl.fma(remainder, reciprocal, quotient)

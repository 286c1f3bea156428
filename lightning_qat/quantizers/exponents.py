"""What learned parameters of scales and zero points stand for, see :mod:`lightning_qat.quantizers.learned_scale`.

Single numbers are computed as Python's on a CPU: an operation on one element costs its call, a hundred times the work.
"""

from __future__ import annotations

import math
import struct

import torch
from torch import Tensor

from lightning_qat.native.fake_quantize import scales_of_exponents
from lightning_qat.ops.affine_cpu import takes_pieces
from lightning_qat.ops.straight_through import full_float32

#: Beyond these exponents a float32 scale is 0, denormal or infinite.
LEAST, MOST = -126.0, 127.0

#: Bits of a float32's mantissa as a factor, and the bit pattern of 1.0.
_MANTISSA, _ONE = float(2**23), 0x3F800000

_SINGLE, _PATTERN = struct.Struct("f"), struct.Struct("i")
_LARGEST = torch.finfo(torch.float32).max


def scale_of(exponent: Tensor) -> Tensor:
    """Return the scales, float32, that ``exponent`` stands for; the same bits on every device."""
    exponent = exponent.detach()
    made = scale_where_right(exponent, exponent.shape) if takes_pieces(exponent) else None
    return _by_operations(exponent) if made is None else made


def _by_operations(exponent: Tensor) -> Tensor:
    return ((exponent.to(torch.float32) * _MANTISSA).to(torch.int32) + _ONE).view(torch.float32)


def scale_where_right(exponent: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """Return the scales of a plain CPU tensor in ``shape``; None where one of them would be none."""
    if exponent.numel() == 1:
        value = exponent.item()
        if not LEAST <= value <= MOST:  # a NaN neither
            return None
        return full_float32(shape, _SINGLE.unpack(_PATTERN.pack(int(value * _MANTISSA) + _ONE))[0])
    made = scales_of_exponents(exponent, shape, LEAST, MOST)
    if made is not None:
        return made[0] if made[1] else None
    if exponent.numel():
        low, high = exponent.aminmax()
        if not (low.item() >= LEAST and high.item() <= MOST):
            return None
    return _by_operations(exponent).view(shape)


def exponent_of(scale: Tensor) -> Tensor:
    """Return the exponents, float32, of positive float32 scales; exact to the precision of a float32."""
    return (scale.detach().to(torch.float32).contiguous().view(torch.int32) - _ONE).to(torch.float32) / _MANTISSA


def position(offset: Tensor, bits: int) -> Tensor:
    """Return the zero point before it is rounded: the range of an integer grid contains zero."""
    return offset.clamp(0.0, 1.0) * float(2**bits - 1)


def zero_point_where_right(offset: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor | None:
    """Return the zero points, int32, of a plain CPU tensor in ``shape``; None where one of them would be none."""
    if offset.numel() == 1:
        share = offset.item()
        if not math.isfinite(share):
            return None
        code = round(single(min(max(share, 0.0), 1.0) * (2**bits - 1)))  # halves to even, as ``torch.round``
        return torch.full(shape, code, dtype=torch.int32, device="cpu")
    if not offset.isfinite().all():
        return None
    return torch.round(position(offset, bits)).to(torch.int32).view(shape)


def single(value: float) -> float:
    """Return a number as float32 has it."""
    if not abs(value) <= _LARGEST:
        return value if math.isnan(value) else math.copysign(math.inf, value)
    found: float = _SINGLE.unpack(_SINGLE.pack(value))[0]
    return found

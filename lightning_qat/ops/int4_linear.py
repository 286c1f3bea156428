"""Products of bfloat16 inputs and packed 4-bit weights in groups, by PyTorch's own CPU kernel.

The scales of the kernel are bfloat16 and the trained ones float32, so each is given in two parts, ``high + low``, and
the weight, half a byte each, is read twice. Sums are float32. What is left is one more rounding of the result to
bfloat16: nearer to the exact product than a weight that is dequantized to bfloat16 first.

It is taken where :mod:`lightning_qat.ops.float_linear` has no kernel: without a compiler, or wide vectors.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

#: What the kernel takes: columns that share a scale, and rows in multiples of this.
INT4_GROUPS = (32, 64, 128, 256)
INT4_ROWS = 16

#: Tokens up to which this is faster than dequantizing the weight for one product of the library. 2048 x 2048 in groups
#: of 128 on one core with AMX, beside busy processes: 8 tokens took 2.2 ms and 17, 16 took 13 and 17, 64 took 46 and
#: 19, 256 took 237 and 18.
INT4_TOKENS = 16

#: The kernel's codes are 0 to 15 and stand for code - 8.
_MIDDLE = 8


@dataclass(frozen=True)
class Int4Weight:
    """A packed weight, a second copy beside the layer's, with scale and offset of each group in two parts."""

    codes: Tensor
    high: Tensor
    low: Tensor
    group_size: int


def int4_fits(rows: int, columns: int, bits: int, group_size: int | None) -> bool:
    """Return whether the kernel takes a weight ``[rows, columns]``."""
    return bits == 4 and group_size in INT4_GROUPS and rows % INT4_ROWS == 0 and columns % group_size == 0


def pack_int4(codes: Tensor, scale: Tensor, zero_point: Tensor | None, group_size: int) -> Int4Weight:
    """Return a weight as :func:`int4_linear` reads it.

    Args:
        codes: -8 to 7, or with ``zero_point`` 0 to 15, ``[out_features, in_features]``.
        scale: ``[out_features, in_features / group_size]``.
        zero_point: shaped as ``scale``, or None.
        group_size: one of ``INT4_GROUPS``.
    """
    steps = scale.detach().to(torch.float32)
    if zero_point is None:
        shifted, offset = codes.to(torch.int32) + _MIDDLE, torch.zeros_like(steps)
    else:
        shifted, offset = codes.to(torch.int32), (_MIDDLE - zero_point.to(torch.float32)) * steps
    exact = torch.stack([steps.t(), offset.t()], 2)
    high = exact.to(torch.bfloat16)
    low = (exact - high.float()).to(torch.bfloat16)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(shifted.contiguous(), 1)
    return Int4Weight(packed, high.contiguous(), low.contiguous(), group_size)


def int4_linear(x: Tensor, weight: Int4Weight, bias: Tensor | None) -> Tensor:
    """Return ``x @ weight.T + bias``.

    Args:
        x: bfloat16, ``[..., in_features]``, not empty.
        weight: of :func:`pack_int4`.
        bias: ``[out_features]`` or None.
    """
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
    result = multiply(rows, weight.codes, weight.group_size, weight.high).float()
    result.add_(multiply(rows, weight.codes, weight.group_size, weight.low))
    if bias is not None:
        result.add_(bias)
    return result.to(x.dtype).view(*x.shape[:-1], -1)


@lru_cache(maxsize=1)
def int4_is_exact() -> bool:
    """Return whether this machine's kernel is there and right; found once, by a small product that bfloat16 holds."""
    codes = (torch.arange(16 * 64, device="cpu") % 16 - 8).reshape(16, 64).to(torch.int8)
    x = (torch.arange(3 * 64, device="cpu") % 3 - 1).reshape(3, 64).to(torch.bfloat16)
    scale = torch.tensor([[0.5, 2.0]], device="cpu").expand(16, 2)
    try:
        result = int4_linear(x, pack_int4(codes, scale, None, 32), None)
    except (AttributeError, RuntimeError):  # a build of PyTorch without this op
        return False
    expected = x.double() @ (codes.double().view(16, 2, 32) * scale.double().unsqueeze(2)).view(16, 64).t()
    return torch.equal(result, expected.to(torch.bfloat16))

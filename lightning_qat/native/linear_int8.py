"""Inputs to unsigned 8-bit codes, and products of few rows of codes with int8 weights."""

from __future__ import annotations

from ctypes import byref, c_float, c_int32
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lightning_qat.native.library import Family, threads_for

_FAMILY = Family(
    "linear_int8",
    {
        "linear_quantize": "pqfiffpi",
        "linear_quantize_tensor": "pqfffpppi",
        "linear_quantize_tokens": "pqqfffppi",
        "linear_multiply": "pqqpqppqppippi",
        "linear_of_range": "pqqfffipqppqpppi",
        "linear_int8_vectors": "p",
    },
)


def has_linear_int8() -> bool:
    """Return whether these kernels can be used, on this thread and now."""
    return _FAMILY.functions() is not None


@lru_cache(maxsize=1)
def linear_int8_is_fast() -> bool:
    """Return whether this processor has instructions for the products; :func:`has_linear_int8` holds."""
    found = c_int32(0)
    _FAMILY.functions().linear_int8_vectors(byref(found))
    return bool(found.value)


def quantize_unsigned_native(x: Tensor, out: Tensor, scale: float, zero_point: int, low: int, high: int) -> bool:
    """Write the uint8 codes of ``x`` on one grid into ``out``; False where there is no kernel, and nothing is done.

    Args:
        x: dense float32.
        out: uint8 in the same layout.
        scale: of all.
        zero_point: the code of 0.0.
        low: smallest code.
        high: largest code.
    """
    functions = _FAMILY.functions()
    if functions is None:
        return False
    count = x.numel()
    functions.linear_quantize(
        x.data_ptr(), count, scale, zero_point, low - zero_point, high - zero_point, out.data_ptr(), threads_for(count)
    )
    return True


def quantize_by_range(
    x: Tensor, quant_min: int, quant_max: int, divisor: float, *, per_token: bool
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return codes, scale and zero point of ``x`` on the grids of its ranges, or None where there is no kernel.

    Args:
        x: contiguous float32, ``[tokens, columns]``, not empty.
        quant_min: smallest code; negative ones are those of symmetric grids, and are shifted by 128.
        quant_max: largest code.
        divisor: what a symmetric range is divided by for its scale.
        per_token: a symmetric grid for each row; else one for all, which may be asymmetric.

    Returns:
        Codes, uint8 shaped as ``x``; scale, float32 of one element or ``[tokens]``; zero point, int32 of one element.
    """
    functions = _FAMILY.functions()
    if functions is None:
        return None
    tokens, columns = x.shape
    codes, scale = torch.empty_like(x, dtype=torch.uint8), x.new_empty(tokens if per_token else 1)
    if per_token:
        zero = _MIDDLE
        functions.linear_quantize_tokens(
            x.data_ptr(), tokens, columns, quant_min, quant_max, divisor, scale.data_ptr(), codes.data_ptr(),
            threads_for(x.numel()),
        )  # fmt: skip
    else:
        zero = x.new_empty(1, dtype=torch.int32)
        functions.linear_quantize_tensor(
            x.data_ptr(), x.numel(), quant_min, quant_max, divisor, scale.data_ptr(), zero.data_ptr(),
            codes.data_ptr(), threads_for(x.numel()),
        )  # fmt: skip
    return codes, scale, zero


#: The zero point of symmetric codes that are shifted.
_MIDDLE = torch.full((1,), 128, dtype=torch.int32, device="cpu")


def multiply_codes_native(
    codes: Tensor,
    scale: Tensor | float,
    zero_point: Tensor | int,
    weight: Tensor,
    sums: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    *,
    per_token: bool = False,
) -> Tensor | None:
    """Return ``(codes - zero_point) @ weight.T`` scaled and shifted, float32, or None where there is no kernel.

    One rounding for each step: ``float(sum) * (scale * weight_scale) + bias``, and per token
    ``float(sum) * weight_scale * scale + bias``.

    Args:
        codes: contiguous uint8, ``[tokens, columns]``.
        scale: float32, one element, or per token contiguous ``[tokens]``.
        zero_point: int32, one element.
        weight: contiguous int8, ``[rows, columns]``.
        sums: of its rows, int32.
        weight_scale: float32, one element or ``[rows]``.
        bias: contiguous float32, ``[rows]``, or None.
        per_token: whether every token has a scale.
    """
    functions = _FAMILY.functions()
    if functions is None:
        return None
    (tokens, columns), rows = codes.shape, weight.shape[0]
    out = weight_scale.new_empty((tokens, rows))
    scale_address: Any = scale.data_ptr() if isinstance(scale, Tensor) else byref(c_float(scale))
    zero_address: Any = zero_point.data_ptr() if isinstance(zero_point, Tensor) else byref(c_int32(zero_point))
    functions.linear_multiply(
        codes.data_ptr(), tokens, columns, weight.data_ptr(), rows, sums.data_ptr(), weight_scale.data_ptr(),
        weight_scale.numel(), scale_address, zero_address, per_token,
        None if bias is None else bias.data_ptr(), out.data_ptr(), threads_for(weight.numel()),
    )  # fmt: skip
    return out


def linear_of_range(
    x: Tensor,
    quant_min: int,
    quant_max: int,
    divisor: float,
    weight: Tensor,
    sums: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    *,
    per_token: bool,
) -> Tensor | None:
    """Return what :func:`multiply_codes_native` makes of :func:`quantize_by_range`, in one call."""
    functions = _FAMILY.functions()
    if functions is None:
        return None
    (tokens, columns), rows = x.shape, weight.shape[0]
    # Not torch.empty, whose memory is on the default device.
    scratch, out = x.new_empty(tokens * (columns + 4), dtype=torch.uint8), x.new_empty((tokens, rows))
    functions.linear_of_range(
        x.data_ptr(), tokens, columns, quant_min, quant_max, divisor, per_token, weight.data_ptr(), rows,
        sums.data_ptr(), weight_scale.data_ptr(), weight_scale.numel(), None if bias is None else bias.data_ptr(),
        scratch.data_ptr(), out.data_ptr(), threads_for(weight.numel()),
    )  # fmt: skip
    return out

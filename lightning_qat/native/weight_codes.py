"""The codes of a float32 weight as products of integers read them."""

from __future__ import annotations

from ctypes import byref, c_int32

import torch
from torch import Tensor

from lightning_qat.native.library import Family, threads_for

_FAMILY = Family("weight_codes", {"weight_codes": "pqqpqfffppi"})


def has_weight_codes() -> bool:
    """Return whether this kernel can be used, on this thread and now."""
    return _FAMILY.functions() is not None


def weight_codes(
    weight: Tensor, scale: Tensor | None, quant_min: int, quant_max: int, divisor: float = 0.0
) -> tuple[Tensor, Tensor, bool] | None:
    """Return codes, scale and whether there is no NaN; None where there is no kernel.

    Args:
        weight: contiguous float32, ``[rows, columns]``, not empty.
        scale: contiguous float32, one element or ``[rows]``; None is those of the rows' largest magnitudes.
        quant_min: smallest code, of 8 bits.
        quant_max: largest code.
        divisor: what a magnitude is divided by for its scale.

    Returns:
        Codes, int8 ``[columns, rows]``; those of NaN mean nothing. Scale, as given or float32 ``[rows]``.
    """
    functions = _FAMILY.functions()
    if functions is None:
        return None
    rows, columns = weight.shape
    codes, nans = torch.empty((columns, rows), dtype=torch.int8, device="cpu"), c_int32(0)
    found = torch.empty(rows, dtype=torch.float32, device="cpu") if scale is None else scale
    functions.weight_codes(
        weight.data_ptr(), rows, columns, found.data_ptr(), found.numel(), divisor if scale is None else 0.0,
        quant_min, quant_max, codes.data_ptr(), byref(nans), threads_for(weight.numel()),
    )  # fmt: skip
    return codes, found, not nans.value

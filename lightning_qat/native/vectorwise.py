"""Vector-wise int8 on the CPU: the absmax of a row and its codes while it is in the cache.

Matrices are contiguous. Where the compiler has no float16 there is no kernel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_qat.native.library import FloatFamily, threads_for

_FAMILY = FloatFamily("vectorwise", {"quantize": "pppqqpfpi", "codes": "pppqqi"})


def _find(name: str, x: Tensor) -> Any:
    return _FAMILY.of(name, x.dtype) if x.numel() else None


def quantize(x: Tensor, codes: Tensor, absmax: Tensor, is_outlier: Tensor, limit: float | None) -> bool:
    """Write the codes and the absmax of each row; return whether it was done.

    Args:
        x: ``[R, C]``.
        codes: int8 ``[R, C]``; those of outliers are 0, those beside them in a column are not.
        absmax: float32 ``[R]``, without outliers.
        is_outlier: bool ``[C]``; set where a column has one, and left where it has none.
        limit: magnitudes of at least this are outliers, rounded as float16 does.
    """
    function = _find("quantize", x)
    if function is None:
        return False
    rows, columns = x.shape
    threads = threads_for(x.numel())
    memory = torch.empty(threads, columns, dtype=torch.float32, device="cpu")
    addresses = x.data_ptr(), codes.data_ptr(), absmax.data_ptr(), rows, columns, is_outlier.data_ptr()
    function(*addresses, -1.0 if limit is None else limit, memory.data_ptr(), threads)
    return True


def codes_of(x: Tensor, absmax: Tensor, codes: Tensor) -> bool:
    """Write the codes of ``x``, ``[R, C]``, whose rows have these scales; return whether it was done."""
    function = _find("codes", x)
    if function is None:
        return False
    function(x.data_ptr(), absmax.data_ptr(), codes.data_ptr(), *x.shape, threads_for(x.numel()))
    return True

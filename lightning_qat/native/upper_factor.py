"""What is decomposed: the upper triangle of a Gram matrix, its rows and columns in another order."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_qat.native.library import Family, threads_for

_FAMILY = Family("upper_factor", {"gather_upper": "ppfqpi"})


def gather_upper(matrix: Tensor, order: Tensor | None, unit: Tensor | None, out: Tensor | None = None) -> Tensor | None:
    """Return the upper triangle of ``matrix / unit`` in ``order``, float64; None where there is no kernel.

    Args:
        matrix: float32 ``[size, size]``.
        order: int64 ``[size]``, or None.
        unit: one float32, or None.
        out: contiguous float64 ``[size, size]`` that is written into and returned; None is new memory.
    """
    functions = _FAMILY.functions() if matrix.device.type == "cpu" else None
    if functions is None or matrix.dtype != torch.float32:
        return None
    matrix, size = matrix.contiguous(), len(matrix)
    order = torch.arange(size, device="cpu") if order is None else order.contiguous()
    out = torch.empty((size, size), dtype=torch.float64, device="cpu") if out is None else out
    functions.gather_upper(
        matrix.data_ptr(), order.data_ptr(), 1.0 if unit is None else float(unit), size, out.data_ptr(),
        threads_for(size * size),
    )  # fmt: skip
    return out

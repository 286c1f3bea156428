"""Blocks of columns of GPTQ and of coordinate descent, in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_qat.native.library import Family, threads_for

_FAMILY = Family(
    "gptq",
    {
        "gptq_block": "ppppffppqqqpppi",
        "descend_block": "pppppffppqqqpppi",
        "gather_columns": "ppqqpi",
        "place_codes": "pppqqpi",
    },
)

#: Rows that walk through a block together, each with its errors in scratch memory.
_LANES = 64


def gptq_block(
    columns: Tensor,
    factor: Tensor,
    step: Tensor,
    zero: Tensor | None,
    low: int,
    high: int,
    values: Tensor | None,
    thresholds: Tensor | None,
) -> tuple[Tensor, Tensor] | None:
    """Return what ``ops.gptq.reference_gptq_block`` does, with its bits; None where there is no kernel."""
    return _walked("gptq_block", (columns, factor, step), zero, low, high, values, thresholds)


def descend_block(
    products: Tensor,
    current: Tensor,
    hessian: Tensor,
    step: Tensor,
    zero: Tensor | None,
    low: int,
    high: int,
    values: Tensor | None,
    thresholds: Tensor | None,
) -> tuple[Tensor, Tensor] | None:
    """Return what ``ops.coordinate_descent.reference_descend_block`` does, with its bits, or None likewise."""
    return _walked("descend_block", (products, current, hessian, step), zero, low, high, values, thresholds)


def gather_columns(weight: Tensor, order: Tensor, out: Tensor) -> bool:
    """Write ``weight[:, order].t()`` into ``out``; False where there is no kernel, and nothing is done.

    Args:
        weight: float32, ``[rows, columns]``.
        order: int64, ``[columns]``.
        out: contiguous float32, ``[columns, rows]``.
    """
    functions = _FAMILY.functions() if weight.is_cpu and out.is_cpu else None
    if functions is None or weight.dtype != torch.float32 or not weight.numel():
        return False
    weight, order, (rows, columns) = weight.contiguous(), order.contiguous(), weight.shape
    functions.gather_columns(
        weight.data_ptr(), order.data_ptr(), rows, columns, out.data_ptr(), threads_for(weight.numel())
    )
    return True


def place_codes(codes: Tensor, order: Tensor, table: Tensor | None, out: Tensor) -> bool:
    """Write codes into ``out[:, order]``, transposed; False where there is no kernel, and nothing is done.

    Args:
        codes: int16, ``[columns, rows]``; their lowest bytes are written.
        order: int64, ``[columns]``, a permutation.
        table: uint8: what each code is to become, or None. Codes are then indices into it.
        out: contiguous int8 or uint8, ``[rows, columns]``.
    """
    functions = _FAMILY.functions() if codes.is_cpu and out.is_cpu else None
    if functions is None or codes.dtype != torch.int16 or not codes.numel():
        return False
    codes, order, table = codes.contiguous(), order.contiguous(), None if table is None else table.contiguous()
    rows, columns = out.shape
    functions.place_codes(
        codes.data_ptr(), order.data_ptr(), _address(table), rows, columns, out.data_ptr(), threads_for(codes.numel())
    )
    return True


def _walked(
    name: str,
    tensors: tuple[Tensor, ...],
    zero: Tensor | None,
    low: int,
    high: int,
    values: Tensor | None,
    thresholds: Tensor | None,
) -> tuple[Tensor, Tensor] | None:
    optional = (zero, values, thresholds)
    given = [*tensors, *(tensor for tensor in optional if tensor is not None)]
    functions = _FAMILY.functions()
    if functions is None or any(tensor.dtype != torch.float32 or not tensor.numel() for tensor in given):
        return None
    count, rows = tensors[0].shape
    codes = torch.empty((count, rows), dtype=torch.int16, device="cpu")
    errors = torch.empty((count, rows), dtype=torch.float32, device="cpu")
    threads = threads_for(count * rows)
    scratch = torch.empty(threads * count * _LANES, dtype=torch.float32, device="cpu")
    lying = [tensor.contiguous() for tensor in tensors]
    at_zero, table, bounds = (None if tensor is None else tensor.contiguous() for tensor in optional)
    getattr(functions, name)(
        *(tensor.data_ptr() for tensor in lying), _address(at_zero), low, high, _address(table), _address(bounds),
        0 if table is None else len(table), count, rows, codes.data_ptr(), errors.data_ptr(), scratch.data_ptr(),
        threads,
    )  # fmt: skip
    return codes, errors


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()

"""A block of columns of GPTQ, or of coordinate descent, for all rows of a weight in one launch.

Rows of a weight do not depend on each other, so that a program walks through all columns of the block for a few of
them, which it keeps in registers. Both algorithms have one form: column ``j`` is rounded, and what it is off by, times
a row of a matrix, is taken from all columns after it. Codes and errors equal those of
:func:`lightning_qat.ops.gptq.reference_gptq_block` and
:func:`lightning_qat.ops.coordinate_descent.reference_descend_block` bit for bit: the same operations in the same order,
quotients correctly rounded, no fused multiply-add.

Bytes moved for a weight: 4 for the column, 4 for its step (4 for a zero point, 4 for its value), 6 for code and error.
Arithmetic: about 4 instructions for each pair of columns of a block and row. What counts is the time of one column
after the other, some hundred cycles each.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_qat.kernels.arithmetic import clamp, round_half_even
from lightning_qat.kernels.launch import EXACT, Tuned, blocks_of, on_device_of

#: Most columns of a block.
MOST_COLUMNS = 128
#: Rows and warps of a program: 4096 rows make 256 programs, and 128 columns of 16 rows 16 registers for a thread.
_ROWS, _WARPS = 16, 4


@triton.jit
def _column(tile, index, j):
    """Return column ``j`` of a tile ``[COLUMNS, ROWS]``: all others are left out of the sum."""
    return tl.sum(tl.where(index == j, tile, 0.0), axis=0)


@triton.jit
def _round_to_level(
    x, step, zero, low, high, values_ptr, thresholds_ptr, ZERO: tl.constexpr, TABLE_BITS: tl.constexpr
):  # fmt: skip
    """Return the codes of ``x`` and the values that they stand for."""
    if TABLE_BITS:
        y = x * tl.where(step > 0, tl.div_rn(tl.full(step.shape, 1.0, tl.float32), step), 0.0)
        code = tl.zeros(y.shape, tl.int32)
        for bit in tl.static_range(TABLE_BITS - 1, -1, -1):
            middle = code + (1 << bit)
            # The comparison that is not true for a NaN puts it where bucketize does, last.
            code = tl.where(y <= tl.load(thresholds_ptr + middle - 1), code, middle)
        return code, tl.load(values_ptr + code) * step
    codes = round_half_even(tl.div_rn(x, step))
    if ZERO:
        codes = clamp(codes + zero, low, high)
        return codes.to(tl.int32), (codes - zero) * step
    codes = clamp(codes, low, high)
    return codes.to(tl.int32), codes * step


@triton.jit
def column_walk_kernel(
    columns_ptr, current_ptr, matrix_ptr, step_ptr, zero_ptr, values_ptr, thresholds_ptr, codes_ptr, errors_ptr,
    count, rows, low, high,
    DESCEND: tl.constexpr, ZERO: tl.constexpr, TABLE_BITS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Walk through ``count`` columns for ``ROWS`` rows; tensors are transposed, ``[count, rows]``."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    index = tl.arange(0, COLUMNS)[:, None]
    exists = row < rows
    at = index.to(tl.int64) * rows + row[None, :]
    left = tl.load(columns_ptr + at, mask=(index < count) & exists[None, :], other=0.0)
    here = row.to(tl.int64)
    for j in range(count):
        step = tl.load(step_ptr + here, mask=exists, other=1.0)
        zero = tl.load(zero_ptr + here, mask=exists, other=0.0) if ZERO else step
        diagonal = tl.load(matrix_ptr + j * count + j)
        own = _column(left, index, j)
        if DESCEND:
            current = tl.load(current_ptr + here, mask=exists, other=0.0)
            x = current + tl.div_rn(own, tl.full(own.shape, 0.0, tl.float32) + diagonal)
            code, value = _round_to_level(x, step, zero, low, high, values_ptr, thresholds_ptr, ZERO, TABLE_BITS)
            error = value - current
        else:
            code, value = _round_to_level(own, step, zero, low, high, values_ptr, thresholds_ptr, ZERO, TABLE_BITS)
            error = tl.div_rn(own - value, tl.full(own.shape, 0.0, tl.float32) + diagonal)
        tl.store(codes_ptr + here, code.to(tl.int16), mask=exists)
        tl.store(errors_ptr + here, error, mask=exists)
        share = tl.load(matrix_ptr + j * count + index, mask=(index > j) & (index < count), other=0.0)
        left = left - share * error[None, :]
        here += rows


def launch_gptq_block(
    columns: Tensor,
    factor: Tensor,
    step: Tensor,
    zero: Tensor | None,
    low: int,
    high: int,
    values: Tensor | None,
    thresholds: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return codes, int16, and errors of a block of columns; see ``reference_gptq_block``.

    Raises:
        ValueError: if there are more than 128 columns, or a table has neither 16 nor 256 values.
    """
    return _launch(columns, None, factor, step, zero, low, high, values, thresholds)


def launch_descend_block(
    products: Tensor,
    current: Tensor,
    hessian: Tensor,
    step: Tensor,
    zero: Tensor | None,
    low: int,
    high: int,
    values: Tensor | None,
    thresholds: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return codes, int16, and what they add to the values; see ``reference_descend_block``.

    Raises:
        ValueError: as :func:`launch_gptq_block`.
    """
    return _launch(products, current, hessian, step, zero, low, high, values, thresholds)


def _launch(
    columns: Tensor,
    current: Tensor | None,
    matrix: Tensor,
    step: Tensor,
    zero: Tensor | None,
    low: int,
    high: int,
    values: Tensor | None,
    thresholds: Tensor | None,
) -> tuple[Tensor, Tensor]:
    count, rows = columns.shape
    if count > MOST_COLUMNS:
        raise ValueError(f"{count} columns have no kernel; use blocks of up to {MOST_COLUMNS}")
    bits = 0 if values is None else len(values).bit_length() - 1
    if values is not None and len(values) not in (16, 256):
        raise ValueError(f"a table of {len(values)} values has no kernel; use one of 16 or 256")
    codes = torch.empty(columns.shape, dtype=torch.int16, device=columns.device)
    errors = torch.empty(columns.shape, dtype=torch.float32, device=columns.device)
    if not columns.numel():
        return codes, errors
    columns, step = columns.contiguous(), step.contiguous()
    with on_device_of(columns):
        column_walk_kernel[(blocks_of(rows, _ROWS),)](
            columns, columns if current is None else current.contiguous(), matrix.contiguous(), step,
            step if zero is None else zero.contiguous(), step if values is None else values,
            step if thresholds is None else thresholds, codes, errors, count, rows, low, high,
            DESCEND=current is not None, ZERO=zero is not None, TABLE_BITS=bits,
            COLUMNS=max(triton.next_power_of_2(count), 16), ROWS=_ROWS, num_warps=_WARPS, **EXACT,
        )  # fmt: skip
    return codes, errors


def _tuned() -> dict[str, Tuned]:
    pointers = ("columns", "current", "matrix", "step", "zero", "values", "thresholds", "errors")
    signature = {f"{name}_ptr": "*fp32:16" for name in pointers} | {"codes_ptr": "*i16:16"}
    signature |= {"count": "i32:16", "rows": "i32:16", "low": "i32", "high": "i32"}
    found = {}
    for name, descend, zero, bits in (
        ("gptq-symmetric", False, False, 0),
        ("gptq-zero", False, True, 0),
        ("gptq-table", False, False, 4),
        ("descend-zero", True, True, 0),
        ("descend-table", True, False, 4),
    ):
        constexprs = {"DESCEND": descend, "ZERO": zero, "TABLE_BITS": bits, "COLUMNS": 128, "ROWS": _ROWS}
        found[name] = Tuned(kernel=column_walk_kernel, signature=signature, constexprs=constexprs, num_warps=_WARPS)
    return found


TUNED = _tuned()

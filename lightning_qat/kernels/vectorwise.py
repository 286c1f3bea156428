"""Vector-wise int8 (LLM.int8()): codes or fake-quantized values with a scale for each row, outlier columns apart.

Memory: a row of up to 8192 elements is read once and stays in registers: its outliers, the absmax of the others and
their codes, 3 bytes per element for bfloat16, or their values, 4 bytes. A longer row is read twice, the second time
mostly from the L2 cache. Which columns hold outliers is known when all rows have been read: then a second launch, which
reads a byte for each column, corrects those columns alone.

Everything is rounded to float16 first and then computed in float32, as :mod:`lightning_qat.ops.vectorwise` defines it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_qat.kernels.arithmetic import magnitude
from lightning_qat.kernels.fake_quantize import as_laid_out
from lightning_qat.kernels.launch import EXACT, Tuned, block_up_to, blocks_of, launch, on_device_of
from lightning_qat.kernels.vectorwise_codes import halves_of, steps_to_a_unit, whole

#: Elements of a row that a program holds, and of all its rows if they are short.
MOST_COLUMNS, ELEMENTS = 8192, 2048
#: Rows and columns of a tile whose outlier columns are corrected, and such tiles of a program, one below the other.
_ROWS, _COLUMNS, _STEPS = 16, 128, 8

#: Marks of columns are as wide as what is written, so that a thread has the same elements of both, without exchanges.
_MARKS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


@triton.jit
def start_of_rows(program, columns, ROWS: tl.constexpr):
    """Return a program's rows and where they begin, 64 bits both."""
    row = tl.cast(program, tl.int64) * ROWS + tl.arange(0, ROWS)
    return row, row * columns


@triton.jit
def _kept_of(pointers, marks, mask, inside, limit, HAS_LIMIT: tl.constexpr, GIVEN: tl.constexpr):
    """Return halves with outliers as 0, and which elements are outliers by their magnitude."""
    halves = halves_of(tl.load(pointers, mask=mask, other=0.0))
    if GIVEN:
        return tl.where(tl.load(marks, mask=inside, other=0) != 0, 0.0, halves), mask
    if HAS_LIMIT:
        outlier = (tl.abs(halves) >= limit) & mask
        return tl.where(outlier, 0.0, halves), outlier
    return halves, mask


@triton.jit
def _mark(pointers, outlier):
    """Mark the columns of outliers. Many may mark one column at once: all write the same."""
    marks = tl.full(outlier.shape, 1, pointers.dtype.element_ty)
    tl.store(tl.broadcast_to(pointers, outlier.shape), marks, mask=outlier)


@triton.jit
def _write(kept, factor, absmax, pointers, mask, VALUES: tl.constexpr, PER_CODE: tl.constexpr):
    """Store codes or values, 0 for outliers. Of a row with a NaN the absmax is one, and so are all values."""
    codes = whole(kept * factor)
    if VALUES:
        tl.store(pointers, (codes * absmax * PER_CODE).to(pointers.dtype.element_ty), mask=mask)
    else:
        tl.store(pointers, codes.to(tl.int8), mask=mask)


@triton.jit
def vectorwise_rows_kernel(
    x_ptr, out_ptr, absmax_ptr, outliers_ptr, rows, columns, blocks, limit,
    HAS_LIMIT: tl.constexpr, GIVEN: tl.constexpr, VALUES: tl.constexpr, PER_CODE: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Quantize ``ROWS`` rows, one that is longer than a tile in two rounds; mark the columns with outliers.

    GIVEN: the marks are there already, and are read.
    """
    row, start = start_of_rows(tl.program_id(0), columns, ROWS)
    exists = row < rows
    start, exists, column = start[:, None], exists[:, None], tl.arange(0, COLUMNS)[None, :]
    inside = column < columns
    kept, outlier = _kept_of(
        x_ptr + start + column, outliers_ptr + column, exists & inside, inside, limit, HAS_LIMIT, GIVEN
    )
    absmax = magnitude(kept, 1)
    if HAS_LIMIT:
        _mark(outliers_ptr + column, outlier)
    for block in range(1, blocks):
        at = block * COLUMNS + column
        further = at < columns
        more, found = _kept_of(
            x_ptr + start + at, outliers_ptr + at, exists & further, further, limit, HAS_LIMIT, GIVEN
        )
        absmax = tl.maximum(absmax, magnitude(more, 1), propagate_nan=tl.PropagateNan.ALL)
        if HAS_LIMIT:
            _mark(outliers_ptr + at, found)
    if not VALUES:
        tl.store(absmax_ptr + row, absmax, mask=row < rows)
    factor, unit = steps_to_a_unit(absmax)[:, None], absmax[:, None]
    _write(kept, factor, unit, out_ptr + start + column, exists & inside, VALUES, PER_CODE)
    for block in range(1, blocks):
        at = block * COLUMNS + column
        further = at < columns
        more, _ = _kept_of(x_ptr + start + at, outliers_ptr + at, exists & further, further, limit, HAS_LIMIT, GIVEN)
        _write(more, factor, unit, out_ptr + start + at, exists & further, VALUES, PER_CODE)


@triton.jit
def vectorwise_columns_kernel(
    outliers_ptr, x_ptr, out_ptr, rows, columns, column_tiles,
    VALUES: tl.constexpr, STEPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Give marked columns the codes 0, or the values of ``x``."""
    program = tl.program_id(0)
    column = program % column_tiles * COLUMNS + tl.arange(0, COLUMNS)
    marked = tl.load(outliers_ptr + column, mask=column < columns, other=0).to(tl.int32)
    if tl.max(marked, axis=0) > 0:
        for step in range(STEPS):
            row, start = start_of_rows(program // column_tiles * STEPS + step, columns, ROWS)
            mask = (row < rows)[:, None] & (marked > 0)[None, :]
            at = start[:, None] + column[None, :]
            if VALUES:
                tl.store(out_ptr + at, tl.load(x_ptr + at, mask=mask), mask=mask)
            else:
                tl.store(out_ptr + at, tl.zeros((ROWS, COLUMNS), tl.int8), mask=mask)


@triton.jit
def column_absmax_kernel(
    x_ptr, partial_ptr, rows, columns, column_tiles, STEPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """The largest magnitudes in ``STEPS * ROWS`` rows of a tile's columns, NaN where there is one."""
    part, tile = tl.program_id(0) // column_tiles, tl.program_id(0) % column_tiles
    column = tile * COLUMNS + tl.arange(0, COLUMNS)
    most = tl.zeros((ROWS, COLUMNS), tl.int32)
    for step in range(STEPS):
        row, start = start_of_rows(part * STEPS + step, columns, ROWS)
        mask = (row < rows)[:, None] & (column < columns)[None, :]
        value = tl.load(x_ptr + start[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
        most = tl.maximum(most, value.to(tl.int32, bitcast=True) & 0x7FFFFFFF)  # as magnitude() compares
    found = tl.max(most, axis=0).to(tl.float32, bitcast=True)
    tl.store(partial_ptr + tl.cast(part, tl.int64) * columns + column, found, mask=column < columns)


def _cut_rows(rows: int, columns: int) -> tuple[int, int, int]:
    """Return rows and columns of a tile, and warps."""
    column_block = block_up_to(columns, MOST_COLUMNS)
    row_block = block_up_to(rows, max(1, ELEMENTS // column_block))
    return row_block, column_block, 8 if column_block >= 4096 else 4


def _launch_rows(
    x: Tensor,
    out: Tensor,
    absmax: Tensor | None,
    limit: float | None,
    kept: Tensor | None = None,
    per_code: float = 1.0,
) -> Tensor:
    """Write codes and the absmax of rows, or values; return the marks of columns that hold outliers, 1 and 0."""
    rows, columns = x.shape
    values, has_limit, kind = absmax is None, limit is not None, _MARKS[out.itemsize]
    if kept is None:
        outliers = (torch.zeros if has_limit or not values else torch.empty)(columns, dtype=kind, device=x.device)
    else:
        outliers = kept.to(kind).contiguous()
    row_block, column_block, warps = _cut_rows(rows, columns)
    with on_device_of(x):
        launch(
            vectorwise_rows_kernel,
            (blocks_of(rows, row_block),),
            (x, out, outliers if absmax is None else absmax, outliers, rows, columns,
             blocks_of(columns, column_block), 0.0 if limit is None else limit),
            {"HAS_LIMIT": has_limit, "GIVEN": kept is not None, "VALUES": values, "PER_CODE": per_code,
             "ROWS": row_block, "COLUMNS": column_block},
            num_warps=warps,
            **EXACT,
        )  # fmt: skip
        # The codes of one row are 0 already where they have to be.
        if (has_limit and (values or rows > 1)) or kept is not None:
            column_tiles = blocks_of(columns, _COLUMNS)
            launch(
                vectorwise_columns_kernel,
                (column_tiles * blocks_of(rows, _ROWS * _STEPS),),
                (outliers, x, out, rows, columns, column_tiles),
                {"VALUES": values, "STEPS": _STEPS, "ROWS": _ROWS, "COLUMNS": _COLUMNS},
                num_warps=4,
                **EXACT,
            )
    return outliers


def vectorwise_quantize_triton(x: Tensor, limit: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the codes of a matrix, the absmax of its rows without outliers, and which columns hold outliers.

    Args:
        x: float16, bfloat16 or float32, ``[R, C]``, not empty.
        limit: magnitudes of at least this are outliers, rounded as float16 does; None is no outliers.

    Returns:
        int8 ``[R, C]``, 0 in columns with outliers; float32 ``[R]``; bool ``[C]``.
    """
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    absmax = torch.empty(len(x), dtype=torch.float32, device=x.device)
    return codes, absmax, _launch_rows(x.contiguous(), codes, absmax, limit).view(torch.bool)


def vectorwise_fake_quantize_triton(
    x: Tensor, limit: float | None, per_code: float, kept: Tensor | None = None
) -> Tensor:
    """Return ``x`` quantized row by row and dequantized; columns with outliers and NaN stay as they are.

    Args:
        x: float16, bfloat16 or float32, ``[..., C]``, not empty.
        limit: as in :func:`vectorwise_quantize_triton`.
        per_code: what a code stands for, in units of its row's absmax.
        kept: which columns stay as they are, bool ``[C]``, with no limit; None is those with outliers.

    Returns:
        A new tensor with the shape, dtype and strides of ``torch.empty_like(x)``.
    """
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch_rows(x.reshape(-1, x.shape[-1]).contiguous(), out.view(-1, x.shape[-1]), None, limit, kept, per_code)
    return as_laid_out(out, x)


def column_absmax_triton(x: Tensor) -> Tensor:
    """Return the largest magnitude of every column, float32 ``[C]``; NaN if it holds one.

    Args:
        x: float16, bfloat16 or float32, ``[R, C]``, not empty.
    """
    rows, columns = x.shape
    parts, column_tiles = blocks_of(rows, _ROWS * _STEPS), blocks_of(columns, _COLUMNS)
    partial = torch.empty(parts, columns, dtype=torch.float32, device=x.device)
    with on_device_of(x):
        launch(
            column_absmax_kernel,
            (parts * column_tiles,),
            (x.contiguous(), partial, rows, columns, column_tiles),
            {"STEPS": _STEPS, "ROWS": _ROWS, "COLUMNS": _COLUMNS},
            num_warps=4,
            **EXACT,
        )
    return partial.amax(0)


def _mark_type(x: str, values: bool) -> str:
    return {"bf16": "*i16:16", "fp32": "*i32:16"}[x] if values else "*u8:16"


def _rows(x: str, columns: int, *, limit: bool, values: bool = False, given: bool = False) -> Tuned:
    row_block, column_block, warps = _cut_rows(8192, columns)
    blocks, marks = blocks_of(columns, column_block), _mark_type(x, values)
    return Tuned(
        kernel=vectorwise_rows_kernel,
        signature={
            "x_ptr": f"*{x}:16",
            "out_ptr": f"*{x if values else 'i8'}:16",
            "absmax_ptr": marks if values else "*fp32:16",
            "outliers_ptr": marks,
            **dict.fromkeys(("rows", "columns"), "i32:16"),
            **({"blocks": "i32"} if blocks > 1 else {}),
            "limit": "fp32",
        },
        constexprs={
            "HAS_LIMIT": limit, "GIVEN": given, "VALUES": values, "PER_CODE": 1 / 127 if values else 1.0,
            "ROWS": row_block, "COLUMNS": column_block, **({} if blocks > 1 else {"blocks": 1}),
        },
        num_warps=warps,
    )  # fmt: skip


def _columns(x: str, *, values: bool) -> Tuned:
    return Tuned(
        kernel=vectorwise_columns_kernel,
        signature={
            "outliers_ptr": _mark_type(x, values),
            "x_ptr": f"*{x}:16",
            "out_ptr": f"*{x if values else 'i8'}:16",
            **dict.fromkeys(("rows", "columns", "column_tiles"), "i32:16"),
        },
        constexprs={"VALUES": values, "STEPS": _STEPS, "ROWS": _ROWS, "COLUMNS": _COLUMNS},
    )


def _column_absmax(x: str) -> Tuned:
    return Tuned(
        kernel=column_absmax_kernel,
        signature={
            "x_ptr": f"*{x}:16",
            "partial_ptr": "*fp32:16",
            **dict.fromkeys(("rows", "columns", "column_tiles"), "i32:16"),
        },
        constexprs={"STEPS": _STEPS, "ROWS": _ROWS, "COLUMNS": _COLUMNS},
    )


TUNED = {
    "quantize-bf16-4096": _rows("bf16", 4096, limit=False),
    "quantize-bf16-8192": _rows("bf16", 8192, limit=False),
    "quantize-fp32-4096": _rows("fp32", 4096, limit=False),
    "quantize-bf16-768-outliers": _rows("bf16", 768, limit=True),
    "quantize-bf16-4096-outliers": _rows("bf16", 4096, limit=True),
    "quantize-bf16-28672-outliers": _rows("bf16", 28672, limit=True),
    "fake-quantize-bf16-4096": _rows("bf16", 4096, limit=False, values=True),
    "fake-quantize-bf16-4096-outliers": _rows("bf16", 4096, limit=True, values=True),
    "fake-quantize-bf16-8192-outliers": _rows("bf16", 8192, limit=True, values=True),
    "fake-quantize-fp32-8192-outliers": _rows("fp32", 8192, limit=True, values=True),
    "fake-quantize-bf16-8192-given": _rows("bf16", 8192, limit=False, values=True, given=True),
    "columns-codes": _columns("bf16", values=False),
    "columns-bf16": _columns("bf16", values=True),
    "column-absmax-bf16": _column_absmax("bf16"),
    "column-absmax-fp32": _column_absmax("fp32"),
}

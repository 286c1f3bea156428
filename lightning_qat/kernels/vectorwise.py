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

from lightning_qat.kernels.arithmetic import clamp, magnitude
from lightning_qat.kernels.fake_quantize import as_laid_out
from lightning_qat.kernels.launch import EXACT, Tuned, block_up_to, blocks_of, launch, on_device_of
from lightning_qat.kernels.tiles import ROW, Tiles, cut, load_parameter, locate, tile_of, tuned_numbers

#: Elements of a row that a program holds, and of all its rows if they are short.
MOST_COLUMNS, ELEMENTS = 8192, 2048
#: Rows and columns of a tile whose outlier columns are corrected, and such tiles of a program, one below the other.
_ROWS, _COLUMNS, _STEPS = 16, 128, 8

#: Marks of columns are as wide as what is written, so that a thread has the same elements of both, without exchanges.
_MARKS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}

#: Added and subtracted again, it rounds float32 of up to 2**22 half to even; what becomes zero is positive.
_ROUNDING = tl.constexpr(1.5 * 2.0**23)


@triton.jit
def halves_of(x):
    """Return ``x`` with the precision and the range of float16, as float32."""
    return x.to(tl.float32).to(tl.float16).to(tl.float32)


@triton.jit
def steps_to_a_unit(absmax):
    """Return 127 / absmax as the definition rounds it: infinite for a row of zeros, whose codes thus become NaN."""
    return tl.div_rn(1.0, absmax) * 127.0


@triton.jit
def whole(steps):
    """Return what is within the codes rounded half to even, NaN as 0, float32."""
    rounded = (steps + _ROUNDING) - _ROUNDING
    return tl.where(rounded == rounded, rounded, 0.0)


@triton.jit
def start_of_rows(program, columns, ROWS: tl.constexpr):
    """Return a program's rows and where they begin, 64 bits both."""
    row = tl.cast(program, tl.int64) * ROWS + tl.arange(0, ROWS)
    return row, row * columns


@triton.jit
def _kept_of(x, mask, limit, HAS_LIMIT: tl.constexpr):
    """Return halves with outliers as 0, and which are outliers."""
    halves = halves_of(x)
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
    HAS_LIMIT: tl.constexpr, VALUES: tl.constexpr, PER_CODE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Quantize ``ROWS`` rows, one that is longer than a tile in two rounds; mark the columns with outliers."""
    row, start = start_of_rows(tl.program_id(0), columns, ROWS)
    exists = row < rows
    start, column = start[:, None], tl.arange(0, COLUMNS)[None, :]
    mask = exists[:, None] & (column < columns)
    kept, outlier = _kept_of(tl.load(x_ptr + start + column, mask=mask, other=0.0), mask, limit, HAS_LIMIT)
    absmax = magnitude(kept, 1)
    if HAS_LIMIT:
        _mark(outliers_ptr + column, outlier)
    for block in range(1, blocks):
        at = block * COLUMNS + column
        inside = exists[:, None] & (at < columns)
        more, found = _kept_of(tl.load(x_ptr + start + at, mask=inside, other=0.0), inside, limit, HAS_LIMIT)
        absmax = tl.maximum(absmax, magnitude(more, 1), propagate_nan=tl.PropagateNan.ALL)
        if HAS_LIMIT:
            _mark(outliers_ptr + at, found)
    if not VALUES:
        tl.store(absmax_ptr + row, absmax, mask=exists)
    factor, unit = steps_to_a_unit(absmax)[:, None], absmax[:, None]
    _write(kept, factor, unit, out_ptr + start + column, mask, VALUES, PER_CODE)
    for block in range(1, blocks):
        at = block * COLUMNS + column
        inside = exists[:, None] & (at < columns)
        more, _ = _kept_of(tl.load(x_ptr + start + at, mask=inside, other=0.0), inside, limit, HAS_LIMIT)
        _write(more, factor, unit, out_ptr + start + at, inside, VALUES, PER_CODE)


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
def vectorwise_codes_kernel(
    x_ptr, absmax_ptr, codes_ptr, rows, columns, channels, column_tiles,
    PARAMETER: tl.constexpr, REPEATED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Codes of one tile with given scales."""
    row_tile, column_tile = tile_of(tl.program_id(0), column_tiles, PARAMETER)
    base, offsets, mask = locate(row_tile, column_tile, rows, columns, PARAMETER, ROWS, COLUMNS)
    where = (row_tile, column_tile, rows, columns, channels)
    absmax = load_parameter(absmax_ptr, *where, 1.0, PARAMETER, REPEATED, ROWS, COLUMNS)
    steps = halves_of(tl.load(x_ptr + base + offsets, mask=mask, other=0.0)) * steps_to_a_unit(absmax)
    tl.store(codes_ptr + base + offsets, whole(clamp(steps, -127.0, 127.0)).to(tl.int8), mask=mask)


@triton.jit
def vectorwise_dequantize_kernel(
    codes_ptr, absmax_ptr, out_ptr, rows, columns, channels, column_tiles,
    PER_CODE: tl.constexpr, PARAMETER: tl.constexpr, REPEATED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Values of one tile."""
    row_tile, column_tile = tile_of(tl.program_id(0), column_tiles, PARAMETER)
    base, offsets, mask = locate(row_tile, column_tile, rows, columns, PARAMETER, ROWS, COLUMNS)
    where = (row_tile, column_tile, rows, columns, channels)
    absmax = load_parameter(absmax_ptr, *where, 1.0, PARAMETER, REPEATED, ROWS, COLUMNS)
    values = tl.load(codes_ptr + base + offsets, mask=mask, other=0).to(tl.float32) * absmax * PER_CODE
    tl.store(out_ptr + base + offsets, values.to(out_ptr.dtype.element_ty), mask=mask)


def _cut_rows(rows: int, columns: int) -> tuple[int, int, int]:
    """Return rows and columns of a tile, and warps."""
    column_block = block_up_to(columns, MOST_COLUMNS)
    row_block = block_up_to(rows, max(1, ELEMENTS // column_block))
    return row_block, column_block, 8 if column_block >= 4096 else 4


def _launch_rows(x: Tensor, out: Tensor, absmax: Tensor | None, limit: float | None, per_code: float) -> Tensor:
    """Write codes and the absmax of rows, or values; return the marks of columns that hold outliers, 1 and 0."""
    rows, columns = x.shape
    values, has_limit = absmax is None, limit is not None
    make = torch.zeros if has_limit or not values else torch.empty
    outliers = make(columns, dtype=_MARKS[out.itemsize], device=x.device)
    row_block, column_block, warps = _cut_rows(rows, columns)
    with on_device_of(x):
        launch(
            vectorwise_rows_kernel,
            (blocks_of(rows, row_block),),
            (x, out, outliers if absmax is None else absmax, outliers, rows, columns,
             blocks_of(columns, column_block), 0.0 if limit is None else limit),
            {"HAS_LIMIT": has_limit, "VALUES": values, "PER_CODE": per_code, "ROWS": row_block,
             "COLUMNS": column_block},
            num_warps=warps,
            **EXACT,
        )  # fmt: skip
        if has_limit and (values or rows > 1):  # the codes of one row are 0 already
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
    return codes, absmax, _launch_rows(x.contiguous(), codes, absmax, limit, 1.0).view(torch.bool)


def vectorwise_fake_quantize_triton(x: Tensor, limit: float | None, per_code: float) -> Tensor:
    """Return ``x`` quantized row by row and dequantized; columns with outliers and NaN stay as they are.

    Args:
        x: float16, bfloat16 or float32, ``[..., C]``, not empty.
        limit: as in :func:`vectorwise_quantize_triton`.
        per_code: what a code stands for, in units of its row's absmax.

    Returns:
        A new tensor with the shape, dtype and strides of ``torch.empty_like(x)``.
    """
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch_rows(x.reshape(-1, x.shape[-1]).contiguous(), out.view(-1, x.shape[-1]), None, limit, per_code)
    return as_laid_out(out, x)


def vectorwise_codes_triton(x: Tensor, absmax: Tensor) -> Tensor:
    """Return the codes of a matrix whose rows have given scales, within +-127, NaN as 0.

    Args:
        x: float16, bfloat16 or float32, ``[R, C]``, not empty.
        absmax: float32 with R elements.
    """
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    rows, columns = x.shape
    tiles = cut(rows, columns, rows, ROW, x.dtype.itemsize)
    with on_device_of(x):
        launch(
            vectorwise_codes_kernel,
            (tiles.programs,),
            (x.contiguous(), absmax.contiguous(), codes, *tiles.sizes),
            tiles.constexprs,
            num_warps=tiles.warps,
            **EXACT,
        )
    return codes


def vectorwise_dequantize_triton(codes: Tensor, absmax: Tensor, dtype: torch.dtype, per_code: float) -> Tensor:
    """Return ``codes * absmax * per_code``, computed in float32 in this order.

    Args:
        codes: int8 ``[R, C]``, not empty.
        absmax: float32 with R elements.
        dtype: of the result: float16, bfloat16 or float32.
        per_code: what a code stands for, in units of its row's absmax.
    """
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    rows, columns = codes.shape
    tiles = cut(rows, columns, rows, ROW, dtype.itemsize)
    with on_device_of(codes):
        launch(
            vectorwise_dequantize_kernel,
            (tiles.programs,),
            (codes.contiguous(), absmax.contiguous(), out, *tiles.sizes),
            {"PER_CODE": per_code, **tiles.constexprs},
            num_warps=tiles.warps,
            **EXACT,
        )
    return out


def _mark_type(x: str, values: bool) -> str:
    return {"bf16": "*i16:16", "fp32": "*i32:16"}[x] if values else "*u8:16"


def _rows(x: str, columns: int, *, limit: bool, values: bool = False) -> Tuned:
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
            "HAS_LIMIT": limit, "VALUES": values, "PER_CODE": 1 / 127 if values else 1.0, "ROWS": row_block,
            "COLUMNS": column_block, **({} if blocks > 1 else {"blocks": 1}),
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


def _tiled(kernel: object, pointers: dict[str, str], tiles: Tiles, **constexprs: float) -> Tuned:
    numbers, constants = tuned_numbers(tiles)
    return Tuned(
        kernel=kernel,
        signature={**{name: f"*{of}:16" for name, of in pointers.items()}, **numbers},
        constexprs={**constexprs, **tiles.constexprs, **constants},
        num_warps=tiles.warps,
    )


def _codes(x: str, itemsize: int) -> Tuned:
    pointers = {"x_ptr": x, "absmax_ptr": "fp32", "codes_ptr": "i8"}
    return _tiled(vectorwise_codes_kernel, pointers, cut(8192, 8192, 8192, ROW, itemsize))


def _values(x: str, itemsize: int) -> Tuned:
    pointers = {"codes_ptr": "i8", "absmax_ptr": "fp32", "out_ptr": x}
    tiles = cut(8192, 8192, 8192, ROW, itemsize)
    return _tiled(vectorwise_dequantize_kernel, pointers, tiles, PER_CODE=1 / 127)


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
    "columns-codes": _columns("bf16", values=False),
    "columns-bf16": _columns("bf16", values=True),
    "codes-bf16": _codes("bf16", 2),
    "codes-fp32": _codes("fp32", 4),
    "dequantize-bf16": _values("bf16", 2),
    "dequantize-fp32": _values("fp32", 4),
}

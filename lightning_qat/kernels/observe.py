"""Observation and fake quantization in one pass over memory.

Memory: 4 bytes per element for bfloat16 and 8 for float32, as fake quantization alone takes; observing before it would
read x once more. Each program keeps the extremes of its tile and writes two float32 for each scale it met;
``torch.amin`` and ``torch.amax`` finish.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_qat.kernels.arithmetic import magnitude, round_half_even
from lightning_qat.kernels.fake_quantize import SHAPES, as_laid_out, codes_of
from lightning_qat.kernels.launch import EXACT, Tuned, launch, on_device_of
from lightning_qat.kernels.tiles import (
    COLUMN,
    Tiles,
    as_parameter,
    cut,
    cut_channels,
    empty_result,
    lay_like,
    load_parameter,
    locate,
    tile_of,
    tuned_numbers,
)


@triton.jit
def _extremes(value, mask, AXIS: tl.constexpr):
    """Return the smallest and the largest element along an axis, both NaN where there is a NaN.

    Elements that do not exist are 0.
    """
    size = magnitude(value, AXIS)
    low = tl.min(tl.where(mask, value, float("inf")), axis=AXIS)
    high = tl.max(tl.where(mask, value, -float("inf")), axis=AXIS)
    return tl.where(size == size, low, float("nan")), tl.where(size == size, high, float("nan"))


@triton.jit
def observe_kernel(
    x_ptr,
    scale_ptr,
    zero_ptr,
    out_ptr,
    low_ptr,
    high_ptr,
    rows,
    columns,
    channels,
    column_tiles,
    quant_min,
    quant_max,
    HAS_ZERO: tl.constexpr,
    PARAMETER: tl.constexpr,
    REPEATED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Fake-quantize one tile and write its extremes: ``[rows, column tiles]``, or ``[row tiles, columns]``."""
    row_tile, column_tile = tile_of(tl.program_id(0), column_tiles, PARAMETER)
    base, offsets, mask = locate(row_tile, column_tile, rows, columns, PARAMETER, ROWS, COLUMNS)
    where = (row_tile, column_tile, rows, columns, channels)
    step = load_parameter(scale_ptr, *where, 1.0, PARAMETER, REPEATED, ROWS, COLUMNS)
    zero = 0.0
    if HAS_ZERO:
        zero = round_half_even(load_parameter(zero_ptr, *where, 0, PARAMETER, REPEATED, ROWS, COLUMNS))
    value = tl.load(x_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32)
    codes = codes_of(value, step, zero, quant_min, quant_max, HAS_ZERO)
    tl.store(out_ptr + base + offsets, (codes * step).to(out_ptr.dtype.element_ty), mask=mask)
    if PARAMETER == 2:
        low, high = _extremes(value, mask, 0)
        column = tl.cast(column_tile, tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
        at = tl.cast(row_tile, tl.int64) * columns + column
        inside = column < columns
    else:
        low, high = _extremes(value, mask, 1)
        row = tl.cast(row_tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        at = row * column_tiles + column_tile
        inside = row < rows
    tl.store(low_ptr + at, low, mask=inside)
    tl.store(high_ptr + at, high, mask=inside)


def observe_triton(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, quant_min: int, quant_max: int, axis: int, group: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the fake-quantized ``x`` with its smallest and largest elements, found in the same pass.

    Arguments as in :func:`~lightning_qat.kernels.fake_quantize.fake_quantize_triton`.

    Returns:
        The fake-quantized tensor; the minimum and the maximum for each scale, float32 in the shape of ``scale``,
        NaN where there is one, as ``torch.aminmax`` does.
    """
    result = empty_result(x, group)
    tiles, order = cut_channels(result, axis, group, streams=2)
    step = as_parameter(scale)
    columns = tiles.parameter == COLUMN
    shape = (tiles.row_tiles, tiles.columns) if columns else (tiles.rows, tiles.column_tiles)
    low, high = (torch.empty(shape, dtype=torch.float32, device=x.device) for _ in range(2))
    with on_device_of(x):
        zero = step if zero_point is None else as_parameter(zero_point)
        launch(
            observe_kernel,
            (tiles.programs,),
            (lay_like(x, order), step, zero, result, low, high, *tiles.sizes, float(quant_min), float(quant_max)),
            {"HAS_ZERO": zero_point is not None, **tiles.constexprs},
            num_warps=tiles.warps,
            **EXACT,
        )
    over = (0,) if columns else (0, 2)
    if not columns:
        low, high = (t.view(-1, tiles.channels, tiles.column_tiles) for t in (low, high))
    return as_laid_out(result, x), low.amin(over).reshape(scale.shape), high.amax(over).reshape(scale.shape)


def _tuned(x: str, tiles: Tiles, zero: str = "") -> Tuned:
    numbers, constants = tuned_numbers(tiles)
    return Tuned(
        kernel=observe_kernel,
        signature={
            **dict.fromkeys(("x_ptr", "out_ptr"), f"*{x}:16"),
            **dict.fromkeys(("scale_ptr", "low_ptr", "high_ptr"), "*fp32:16"),
            "zero_ptr": f"*{zero or 'fp32'}:16",
            **numbers,
            **dict.fromkeys(("quant_min", "quant_max"), "fp32"),
        },
        constexprs={"HAS_ZERO": bool(zero), **tiles.constexprs, **constants},
        num_warps=tiles.warps,
    )


TUNED = {
    "tensor-bf16-zero": _tuned("bf16", cut(*SHAPES["tensor"], 2, streams=2), zero="i32"),
    "tensor-fp32-zero": _tuned("fp32", cut(*SHAPES["tensor"], 4, streams=2), zero="i32"),
    "channel-bf16": _tuned("bf16", cut(*SHAPES["channel"], 2, streams=2)),
    "last-channel-bf16": _tuned("bf16", cut(*SHAPES["last-channel"], 2, streams=2)),
}

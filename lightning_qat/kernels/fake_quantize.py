"""Fake quantization, forward.

Memory: each element is read once and written once (4 bytes for bfloat16, 8 for float32), in accesses of 16 bytes
where rows are a multiple of 16 elements; scales besides are read once for a tile of 16 KB. One launch, one pass.
Arithmetic: about 16 instructions for each bfloat16 element on sm_90 (25 with a zero point), counted in the machine
code; an H200 issues 28 in the time that its memory takes for the 4 bytes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_qat.kernels.arithmetic import clamp, divide, divisor_of, round_half_even, round_small
from lightning_qat.kernels.launch import EXACT, Tuned, launch, on_device_of
from lightning_qat.kernels.tiles import (
    COLUMN,
    ROW,
    TENSOR,
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

#: Dtypes of ``x`` that the kernels take; the arithmetic is float32.
DTYPES = (torch.float16, torch.bfloat16, torch.float32)

#: Quotients are cut here before a zero point is added: beyond the range of every zero point, and far from infinity.
_FAR = tl.constexpr(2.0**40)


@triton.jit
def codes_of(value, step, zero, quant_min, quant_max, HAS_ZERO: tl.constexpr):
    """Return the codes less the zero point, float32; ``step`` and ``zero`` are numbers or broadcast."""
    factor, divisor, reciprocal, rest = divisor_of(step)
    value = value * factor
    if HAS_ZERO:
        value = clamp(value, -_FAR * divisor, _FAR * divisor)
        codes = round_half_even(divide(value, divisor, reciprocal, rest))
        return clamp(codes + zero, quant_min, quant_max) - zero
    # A multiple of the divisor that is rounded still has a quotient which rounds to it: clamp first, round simply.
    value = clamp(value, quant_min * divisor, quant_max * divisor)
    return round_small(divide(value, divisor, reciprocal, rest), value)


@triton.jit
def fake_quantize_kernel(
    x_ptr,
    scale_ptr,
    zero_ptr,
    out_ptr,
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
    """Fake-quantize one tile."""
    program = tl.program_id(0)
    row_tile, column_tile = tile_of(program, column_tiles, PARAMETER)
    base, offsets, mask = locate(row_tile, column_tile, rows, columns, PARAMETER, ROWS, COLUMNS)
    where = (row_tile, column_tile, rows, columns, channels)
    step = load_parameter(scale_ptr, *where, 1.0, PARAMETER, REPEATED, ROWS, COLUMNS)
    zero = 0.0
    if HAS_ZERO:
        zero = round_half_even(load_parameter(zero_ptr, *where, 0, PARAMETER, REPEATED, ROWS, COLUMNS))
    value = tl.load(x_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32)
    codes = codes_of(value, step, zero, quant_min, quant_max, HAS_ZERO)
    tl.store(out_ptr + base + offsets, (codes * step).to(out_ptr.dtype.element_ty), mask=mask)


def fake_quantize_triton(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, quant_min: int, quant_max: int, axis: int, group: int
) -> Tensor:
    """Return the fake-quantized ``x``, equal to the op's definition bit for bit.

    Args:
        x: float16, bfloat16 or float32, any shape and strides, not empty. A tensor that is not dense is copied.
        scale: floating point, one element for the tensor, channel or run.
        zero_point: integer or floating point, as many elements; None is 0.
        quant_min: the smallest code.
        quant_max: the largest code.
        axis: the channel dimension, -1 for none.
        group: elements of a run that share a scale, 0 for none.

    Returns:
        A new tensor with the shape, dtype and strides of ``torch.empty_like(x)``.
    """
    result = empty_result(x, group)
    tiles, order = cut_channels(result, axis, group)
    source, step = lay_like(x, order), as_parameter(scale)
    zero = step if zero_point is None else as_parameter(zero_point)
    with on_device_of(x):
        launch(
            fake_quantize_kernel,
            (tiles.programs,),
            (source, step, zero, result, *tiles.sizes, float(quant_min), float(quant_max)),
            {"HAS_ZERO": zero_point is not None, **tiles.constexprs},
            num_warps=tiles.warps,
            **EXACT,
        )
    return as_laid_out(result, x)


def as_laid_out(result: Tensor, x: Tensor) -> Tensor:
    """Return ``result`` in the memory layout that ``torch.empty_like(x)`` has."""
    if result.stride() == x.stride():
        return result
    wanted = torch.empty_like(x, dtype=result.dtype, device="meta")
    return result if result.stride() == wanted.stride() else torch.empty_like(x, dtype=result.dtype).copy_(result)


def _tuned(x: str, tiles: Tiles, zero: str = "") -> Tuned:
    numbers, constants = tuned_numbers(tiles)
    return Tuned(
        kernel=fake_quantize_kernel,
        signature={
            "x_ptr": f"*{x}:16",
            "scale_ptr": "*fp32:16",
            "zero_ptr": f"*{zero or 'fp32'}:16",
            "out_ptr": f"*{x}:16",
            **numbers,
            "quant_min": "fp32",
            "quant_max": "fp32",
        },
        constexprs={"HAS_ZERO": bool(zero), **tiles.constexprs, **constants},
        num_warps=tiles.warps,
    )


_SIDE = 8192
#: What ``cut`` takes for a tensor of 8192 x 8192, the size that is tuned for.
SHAPES = {
    "tensor": (1, _SIDE * _SIDE, 1, TENSOR),
    "channel": (_SIDE, _SIDE, _SIDE, ROW),
    "last-channel": (_SIDE, _SIDE, _SIDE, COLUMN),
    "group128": (_SIDE * _SIDE // 128, 128, _SIDE * _SIDE // 128, ROW),
}

TUNED = {
    "tensor-bf16": _tuned("bf16", cut(*SHAPES["tensor"], 2)),
    "tensor-bf16-zero": _tuned("bf16", cut(*SHAPES["tensor"], 2), zero="i32"),
    "tensor-fp32": _tuned("fp32", cut(*SHAPES["tensor"], 4)),
    "channel-bf16": _tuned("bf16", cut(*SHAPES["channel"], 2)),
    "channel-fp32": _tuned("fp32", cut(*SHAPES["channel"], 4)),
    "last-channel-bf16": _tuned("bf16", cut(*SHAPES["last-channel"], 2)),
    "group128-bf16": _tuned("bf16", cut(*SHAPES["group128"], 2)),
    "group128-bf16-zero": _tuned("bf16", cut(*SHAPES["group128"], 2), zero="i32"),
}

"""The gradients of fake quantization.

Memory: x and the gradient are read once and the gradient of x is written once, 6 bytes per element for bfloat16 and
12 for float32, in one pass whichever gradients are wanted. Each program adds up what its tiles contribute to scale
and zero point in registers and writes one float32 for each scale it met; ``torch.sum`` adds these up (some thousand
numbers for a whole tensor). Both orders of summation are fixed by the shape: no atomics, the same result every time.

Arithmetic: about 33 instructions for each bfloat16 element on sm_90 with the scale's gradient, counted in the machine
code; an H200 issues 42 in the time that its memory takes for the 6 bytes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_qat.kernels.arithmetic import clamp, divide, divisor_of, round_half_even, round_small
from lightning_qat.kernels.fake_quantize import SHAPES, as_laid_out
from lightning_qat.kernels.launch import EXACT, Tuned, blocks_of, launch, on_device_of
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
    tuned_numbers,
)

#: Half a step and the slack of the definition (``EDGE`` of the op).
EDGE = 0.5 + 2.0**-10
#: Programs that keep a large GPU busy; more tiles than that are shared among them, for fewer partial sums.
_PROGRAMS = 4096


@triton.jit
def _terms(value, grad, step, zero, outside, quant_min, quant_max, HAS_ZERO: tl.constexpr):
    """Return what each element adds to the gradient of its scale (LSQ)."""
    factor, divisor, reciprocal, rest = divisor_of(step)
    # Quotients are cut beyond the grid (where only their codes matter), and far from infinity.
    far = divisor * (2.0**40 if HAS_ZERO else 2.0**17)
    value = clamp(value * factor, -far, far)
    ratio = divide(value, divisor, reciprocal, rest)
    if HAS_ZERO:
        codes = clamp(round_half_even(ratio) + zero, quant_min, quant_max) - zero
    else:
        codes = clamp(round_small(ratio, value), quant_min, quant_max)
    return grad * tl.where(outside, codes, codes - ratio)


@triton.jit
def _store_partial(
    pointer,
    sums,
    row_tile,
    column_tile,
    rows,
    columns,
    channels,
    parts,
    part,
    PARAMETER: tl.constexpr,
    REPEATED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write a program's sums over its tiles: ``[channels, parts]``, and ``[parts, channels]`` for columns."""
    if PARAMETER == 0:
        tl.store(pointer + part, tl.sum(sums))
    elif PARAMETER == 1:
        row = tl.cast(row_tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        inside = row < rows
        index = row * parts + part
        if REPEATED:
            index = (row % channels) * parts + (row // channels) * (parts // (rows // channels)) + part
        tl.store(pointer + index, tl.sum(sums, axis=1), mask=inside)
    else:
        column = tl.cast(column_tile, tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
        tl.store(pointer + tl.cast(part, tl.int64) * channels + column, tl.sum(sums, axis=0), mask=column < columns)


@triton.jit
def fake_quantize_backward_kernel(
    grad_ptr,
    x_ptr,
    scale_ptr,
    zero_ptr,
    grad_x_ptr,
    scale_sums_ptr,
    zero_sums_ptr,
    rows,
    columns,
    channels,
    steps,
    column_programs,
    parts,
    quant_min,
    quant_max,
    low_edge,
    high_edge,
    HAS_ZERO: tl.constexpr,
    NEEDS_X: tl.constexpr,
    NEEDS_SCALE: tl.constexpr,
    NEEDS_ZERO: tl.constexpr,
    EDGE: tl.constexpr,
    PARAMETER: tl.constexpr,
    REPEATED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Do ``steps`` tiles that share their scales: one behind the other in a row, or below each other for columns."""
    program = tl.program_id(0)
    row_tile, column_tile = program * 0, program
    if PARAMETER != 0:
        row_tile, column_tile = program // column_programs, program % column_programs
    part = row_tile if PARAMETER == 2 else column_tile
    row_step, column_step = (1, 0) if PARAMETER == 2 else (0, 1)
    row_tile = row_tile * steps if PARAMETER == 2 else row_tile
    column_tile = column_tile if PARAMETER == 2 else column_tile * steps

    where = (row_tile, column_tile, rows, columns, channels)
    step = load_parameter(scale_ptr, *where, 1.0, PARAMETER, REPEATED, ROWS, COLUMNS)
    zero = 0.0
    low, high = low_edge * step, high_edge * step
    if HAS_ZERO:
        zero = round_half_even(load_parameter(zero_ptr, *where, 0, PARAMETER, REPEATED, ROWS, COLUMNS))
        low, high = (quant_min - zero - EDGE) * step, (quant_max - zero + EDGE) * step
    scale_sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    zero_sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for i in range(steps):
        tile = (row_tile + i * row_step, column_tile + i * column_step)
        base, offsets, mask = locate(*tile, rows, columns, PARAMETER, ROWS, COLUMNS)
        grad = tl.load(grad_ptr + base + offsets, mask=mask, other=0.0)
        value = tl.load(x_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32)
        outside = (value <= low) | (value >= high)
        if NEEDS_X:
            tl.store(grad_x_ptr + base + offsets, tl.where(outside, 0.0, grad), mask=mask)
        if NEEDS_SCALE:
            scale_sums += _terms(value, grad.to(tl.float32), step, zero, outside, quant_min, quant_max, HAS_ZERO)
        if NEEDS_ZERO:
            zero_sums += tl.where(outside, -step * grad.to(tl.float32), 0.0)
    if NEEDS_SCALE:
        _store_partial(scale_sums_ptr, scale_sums, *where, parts, part, PARAMETER, REPEATED, ROWS, COLUMNS)
    if NEEDS_ZERO:
        _store_partial(zero_sums_ptr, zero_sums, *where, parts, part, PARAMETER, REPEATED, ROWS, COLUMNS)


def _shares(tiles: Tiles) -> tuple[int, int, int]:
    """Return how many tiles a program does, and how many programs there are along rows and along columns."""
    along = tiles.row_tiles if tiles.parameter == COLUMN else tiles.column_tiles
    steps = min(max(1, tiles.programs // _PROGRAMS), along)
    if tiles.parameter == COLUMN:
        return steps, blocks_of(tiles.row_tiles, steps), tiles.column_tiles
    return steps, tiles.row_tiles, blocks_of(tiles.column_tiles, steps)


def _partial_shape(tiles: Tiles, row_programs: int, column_programs: int) -> tuple[int, int]:
    """Return the shape of the partial sums; parts are dimension 0 for columns, else dimension 1."""
    if tiles.parameter == COLUMN:
        return row_programs, tiles.channels
    return tiles.channels, tiles.rows // tiles.channels * column_programs


def fake_quantize_backward_triton(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
    axis: int,
    group: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of ``x``, ``scale`` and ``zero_point``; no elements for those not in ``needs``.

    That of ``x`` equals the definition bit for bit (a NaN in ``x`` passes it), the others up to the order in which
    float32 terms are added. Arguments as in :func:`~lightning_qat.kernels.fake_quantize.fake_quantize_triton`;
    ``grad`` has the shape and dtype of ``x``.
    """
    needs_x, needs_scale, needs_zero = needs[0], needs[1], needs[2] and zero_point is not None
    result = empty_result(x, group)
    tiles, order = cut_channels(result, axis, group, streams=2)
    steps, row_programs, column_programs = _shares(tiles)
    shape = _partial_shape(tiles, row_programs, column_programs)
    step = as_parameter(scale)
    sums = [
        torch.empty(shape, dtype=torch.float32, device=x.device) if needed else step
        for needed in (needs_scale, needs_zero)
    ]
    if needs_x or needs_scale or needs_zero:
        with on_device_of(x):
            zeros = step if zero_point is None else as_parameter(zero_point)
            parts = shape[0] if tiles.parameter == COLUMN else shape[1]
            sizes = (tiles.rows, tiles.columns, tiles.channels, steps, column_programs, parts)
            ends = (float(quant_min), float(quant_max), quant_min - EDGE, quant_max + EDGE)
            wanted = {"NEEDS_X": needs_x, "NEEDS_SCALE": needs_scale, "NEEDS_ZERO": needs_zero}
            launch(
                fake_quantize_backward_kernel,
                (row_programs * column_programs,),
                (lay_like(grad, order), lay_like(x, order), step, zeros, result, *sums, *sizes, *ends),
                {"HAS_ZERO": zero_point is not None, **wanted, "EDGE": EDGE, **tiles.constexprs},
                num_warps=tiles.warps,
                **EXACT,
            )
    zero = scale if zero_point is None else zero_point
    over = 0 if tiles.parameter == COLUMN else 1
    return (
        as_laid_out(result, x) if needs_x else x.new_empty(0),
        _total(sums[0], over, scale) if needs_scale else scale.new_empty(0),
        _total(sums[1], over, zero) if needs_zero else zero.new_empty(0),
    )


def _total(sums: Tensor, over: int, parameter: Tensor) -> Tensor:
    return sums.sum(over).reshape(parameter.shape).to(parameter.dtype)


def _tuned(x: str, tiles: Tiles, *, scale: bool = True, zero: str = "") -> Tuned:
    numbers, constants = tuned_numbers(tiles)
    steps, row_programs, column_programs = _shares(tiles)
    shape = _partial_shape(tiles, row_programs, column_programs)
    counts = {"steps": steps, "column_programs": column_programs, "parts": shape[tiles.parameter != COLUMN]}
    numbers |= {name: "i32" for name, count in counts.items() if count != 1}
    constants |= {name: 1 for name, count in counts.items() if count == 1}
    for table in (numbers, constants):
        table.pop("column_tiles", None)
    return Tuned(
        kernel=fake_quantize_backward_kernel,
        signature={
            **dict.fromkeys(("grad_ptr", "x_ptr", "grad_x_ptr"), f"*{x}:16"),
            **dict.fromkeys(("scale_ptr", "scale_sums_ptr", "zero_sums_ptr"), "*fp32:16"),
            "zero_ptr": f"*{zero or 'fp32'}:16",
            **numbers,
            **dict.fromkeys(("quant_min", "quant_max", "low_edge", "high_edge"), "fp32"),
        },
        constexprs={
            "HAS_ZERO": bool(zero),
            "NEEDS_X": True,
            "NEEDS_SCALE": scale,
            "NEEDS_ZERO": zero == "fp32",
            "EDGE": EDGE,
            **tiles.constexprs,
            **constants,
        },
        num_warps=tiles.warps,
    )


TUNED = {
    "tensor-bf16": _tuned("bf16", cut(*SHAPES["tensor"], 2, streams=2)),
    "tensor-bf16-x-only": _tuned("bf16", cut(*SHAPES["tensor"], 2, streams=2), scale=False),
    "tensor-bf16-zero": _tuned("bf16", cut(*SHAPES["tensor"], 2, streams=2), zero="i32"),
    "tensor-bf16-learned-zero": _tuned("bf16", cut(*SHAPES["tensor"], 2, streams=2), zero="fp32"),
    "tensor-fp32": _tuned("fp32", cut(*SHAPES["tensor"], 4, streams=2)),
    "channel-bf16": _tuned("bf16", cut(*SHAPES["channel"], 2, streams=2)),
    "channel-fp32": _tuned("fp32", cut(*SHAPES["channel"], 4, streams=2)),
    "last-channel-bf16": _tuned("bf16", cut(*SHAPES["last-channel"], 2, streams=2)),
    "group128-bf16": _tuned("bf16", cut(*SHAPES["group128"], 2, streams=2)),
}

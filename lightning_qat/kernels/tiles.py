"""How a tensor is cut into tiles: rows that share a scale, walked as they lie in memory.

=============================  ==================  =================  ===========
granularity                    rows                columns            parameter
=============================  ==================  =================  ===========
per tensor                     1                   numel              ``TENSOR``
per channel, group, token      before * channels   after              ``ROW``
per channel, the innermost     before              channels           ``COLUMN``
=============================  ==================  =================  ===========

The rows are dense, so that a tile is found by one 64-bit product for the program and 32-bit sums for its elements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_qat.kernels.launch import block_up_to, blocks_of

#: Which element of the scale belongs to an element of a tile.
TENSOR, ROW, COLUMN = 0, 1, 2

#: Bytes of a tile, and warps that walk it: eight loads of 16 bytes for each thread, enough of them on their way to
#: keep the memory busy, and 64 elements of 2 bytes among which a program's own arithmetic is shared. On an H100 twice
#: the warps are as fast but for columns with scales of their own, gradients of a channel's scale and observing, which
#: take 10 to 15 % more; half the bytes cost groups of 128 as much.
TILE_BYTES, WARPS = 16384, 4
#: The same for tensors too small to give every multiprocessor a program of that size.
_FEW_BYTES, _FEW_WARPS = 2048, 4
_SMALL = 1 << 20
#: Columns of a tile whose columns have scales of their own: enough for whole memory transactions, few enough that
#: the scales (4 bytes for each column, against 2 or 4 for each element) are read once for many rows.
MOST_COLUMNS = 256


@dataclass(frozen=True)
class Tiles:
    """The cut of one tensor; see the module. All numbers follow from the shape."""

    rows: int
    columns: int
    channels: int
    parameter: int
    row_block: int
    column_block: int
    warps: int

    @cached_property
    def row_tiles(self) -> int:
        return blocks_of(self.rows, self.row_block)

    @cached_property
    def column_tiles(self) -> int:
        return blocks_of(self.columns, self.column_block)

    @cached_property
    def programs(self) -> int:
        return self.row_tiles * self.column_tiles

    @cached_property
    def sizes(self) -> tuple[int, int, int, int]:
        """The arguments of a kernel that say how much there is: rows, columns, channels, tiles of a row."""
        return self.rows, self.columns, self.channels, self.column_tiles

    @cached_property
    def constexprs(self) -> dict[str, int | bool]:
        """The compile-time arguments of a kernel."""
        return {
            "PARAMETER": self.parameter,
            "REPEATED": self.parameter == ROW and self.rows != self.channels,
            "ROWS": self.row_block,
            "COLUMNS": self.column_block,
        }


def cut(rows: int, columns: int, channels: int, parameter: int, itemsize: int, streams: int = 1) -> Tiles:
    """Return the tiles of ``[rows, columns]`` elements of ``itemsize`` bytes, of which ``streams`` are read at once."""
    size, warps = (_FEW_BYTES, _FEW_WARPS) if rows * columns < _SMALL else (TILE_BYTES, WARPS)
    elements = size // (itemsize * streams)
    column_block = block_up_to(columns, min(MOST_COLUMNS, elements) if parameter == COLUMN else elements)
    row_block = block_up_to(rows, elements // column_block)
    return Tiles(rows, columns, channels, parameter, row_block, column_block, warps)


def tuned_numbers(tiles: Tiles) -> tuple[dict[str, str], dict[str, int]]:
    """Return signature and constexprs of the four sizes as a launch specializes them: a 1 is compiled in."""
    sizes = {
        "rows": tiles.rows,
        "columns": tiles.columns,
        "channels": tiles.channels,
        "column_tiles": tiles.column_tiles,
    }
    signature = {name: "i32:16" if size % 16 == 0 else "i32" for name, size in sizes.items() if size != 1}
    return signature, {name: 1 for name, size in sizes.items() if size == 1}


def cut_channels(x: Tensor, axis: int, group: int, streams: int = 1) -> tuple[Tiles, list[int] | None]:
    """Return the tiles of dense ``x`` and the order of dimensions in which it lies, None for as it is.

    Args:
        x: dense; contiguous where ``group`` is given.
        axis: the channel dimension, -1 for none.
        group: elements of a run that share a scale, 0 for none.
        streams: tensors like ``x`` that are read at the same time.
    """
    strides = None if x.is_contiguous() else x.stride()
    return _cut_dense(x.shape, strides, axis, group, x.dtype.itemsize, streams)


@lru_cache(maxsize=4096)
def _cut_dense(
    shape: torch.Size, strides: tuple[int, ...] | None, axis: int, group: int, itemsize: int, streams: int
) -> tuple[Tiles, list[int] | None]:
    """Do what :func:`cut_channels` does, once for each shape: it took a third of a launch."""
    size = itemsize, streams
    if group:
        runs = shape.numel() // group
        return cut(runs, group, runs, ROW, *size), None
    order = None if strides is None else sorted(range(len(shape)), key=lambda d: -strides[d])
    if axis < 0:
        return cut(1, shape.numel(), 1, TENSOR, *size), order
    sizes: Sequence[int] = shape if order is None else [shape[d] for d in order]
    at = axis if order is None else order.index(axis)
    before, channels, after = prod(sizes[:at]), sizes[at], prod(sizes[at + 1 :])
    if after == 1:
        return cut(before, channels, channels, COLUMN, *size), order
    return cut(before * channels, after, channels, ROW, *size), order


def lay_like(t: Tensor, order: list[int] | None) -> Tensor:
    """Return ``t`` with its memory in the order of :func:`cut_channels`; a copy only if it lies otherwise."""
    return t.contiguous() if order is None else t.permute(order).contiguous()


def as_parameter(parameter: Tensor) -> Tensor:
    """Return a scale or zero point with its elements one after the other."""
    return parameter.detach().contiguous()


def empty_result(x: Tensor, group: int) -> Tensor:
    """Return uninitialized dense memory for a result like ``x``; contiguous where runs share a scale."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device) if group else torch.empty_like(x)


@triton.jit
def tile_of(program, column_tiles, PARAMETER: tl.constexpr):
    """Return the row and the column of tiles that a program has; without a division where there is one row."""
    if PARAMETER == 0:
        return program * 0, program
    return program // column_tiles, program % column_tiles


@triton.jit
def locate(
    row_tile,
    column_tile,
    rows,
    columns,
    PARAMETER: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Return where a tile begins (64 bits), its elements from there on, and which of them exist."""
    row, column = tl.cast(row_tile, tl.int64) * ROWS, tl.cast(column_tile, tl.int64) * COLUMNS
    c = tl.arange(0, COLUMNS)[None, :]
    mask = c < tl.minimum(columns - column, COLUMNS).to(tl.int32)
    offsets = c
    if ROWS != 1:
        r = tl.arange(0, ROWS)[:, None]
        mask = (r < tl.minimum(rows - row, ROWS).to(tl.int32)) & mask
        # The rows of other tiles that have several are short.
        offsets = (r.to(tl.int64) if PARAMETER == 2 else r) * columns + c
    return row * columns + column, offsets, mask


@triton.jit
def load_parameter(
    pointer,
    row_tile,
    column_tile,
    rows,
    columns,
    channels,
    other,
    PARAMETER: tl.constexpr,
    REPEATED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Return the tile's scales or zero points as float32: one number, ``[ROWS, 1]`` or ``[1, COLUMNS]``."""
    if PARAMETER == 0:
        value = tl.load(pointer)
    elif PARAMETER == 1:
        index = tl.cast(row_tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        inside = index < rows
        if REPEATED:
            index = index % channels
        value = tl.load(pointer + index, mask=inside, other=other)[:, None]
    else:
        index = tl.cast(column_tile, tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
        value = tl.load(pointer + index, mask=index < columns, other=other)[None, :]
    return value.to(tl.float32)

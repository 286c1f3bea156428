"""Vector-wise int8 (LLM.int8()) with given scales: codes of a matrix, and the values of codes.

Memory: 3 bytes per element for bfloat16, once, and the scale of a row for each tile of it. Everything is rounded to
float16 first and then computed in float32, as :mod:`lightning_qat.ops.vectorwise` defines it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_qat.kernels.arithmetic import clamp
from lightning_qat.kernels.launch import EXACT, Tuned, launch, on_device_of
from lightning_qat.kernels.tiles import ROW, Tiles, cut, load_parameter, locate, tile_of, tuned_numbers

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
    "codes-bf16": _codes("bf16", 2),
    "codes-fp32": _codes("fp32", 4),
    "dequantize-bf16": _values("bf16", 2),
    "dequantize-fp32": _values("fp32", 4),
}

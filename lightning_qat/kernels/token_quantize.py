"""Per-token quantization at run time: the range of each row, its scale and its codes in one launch.

Memory: a row of up to 8192 elements is read once and stays in registers, 3 bytes per element for bfloat16 (2 read,
1 written). A longer row is read twice, the second time mostly from the L2 cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_qat.kernels.arithmetic import clamp, divide, divisor_of, magnitude, round_half_even, round_small
from lightning_qat.kernels.launch import EXACT, Tuned, block_up_to, blocks_of, launch, on_device_of

#: Elements of a row that a program holds, and of all its rows if they are short.
MOST_COLUMNS, ELEMENTS = 8192, 2048

_LARGEST = tl.constexpr(torch.finfo(torch.float32).max)
_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


@triton.jit
def _range(value, SYMMETRIC: tl.constexpr):
    """Return the range of each row widened to contain 0 and cut to finite numbers; NaN where there is one.

    Elements that do not exist are 0. A symmetric range is ``0, absmax``.
    """
    size = magnitude(value, 1)
    if SYMMETRIC:
        return tl.zeros_like(size), clamp(size, 0.0, _LARGEST)
    low, high = clamp(tl.min(value, axis=1), -_LARGEST, 0.0), clamp(tl.max(value, axis=1), 0.0, _LARGEST)
    return tl.where(size == size, low, float("nan")), tl.where(size == size, high, float("nan"))


@triton.jit
def _parameters(low, high, quant_min, quant_max, SYMMETRIC: tl.constexpr):
    """Return scale and zero point of ``choose_scale_zero_point``, float32."""
    zero = tl.zeros_like(low)
    if SYMMETRIC:
        size = tl.maximum(-low, high, propagate_nan=tl.PropagateNan.ALL)
        scale = tl.div_rn(size, size * 0.0 + quant_max)
        empty = size == 0.0
    else:
        scale = tl.div_rn(high, high * 0.0 + quant_max) - tl.div_rn(low, low * 0.0 + quant_max)
        empty = high == low
    scale = tl.where(empty, 1.0, tl.maximum(scale, _TINY, propagate_nan=tl.PropagateNan.ALL))
    if not SYMMETRIC:
        zero = clamp(round_half_even(tl.div_rn(-low, scale)), quant_min, quant_max)
    return scale, tl.where(zero == zero, zero, 0.0)


@triton.jit
def _codes(value, scale, zero, quant_min, quant_max, SYMMETRIC: tl.constexpr):
    """Return the codes of a tile, that of 0 for NaN."""
    factor, divisor, reciprocal, rest = divisor_of(scale)
    # Twice the width of the grid: what is cut there is clamped after the zero point is added.
    far = divisor * 512.0
    cut = clamp(value * factor, -far, far)
    codes = clamp(round_small(divide(cut, divisor, reciprocal, rest), cut) + zero, quant_min, quant_max)
    codes = tl.where(codes == codes, codes, zero)
    return codes.to(tl.int8) if SYMMETRIC else codes.to(tl.uint8)


@triton.jit
def token_quantize_kernel(
    x_ptr,
    codes_ptr,
    scale_ptr,
    zero_ptr,
    rows,
    columns,
    blocks,
    quant_min,
    quant_max,
    SYMMETRIC: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Quantize ``ROWS`` rows; one that is longer than a tile in two rounds."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = row < rows
    column = tl.arange(0, COLUMNS)[None, :]
    start = row[:, None] * columns
    mask = exists[:, None] & (column < columns)
    value = tl.load(x_ptr + start + column, mask=mask, other=0.0).to(tl.float32)
    low, high = _range(value, SYMMETRIC)
    for block in range(1, blocks):
        at = block * COLUMNS + column
        inside = exists[:, None] & (at < columns)
        more_low, more_high = _range(tl.load(x_ptr + start + at, mask=inside, other=0.0).to(tl.float32), SYMMETRIC)
        low = tl.minimum(low, more_low, propagate_nan=tl.PropagateNan.ALL)
        high = tl.maximum(high, more_high, propagate_nan=tl.PropagateNan.ALL)
    scale, zero = _parameters(low, high, quant_min, quant_max, SYMMETRIC)
    tl.store(scale_ptr + row, scale, mask=exists)
    if not SYMMETRIC:
        tl.store(zero_ptr + row, zero.to(tl.int32), mask=exists)
    step, shift = scale[:, None], zero[:, None]
    tl.store(codes_ptr + start + column, _codes(value, step, shift, quant_min, quant_max, SYMMETRIC), mask=mask)
    for block in range(1, blocks):
        at = block * COLUMNS + column
        inside = exists[:, None] & (at < columns)
        value = tl.load(x_ptr + start + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(codes_ptr + start + at, _codes(value, step, shift, quant_min, quant_max, SYMMETRIC), mask=inside)


def _cut(rows: int, columns: int) -> tuple[int, int, int]:
    """Return rows and columns of a tile, and warps."""
    column_block = block_up_to(columns, MOST_COLUMNS)
    row_block = block_up_to(rows, max(1, ELEMENTS // column_block))
    return row_block, column_block, 8 if column_block >= 4096 else 4


def token_quantize_triton(x: Tensor, *, symmetric: bool = True) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return 8-bit codes of ``x``, the scale of each of its rows, and their zero points (None if symmetric).

    Scale, zero point and codes are those of ``choose_scale_zero_point`` over the last dimension and of
    ``quantize_affine``, bit for bit.

    Args:
        x: float16, bfloat16 or float32, ``[..., K]``, not empty.
        symmetric: codes from -127 to 127; otherwise from 0 to 255.

    Returns:
        Codes, int8 or uint8, contiguous in the shape of ``x``; the scale, float32 ``[..., 1]``; and the zero
        point, int32 ``[..., 1]``.
    """
    columns = x.shape[-1]
    rows = x.numel() // columns
    row_block, column_block, warps = _cut(rows, columns)
    source, kept = x.contiguous(), (*x.shape[:-1], 1)
    codes = torch.empty(x.shape, dtype=torch.int8 if symmetric else torch.uint8, device=x.device)
    scale = torch.empty(kept, dtype=torch.float32, device=x.device)
    zero = scale if symmetric else torch.empty(kept, dtype=torch.int32, device=x.device)
    ends = (-127.0, 127.0) if symmetric else (0.0, 255.0)
    with on_device_of(x):
        launch(
            token_quantize_kernel,
            (blocks_of(rows, row_block),),
            (source, codes, scale, zero, rows, columns, blocks_of(columns, column_block), *ends),
            {"SYMMETRIC": symmetric, "ROWS": row_block, "COLUMNS": column_block},
            num_warps=warps,
            **EXACT,
        )
    return codes, scale, None if symmetric else zero


def _tuned(x: str, columns: int, *, symmetric: bool = True) -> Tuned:
    row_block, column_block, warps = _cut(8192, columns)
    blocks = blocks_of(columns, column_block)
    return Tuned(
        kernel=token_quantize_kernel,
        signature={
            "x_ptr": f"*{x}:16",
            "codes_ptr": f"*{'i8' if symmetric else 'u8'}:16",
            "scale_ptr": "*fp32:16",
            "zero_ptr": "*fp32:16" if symmetric else "*i32:16",
            "rows": "i32:16",
            "columns": "i32:16",
            **({"blocks": "i32"} if blocks > 1 else {}),
            "quant_min": "fp32",
            "quant_max": "fp32",
        },
        constexprs={
            "SYMMETRIC": symmetric,
            "ROWS": row_block,
            "COLUMNS": column_block,
            **({} if blocks > 1 else {"blocks": 1}),
        },
        num_warps=warps,
    )


TUNED = {
    "bf16-768": _tuned("bf16", 768),
    "bf16-4096": _tuned("bf16", 4096),
    "bf16-8192": _tuned("bf16", 8192),
    "bf16-28672": _tuned("bf16", 28672),
    "fp32-4096": _tuned("fp32", 4096),
    "bf16-4096-asymmetric": _tuned("bf16", 4096, symmetric=False),
}

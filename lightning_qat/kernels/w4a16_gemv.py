"""Few rows times a packed 4-bit weight: bound by reading the weight once, half a byte per element.

A thread reads 8 codes of each of 8 or 16 rows of the weight and multiplies them on the float32 units. A nibble
becomes a float by one logical operation and one multiply-add: its bits in the mantissa of 2**23 are
2**23 + n * 16**j, from which the multiply-add takes 2**23 and scales by 16**-j, both exactly. Scales, zero points and
absmax are applied to the sum of 8 products, in float32. With few columns the depth is split, and a second kernel adds
the parts in order: the result is the same in every run.

Bytes moved per weight: ``1/2 + 4 / group``; the rows come from L1 and L2. Products and sums are float32, weights are
exact: nothing is rounded to the dtype of ``x`` before the end.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_qat.kernels.launch import Tuned, block_up_to, blocks_of, on_device_of

#: Codes of a word: as many share a scale at least.
WORD = 8
#: The most rows for which this is the faster way; beyond, matrix units are.
MOST_ROWS = 4
#: Columns of a program, which share what is read of ``x``, by rows: as many as the registers hold sums for.
_COLUMNS = {1: 16, 2: 8, 4: 8}
_WARPS = 4
_WORDS = 32 * _WARPS
#: Programs that keep every multiprocessor of a large GPU reading.
_PROGRAMS = 512
#: No code depends on these sums, and a multiply-add rounds once instead of twice.
_FUSED = {"enable_fp_fusion": True}


@triton.jit
def _weights(word, table_ptr, i: tl.constexpr, CODEBOOK: tl.constexpr):
    """Return element ``i`` of each word: the table's value, or the code minus 8."""
    if CODEBOOK:  # the high nibble is the even element
        nibble = (word >> (4 * (i ^ 1))) & 15
        return tl.load(table_ptr + nibble)
    # Nibbles 0 to 4 lie within the 23 bits of the mantissa where they are; the others after one shift.
    j: tl.constexpr = i if i < 5 else i - 5
    shifted = word if i < 5 else word >> 20
    bits = (shifted & (15 << (4 * j))) | 0x4B000000
    unit: tl.constexpr = 16.0**-j
    return bits.to(tl.float32, bitcast=True) * unit - (8388608.0 * unit + 8.0)


@triton.jit
def w4a16_gemv_kernel(
    x_ptr, words_ptr, scale_ptr, zero_ptr, table_ptr, bias_ptr, out_ptr, M, N, K, group, part,
    CODEBOOK: tl.constexpr, ZERO: tl.constexpr, BIAS: tl.constexpr, EVEN: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """``BLOCK_N`` columns of the result, summed over ``part`` words of 8 codes."""
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    column_at = tl.where(column < N, column, 0).to(tl.int64)
    row = tl.arange(0, ROWS)
    words, groups = K // 8, K // group
    end = tl.minimum((split + 1) * part, words)
    sums = tl.zeros((ROWS, BLOCK_N, WORDS), tl.float32)
    x_at = x_ptr + row.to(tl.int64)[:, None, None] * K + tl.arange(0, 8)[None, None, :]
    for first in range(split * part, end, WORDS):
        # One word for each thread and column, and the same thread holds the 8 elements of x that belong to it: no
        # exchange between threads. Saying that words are not contiguous keeps 16-byte loads from undoing this.
        index = tl.max_contiguous(first + tl.arange(0, WORDS), 1)
        exists = tl.full((WORDS,), True, tl.int1) if EVEN else index < end
        word = tl.load(words_ptr + column_at[:, None] * words + index[None, :], mask=exists[None, :], other=0)
        x = tl.load(
            x_at + 8 * (first + tl.arange(0, WORDS))[None, :, None],
            mask=exists[None, :, None] & (row < M)[:, None, None],
            other=0.0,
        ).to(tl.float32)
        even, odd = tl.split(tl.reshape(x, (ROWS, WORDS, 4, 2)))
        x04, x26 = tl.split(tl.reshape(even, (ROWS, WORDS, 2, 2)))
        x15, x37 = tl.split(tl.reshape(odd, (ROWS, WORDS, 2, 2)))
        x0, x4 = tl.split(x04)
        x2, x6 = tl.split(x26)
        x1, x5 = tl.split(x15)
        x3, x7 = tl.split(x37)
        elements = (x0, x1, x2, x3, x4, x5, x6, x7)
        products = tl.zeros((ROWS, BLOCK_N, WORDS), tl.float32)
        for i in tl.static_range(8):
            products += _weights(word, table_ptr, i, CODEBOOK)[None, :, :] * elements[i][:, None, :]
        scale_at = column_at[:, None] * groups + (index // (group // 8))[None, :]
        scale = tl.load(scale_ptr + scale_at, mask=exists[None, :], other=0.0)
        if ZERO:
            zero = tl.load(zero_ptr + scale_at, mask=exists[None, :], other=0).to(tl.float32)
            total = ((x0 + x1) + (x2 + x3)) + ((x4 + x5) + (x6 + x7))
            products += (8.0 - zero)[None, :, :] * total[:, None, :]
        sums += products * scale[None, :, :]
    value = tl.sum(sums, 2)
    if BIAS:
        value += tl.load(bias_ptr + column_at).to(tl.float32)[None, :]
    out_at = out_ptr + (split * M + row).to(tl.int64)[:, None] * N + column[None, :]
    tl.store(out_at, value.to(out_ptr.dtype.element_ty), mask=(row < M)[:, None] & (column < N)[None, :])


@triton.jit
def add_parts_kernel(parts_ptr, bias_ptr, out_ptr, size, N, parts, BIAS: tl.constexpr, BLOCK: tl.constexpr):
    """Add the parts of each element, always in the same order, and the bias."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = offsets < size
    value = tl.zeros((BLOCK,), tl.float32)
    for part in range(parts):
        value += tl.load(parts_ptr + part * tl.cast(size, tl.int64) + offsets, mask=exists, other=0.0)
    if BIAS:
        value += tl.load(bias_ptr + offsets % N, mask=exists, other=0.0).to(tl.float32)
    tl.store(out_ptr + offsets, value.to(out_ptr.dtype.element_ty), mask=exists)


def add_parts(parts: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """Write ``parts.sum(0) + bias`` into ``out`` and return it.

    Args:
        parts: float32 ``[S, M, N]``.
        bias: ``[N]`` or None.
        out: ``[M, N]``.
    """
    with on_device_of(out):
        add_parts_kernel[(blocks_of(out.numel(), 256),)](
            parts, parts if bias is None else bias, out, out.numel(), out.shape[1], parts.shape[0],
            BIAS=bias is not None, BLOCK=256, num_warps=2, **_FUSED,
        )  # fmt: skip
    return out


def gemv_fits(rows: int, columns: int, group: int) -> bool:
    """Return whether :func:`launch_w4a16_gemv` takes ``rows`` of ``x`` with ``columns`` and groups of ``group``."""
    return 0 < rows <= MOST_ROWS and columns % WORD == 0 and group % WORD == 0 and columns % group == 0


def launch_w4a16_gemv(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    table: Tensor | None,
    bias: Tensor | None,
    *,
    group: int,
    split: int | None = None,
) -> Tensor:
    """Return ``x @ weight.T + bias`` for at most ``MOST_ROWS`` rows; arguments as in ``launch_w4a16_matmul``.

    Args:
        x: contiguous ``[M, K]``.
        packed: uint8, contiguous, ``N * K / 2`` bytes.
        scale: float32 ``[N * K / group]``; with ``table`` the absmax.
        zero_point: like ``scale`` or None.
        table: float32 ``[16]``, or None for integers.
        bias: ``[N]`` or None.
        group: codes that share a scale, a multiple of 8 that divides ``K``.
        split: parts into which the depth is cut; None follows from the shape.
    """
    m, k = x.shape
    n, words = packed.numel() * 2 // k, k // WORD
    rows = block_up_to(m, MOST_ROWS)
    columns = _COLUMNS[rows]
    tiles, steps = blocks_of(n, columns), blocks_of(words, _WORDS)
    split = min(steps, split or blocks_of(_PROGRAMS, tiles))
    part = blocks_of(steps, split) * _WORDS
    split = blocks_of(words, part)
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    target = out if split == 1 else torch.empty(split, m, n, dtype=torch.float32, device=x.device)
    own_bias = bias if split == 1 else None
    with on_device_of(x):
        w4a16_gemv_kernel[(tiles, split)](
            x, packed.view(torch.int32), scale, scale if zero_point is None else zero_point,
            scale if table is None else table, scale if own_bias is None else own_bias, target, m, n, k, group, part,
            CODEBOOK=table is not None, ZERO=zero_point is not None, BIAS=own_bias is not None,
            EVEN=words % part == 0, ROWS=rows, BLOCK_N=columns, WORDS=_WORDS, num_warps=_WARPS, **_FUSED,
        )  # fmt: skip
    return out if split == 1 else add_parts(target, bias, out)


def _tuned() -> dict[str, Tuned]:
    signature = {"x_ptr": "*bf16:16", "words_ptr": "*i32:16", "zero_ptr": "*i32:16", "out_ptr": "*bf16:16"}
    signature |= dict.fromkeys(("scale_ptr", "table_ptr", "bias_ptr"), "*fp32:16")
    signature |= {"M": "i32", "N": "i32:16", "K": "i32:16", "group": "i32:16", "part": "i32:16"}
    found = {}
    for rows in (1, 2, 4):
        for name, codebook, zero in (("symmetric", False, False), ("zero", False, True), ("codebook", True, False)):
            constexprs: dict[str, int] = {"CODEBOOK": codebook, "ZERO": zero, "BIAS": True, "EVEN": True}
            constexprs |= {"ROWS": rows, "BLOCK_N": _COLUMNS[rows], "WORDS": _WORDS}
            found[f"{name}-{rows}"] = Tuned(
                kernel=w4a16_gemv_kernel, signature=signature, constexprs=constexprs, num_warps=_WARPS, options=_FUSED
            )
    return found


TUNED = _tuned()

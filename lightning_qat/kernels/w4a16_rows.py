"""Up to 32 rows of 16 bits times a packed 4-bit weight, on the matrix units and without exchanges between threads.

Decoding is bound by reading the weight once, half a byte per element, if all else stays out of the way:

* A matrix unit does not mind in which order it goes through the depth, only that both operands have the same. The
  weight's is the one in which a thread finds the nibbles of its own words, of 16 bytes that it copied itself; ``x``,
  which is small, is laid out to match. Rows of the tile are ordered so that each warp has a part of the depth.
* Two nibbles become two numbers by one logical operation: their bits in the mantissa of 128 (bfloat16) or 1024
  (float16) are 128 + n, from which one packed subtraction takes 128 + zero point, exactly.
* What is multiplied is ``code - zero_point``; scales are applied in float32 to the sum of a group.
* The parts of the depth are added in order within the program: one launch, and the same result in every run.

Bytes moved per weight: ``1/2 + 4 / group``. On sm_90 a warp takes about 2.5 instructions for each of its 32 weights,
for 8 rows as for one, where float32 sums of :mod:`lightning_qat.kernels.w4a16_gemv` take 5.4 for one.
"""

from __future__ import annotations

from math import gcd
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_qat.kernels.launch import Tuned, blocks_of, launch, on_device_of

#: The most rows, and those of a program at most, in steps of the matrix units' 8. Programs of the same columns follow
#: each other: the second finds the weight in the L2 cache.
MOST_ROWS, _ROWS = 32, 16
#: Parts of the depth, one for each warp of a program.
_CHUNKS = 8
#: Elements of the depth that a warp takes at once, or less if a group has less; below the least, words would be shared.
_MOST_STEP, _LEAST_STEP = 128, 32
#: Rows of the weight that a program has, for a large and a small weight, and programs that a large GPU needs. Zero
#: points take registers too: they have the few.
_MANY_COLUMNS, _FEW_COLUMNS, _PROGRAMS = 32, 16, 128
#: By more than 8 rows and step: at least 16 KB of the weight on their way for each program, in at most 69 KB of shared
#: memory, of which all GPUs since sm_80 have 99 for a program.
_STAGES = {
    (False, 128): 3, (False, 64): 4, (False, 32): 6,
    (True, 128): 2, (True, 64): 3, (True, 32): 5,
}  # fmt: skip
#: Numbers of 4 bits in the mantissa of both halves of a word: 128 in bfloat16, 1024 in float16.
_MAGIC = {torch.bfloat16: 0x43004300, torch.float16: 0x64006400}
#: Elements of the depth that lie side by side in a thread's operands: Triton's choice, by version, where operands come
#: from joined tensors. A wrong number costs time, for then threads exchange what they have, but no digit.
_SIDE_BY_SIDE = 4 if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 8) else 2
#: No code depends on these sums, and a multiply-add rounds once instead of twice.
_FUSED = {"enable_fp_fusion": True}
#: Left alone, ptxas spills with zero points rather than take more than 80 registers, and takes 130 for more rows; with
#: 128 there is room for two programs on a multiprocessor.
_LIMITED: dict[str, Any] = {**_FUSED, "maxnreg": 128}


@triton.jit
def _number(pair, zero, HIGH: tl.constexpr, DTYPE: tl.constexpr):
    """Return the number in one half of each word, less ``zero``; exact in 16 bits, in which the compiler does it."""
    half = pair >> 16 if HIGH else pair
    return (half.to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32) - zero.to(tl.float32)).to(DTYPE)


@triton.jit
def _four(p0, p1, p2, p3, zero, HIGH: tl.constexpr, DTYPE: tl.constexpr):
    first = tl.join(_number(p0, zero, HIGH, DTYPE), _number(p1, zero, HIGH, DTYPE))
    return tl.join(first, tl.join(_number(p2, zero, HIGH, DTYPE), _number(p3, zero, HIGH, DTYPE)))


@triton.jit
def _weights(word, zero, magic, DTYPE: tl.constexpr, SIDE: tl.constexpr):
    """Return the codes of ``[C, N, W]`` words less their zero points, ``[C, N, 8 * W]`` in the order of the units.

    Element ``4 * low + 2 * step + high`` of word ``i`` of thread ``t`` is in half ``low`` after ``2 * step + high``
    shifts of 4 bits.
    """
    parts: tl.constexpr = word.shape[0]
    columns: tl.constexpr = word.shape[1]
    words: tl.constexpr = word.shape[2]
    p0 = (word & 0x000F000F) | magic
    p1 = ((word >> 4) & 0x000F000F) | magic
    p2 = ((word >> 8) & 0x000F000F) | magic
    p3 = ((word >> 12) & 0x000F000F) | magic
    value = tl.join(_four(p0, p1, p2, p3, zero, False, DTYPE), _four(p0, p1, p2, p3, zero, True, DTYPE))
    value = tl.reshape(value, (parts, columns, 4, words // 4, 2, 2, 2))  # thread, word, high, step, low
    # To word, step, high, thread, low; or word, high, thread, step, low.
    value = tl.permute(value, (0, 1, 3, 5, 4, 2, 6) if SIDE == 2 else (0, 1, 3, 4, 2, 5, 6))
    return tl.reshape(value, (parts, columns, words * 8))


@triton.jit
def _operand(x, SIDE: tl.constexpr):
    """Return ``[C, M, K]`` elements as ``[C, K, M]``, with the depth in the order of :func:`_weights`."""
    parts: tl.constexpr = x.shape[0]
    rows: tl.constexpr = x.shape[1]
    depth: tl.constexpr = x.shape[2]
    x = tl.reshape(x, (parts, rows, 4, depth // 32, 2, 2, 2))  # thread, word, low, step, high
    x = tl.permute(x, (0, 3, 5, 6, 2, 4, 1) if SIDE == 2 else (0, 3, 6, 2, 5, 4, 1))
    return tl.reshape(x, (parts, depth, rows))


@triton.jit
def w4a16_rows_kernel(
    x_ptr, words_ptr, scale_ptr, zero_ptr, bias_ptr, out_ptr, M, N, words, part, group_steps, magic,
    ZERO: tl.constexpr, BIAS: tl.constexpr, EVEN: tl.constexpr, SIDE: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, CHUNKS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """``ROWS`` rows and ``COLUMNS`` columns of the result, the depth in ``CHUNKS`` parts of ``part`` words."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    unit: tl.constexpr = 128 if dtype.is_bf16() else 1024
    each: tl.constexpr = STEP // 8
    first, first_row = tl.program_id(0) // tl.cdiv(M, ROWS) * COLUMNS, tl.program_id(0) % tl.cdiv(M, ROWS) * ROWS
    # Tile rows as warps and threads take them: 8 rows of the weight for each part of the depth, then the next 8.
    tile_row = tl.arange(0, CHUNKS * COLUMNS)
    chunk_of, row_of = tile_row // 8 % CHUNKS, tile_row // 8 // CHUNKS * 8 + tile_row % 8
    column = tl.minimum(first + row_of, N - 1).to(tl.int64)
    # Four threads to a row, as the matrix units want them: of fewer words Triton would give each thread the most.
    within = tl.max_contiguous(tl.arange(0, each), each // 4)
    word_at = words_ptr + (column * words + chunk_of * part)[:, None] + within[None, :]
    chunk, row = tl.arange(0, CHUNKS)[:, None, None], first_row + tl.arange(0, ROWS)[None, :, None]
    row_exists = row < M
    x_at = x_ptr + chunk * (part * 8) + row.to(tl.int64) * (words * 8) + tl.arange(0, STEP)[None, None, :]
    group_row = tl.minimum(first + tl.arange(0, COLUMNS)[None, :], N - 1).to(tl.int64)
    group_at = group_row * (words // each // group_steps)
    step_of = tl.arange(0, CHUNKS)[:, None] * (part // each)
    sums = tl.zeros((CHUNKS, COLUMNS, ROWS), tl.float32)
    for k in range(part // each):
        left = words - k * each
        at = group_at + (step_of + k) // group_steps
        exists = (step_of * each < left) & (group_row >= 0)
        if EVEN:
            word = tl.load(word_at + k * each)
            x = tl.load(x_at + k * STEP, mask=row_exists, other=0.0)
            scale = tl.load(scale_ptr + at)
        else:
            word = tl.load(word_at + k * each, mask=(chunk_of * part < left)[:, None], other=0)
            x = tl.load(x_at + k * STEP, mask=row_exists & (chunk * part < left), other=0.0)
            scale = tl.load(scale_ptr + at, mask=exists, other=0.0)
        zero = tl.full((1, 1, 1), unit + 8, dtype)
        if ZERO:
            own = tl.load(zero_ptr + at) if EVEN else tl.load(zero_ptr + at, mask=exists, other=0)
            zero = (own + unit).to(tl.float32).to(dtype)[:, :, None]
        word = tl.permute(tl.reshape(word, (COLUMNS // 8, CHUNKS, 8, each)), (1, 0, 2, 3))
        value = _weights(tl.reshape(word, (CHUNKS, COLUMNS, each)), zero, magic, dtype, SIDE)
        sums += tl.dot(value, _operand(x, SIDE)) * scale[:, :, None]
    result = tl.sum(sums, 0)
    column = first + tl.arange(0, COLUMNS)[:, None]
    row = first_row + tl.arange(0, ROWS)[None, :]
    if BIAS:
        result += tl.load(bias_ptr + column, mask=column < N, other=0.0).to(tl.float32)
    out_at = out_ptr + row.to(tl.int64) * N + column
    tl.store(out_at, result.to(out_ptr.dtype.element_ty), mask=(column < N) & (row < M))


def rows_fit(rows: int, columns: int, group: int, dtype: torch.dtype) -> bool:
    """Return whether :func:`launch_w4a16_rows` takes ``rows`` of ``x`` with ``columns`` and groups of ``group``."""
    return 0 < rows <= MOST_ROWS and dtype in _MAGIC and columns % group == 0 and _step(group) >= _LEAST_STEP


def _step(group: int) -> int:
    """Return the most elements of the depth that a step takes without crossing into another group."""
    return gcd(_MOST_STEP, group)


def launch_w4a16_rows(
    x: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None, *, group: int
) -> Tensor:
    """Return ``x @ weight.T + bias`` for at most ``MOST_ROWS`` rows; arguments as in ``launch_w4a16_matmul``.

    Args:
        x: bfloat16 or float16, contiguous ``[M, K]``.
        packed: uint8, contiguous, ``N * K / 2`` bytes.
        scale: float32 ``[N * K / group]``.
        zero_point: int32 like ``scale``, -128 to 112, or None for signed codes.
        bias: ``[N]`` or None.
        group: codes that share a scale; see :func:`rows_fit`.
    """
    m, k = x.shape
    n, words, step = packed.numel() * 2 // k, k // 8, _step(group)
    many = zero_point is None and blocks_of(n, _MANY_COLUMNS) >= _PROGRAMS
    columns = _MANY_COLUMNS if many else _FEW_COLUMNS
    part = blocks_of(k // step, _CHUNKS) * step // 8
    rows = 8 if m <= 8 else _ROWS
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    given = [scale if t is None else t for t in (zero_point, bias)]
    with on_device_of(x):
        launch(
            w4a16_rows_kernel,
            (blocks_of(m, rows) * blocks_of(n, columns),),
            (x, packed.view(torch.int32), scale, *given, out, m, n, words, part, group // step, _MAGIC[x.dtype]),
            {
                "ZERO": zero_point is not None, "BIAS": bias is not None, "EVEN": words == part * _CHUNKS,
                "SIDE": _SIDE_BY_SIDE, "ROWS": rows, "COLUMNS": columns, "CHUNKS": _CHUNKS,
                "STEP": step,
            },
            num_warps=_CHUNKS,
            num_stages=_STAGES[m > 8, step],
            **(_FUSED if zero_point is None and rows == 8 else _LIMITED),
        )  # fmt: skip
    return out


def _tuned() -> dict[str, Tuned]:
    signature = {"x_ptr": "*bf16:16", "words_ptr": "*i32:16", "zero_ptr": "*i32:16", "out_ptr": "*bf16:16"}
    signature |= dict.fromkeys(("scale_ptr", "bias_ptr"), "*fp32:16")
    signature |= {"M": "i32", "N": "i32:16", "words": "i32:16", "part": "i32:16", "magic": "i32:16"}
    found = {}
    for (more, step), stages in _STAGES.items():
        rows = _ROWS if more else 8
        for name, columns in (("symmetric", _MANY_COLUMNS), ("few", _FEW_COLUMNS), ("zero", _FEW_COLUMNS)):
            if name == "few" and step != _MOST_STEP:
                continue  # less of all than with zero points
            constexprs: dict[str, int] = {"group_steps": 1, "ZERO": name == "zero", "BIAS": True, "EVEN": True}
            constexprs |= {"SIDE": _SIDE_BY_SIDE, "ROWS": rows, "COLUMNS": columns}
            options = _LIMITED if more or name == "zero" else _FUSED
            found[f"{name}-{rows}-{step}"] = Tuned(
                kernel=w4a16_rows_kernel, signature=signature, num_warps=_CHUNKS, num_stages=stages,
                constexprs={**constexprs, "CHUNKS": _CHUNKS, "STEP": step}, options=options,
            )  # fmt: skip
    return found


TUNED = _tuned()

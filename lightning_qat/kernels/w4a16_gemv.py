"""One or two rows times a packed 4-bit weight: bound by reading the weight once, half a byte per element.

A program keeps the rows, all of them or 8192 elements, in its threads' registers, and walks through rows of the weight,
four at a time. A nibble becomes a float by one logical operation and one multiply-add: its bits in the mantissa of
2**23 are 2**23 + n * 16**j, from which the multiply-add takes 2**23 and scales by 16**-j, both exactly. Scales, zero
points and absmax are applied to the sum of 8 products, in float32. Where the depth is split, a second kernel adds the
parts in order: the result is the same in every run.

Bytes moved per weight: ``1/2 + 4 / group``. Products and sums are float32, weights are exact: nothing is rounded to the
dtype of ``x`` before the end. Arithmetic: about 43 instructions for the 8 codes of a word on sm_90; more rows than two
are faster on the matrix units.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_qat.kernels.launch import Tuned, block_up_to, blocks_of, launch, on_device_of

#: Codes of a word: as many share a scale at least.
WORD = 8
#: The most rows for which this is the faster way; beyond, matrix units are. With a codebook it is one: of the look-ups
#: for two the registers spill.
MOST_ROWS = 2
#: Words of a row of the weight that a program reads.
_LEAST_WORDS, _MOST_WORDS = 128, 1024
#: Of a warp: 4 for each thread; with a codebook 2, for the look-ups need registers too.
_WORDS_OF_WARP = {False: 128, True: 64}
#: Rows of the weight that are read at once.
_COLUMNS = 4
#: Times that a program does so, and warps that keep every multiprocessor of a large GPU reading.
_MOST_STEPS, _ALL_WARPS = 8, 2048
#: No code depends on these sums, and a multiply-add rounds once instead of twice.
_FUSED = {"enable_fp_fusion": True}
#: The bits of 2**23. As an argument it is in a register, and one operation instead of two masks a nibble and puts it
#: in.
_MAGIC = 0x4B000000


@triton.jit
def _weights(word, table_ptr, magic, i: tl.constexpr, CODEBOOK: tl.constexpr):
    """Return element ``i`` of each word: the table's value, or the code minus 8."""
    if CODEBOOK:  # the high nibble is the even element
        nibble = (word >> (4 * (i ^ 1))) & 15
        return tl.load(table_ptr + nibble)
    # Nibbles 0 to 4 lie within the 23 bits of the mantissa where they are; the others after one shift.
    j: tl.constexpr = i if i < 5 else i - 5
    shifted = word if i < 5 else word >> 20
    bits = (shifted & (15 << (4 * j))) | magic
    unit: tl.constexpr = 16.0**-j
    return bits.to(tl.float32, bitcast=True) * unit - (8388608.0 * unit + 8.0)


@triton.jit
def _elements(x_ptr, exists, WORDS: tl.constexpr):
    """Return the 8 elements that belong to each word, float32 ``[WORDS]`` each, where the word will be."""
    x = tl.load(x_ptr + tl.arange(0, WORDS * 8), mask=exists, other=0.0).to(tl.float32)
    even, odd = tl.split(tl.reshape(x, (WORDS, 4, 2)))
    x04, x26 = tl.split(tl.reshape(even, (WORDS, 2, 2)))
    x15, x37 = tl.split(tl.reshape(odd, (WORDS, 2, 2)))
    x0, x4 = tl.split(x04)
    x2, x6 = tl.split(x26)
    x1, x5 = tl.split(x15)
    x3, x7 = tl.split(x37)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def _total(x):
    return ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]))


@triton.jit
def _product(word, scale, zero, x, total, table_ptr, magic, CODEBOOK: tl.constexpr, ZERO: tl.constexpr):
    """Return what each word of a row of the weight adds to its product with ``x``."""
    products = tl.zeros(word.shape, tl.float32)
    word = word.to(tl.uint32, bitcast=True)  # whose bits shift down without a sign
    for i in tl.static_range(8):
        products += _weights(word, table_ptr, magic, i, CODEBOOK) * x[i]
    if ZERO:
        products += (8.0 - zero.to(tl.float32)) * total
    return products * scale


@triton.jit
def w4a16_gemv_kernel(
    x_ptr, words_ptr, scale_ptr, zero_ptr, table_ptr, bias_ptr, out_ptr, M, N, K, group_words, steps, magic,
    CODEBOOK: tl.constexpr, ZERO: tl.constexpr, BIAS: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr,
    WORDS: tl.constexpr,
):  # fmt: skip
    """``4 * steps`` columns of the result, summed over ``WORDS`` words of 8 codes."""
    words = K // 8
    groups, split = words // group_words, tl.program_id(1)
    start = split * WORDS
    # Saying that words are not contiguous puts one in each thread and then the next one, where the elements of x that
    # belong to it are: no exchange between threads. In one dimension, for of more Triton changes the layout.
    index = tl.max_contiguous(tl.arange(0, WORDS), 1)
    left = words - start
    exists = index >= 0 if EVEN else index < left
    group_of = (start + index) // group_words
    x_exists = tl.arange(0, WORDS * 8) < left * 8
    x0 = _elements(x_ptr + 8 * start, x_exists, WORDS)
    x1, total0 = x0, _total(x0)
    if ROWS == 2:
        x1 = _elements(x_ptr + 8 * start + K, x_exists, WORDS)
    total1 = _total(x1)
    row_of = tl.arange(0, 2)[:, None] * 2 + tl.arange(0, 2)[None, :]
    out_ptr += split.to(tl.int64) * M * N
    for step in range(steps):
        first = (tl.program_id(0) * steps + step) * 4
        word, scale, zero = (), (), ()
        for c in tl.static_range(4):
            column = tl.minimum(first + c, N - 1).to(tl.int64)
            held = tl.load((words_ptr + start + column * words) + index, mask=exists, other=0)
            word = word + (held,)  # type: ignore[assignment]  # noqa: RUF005 - Triton has no other way
            at = column * groups + group_of
            scale = scale + (tl.load(scale_ptr + at, mask=exists, other=0.0),)  # type: ignore[assignment]  # noqa: RUF005
            own = tl.load(zero_ptr + at, mask=exists, other=0) if ZERO else 0
            zero = zero + (own,)  # type: ignore[assignment]  # noqa: RUF005
        column = first + row_of
        inside = column < N
        bias = tl.zeros((2, 2), tl.float32)
        if BIAS:
            bias = tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
        for r in tl.static_range(ROWS):
            x, total = (x0, total0) if r == 0 else (x1, total1)
            p0 = _product(word[0], scale[0], zero[0], x, total, table_ptr, magic, CODEBOOK, ZERO)  # type: ignore[misc]
            p1 = _product(word[1], scale[1], zero[1], x, total, table_ptr, magic, CODEBOOK, ZERO)  # type: ignore[misc]
            p2 = _product(word[2], scale[2], zero[2], x, total, table_ptr, magic, CODEBOOK, ZERO)  # type: ignore[misc]
            p3 = _product(word[3], scale[3], zero[3], x, total, table_ptr, magic, CODEBOOK, ZERO)  # type: ignore[misc]
            value = tl.sum(tl.join(tl.join(p0, p2), tl.join(p1, p3)), 0) + bias
            tl.store(out_ptr + r * N + column, value.to(out_ptr.dtype.element_ty), mask=inside)


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
        launch(
            add_parts_kernel,
            (blocks_of(out.numel(), 256),),
            (parts, parts if bias is None else bias, out, out.numel(), out.shape[1], parts.shape[0]),
            {"BIAS": bias is not None, "BLOCK": 256},
            num_warps=2,
            **_FUSED,
        )
    return out


def gemv_fits(rows: int, columns: int, group: int, *, codebook: bool = False) -> bool:
    """Return whether :func:`launch_w4a16_gemv` takes ``rows`` of ``x`` with ``columns`` and groups of ``group``."""
    most = 1 if codebook else MOST_ROWS
    return 0 < rows <= most and columns % WORD == 0 and group % WORD == 0 and columns % group == 0


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
    block = max(_LEAST_WORDS, block_up_to(blocks_of(words, split or 1), _MOST_WORDS))
    warps, split = block // _WORDS_OF_WARP[table is not None], blocks_of(words, block)
    steps = min(_MOST_STEPS, blocks_of(blocks_of(n, _COLUMNS) * split * warps, _ALL_WARPS))
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    target = out if split == 1 else torch.empty(split, m, n, dtype=torch.float32, device=x.device)
    own_bias = bias if split == 1 else None
    given = [scale if t is None else t for t in (zero_point, table, own_bias)]
    with on_device_of(x):
        launch(
            w4a16_gemv_kernel,
            (blocks_of(n, _COLUMNS * steps), split),
            (x, packed.view(torch.int32), scale, *given, target, m, n, k, group // WORD, steps, _MAGIC),
            {
                "CODEBOOK": table is not None, "ZERO": zero_point is not None, "BIAS": own_bias is not None,
                "EVEN": words % block == 0, "ROWS": m, "WORDS": block,
            },
            num_warps=warps,
            **_FUSED,
        )  # fmt: skip
    return out if split == 1 else add_parts(target, bias, out)


def _tuned() -> dict[str, Tuned]:
    signature = {"x_ptr": "*bf16:16", "words_ptr": "*i32:16", "zero_ptr": "*i32:16", "out_ptr": "*bf16:16"}
    signature |= dict.fromkeys(("scale_ptr", "table_ptr", "bias_ptr"), "*fp32:16")
    signature |= {"N": "i32:16", "K": "i32:16", "group_words": "i32:16", "steps": "i32", "magic": "i32:16"}
    found = {}
    for rows in (1, 2):
        for name, codebook, zero in (("symmetric", False, False), ("zero", False, True), ("codebook", True, False)):
            if codebook and rows > 1:
                continue
            constexprs: dict[str, int] = {"CODEBOOK": codebook, "ZERO": zero, "BIAS": True, "EVEN": True}
            constexprs |= {"ROWS": rows, "WORDS": _MOST_WORDS} | ({"M": 1} if rows == 1 else {})
            types = signature if rows == 1 else {**signature, "M": "i32"}
            warps = _MOST_WORDS // _WORDS_OF_WARP[codebook]
            found[f"{name}-{rows}"] = Tuned(
                kernel=w4a16_gemv_kernel, signature=types, constexprs=constexprs, num_warps=warps, options=_FUSED
            )
    return found


TUNED = _tuned()

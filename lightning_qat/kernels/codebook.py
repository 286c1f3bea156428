"""Block-wise codebooks (nf4, fp4, the 8-bit dynamic map): absmax, quantize and dequantize.

A value's code depends on how many thresholds lie strictly below ``x * (1 / absmax)``; see
:mod:`lightning_qat.ops.codebook_tables` for the thresholds that reproduce bitsandbytes' CPU and CUDA kernels. Storage
is theirs: flat blocks along the flattened tensor, two 4-bit codes to a byte, the **high** nibble the even element.

Bytes moved per element of a ``b``-byte input or output: ``b + bits / 8 + 4 / block_size``, once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_qat.kernels.arithmetic import magnitude
from lightning_qat.kernels.launch import EXACT, Tuned, blocks_of, launch, on_device_of

#: Elements of a program that quantizes and of one that dequantizes, 16 and 32 for each thread of four warps: the
#: fastest on an H100 among half to four times as many.
_TILE, _TILE_BACK = 2048, 4096
_WARPS = 4
#: The largest block, which is a program's own.
_MOST_BLOCK = 4096

#: The cells into which -1.0 to 1.0 is cut, ``round(15 * y) + 16``: narrower than the gaps between nf4's thresholds,
#: and few enough for a table whose 32 words lie in 32 different banks. The magic number rounds to an integer.
_CELLS = tl.constexpr(32)
_CELL_SCALE = tl.constexpr(15.0)
_CELL_MAGIC = tl.constexpr(12582912.0 + 16.0)  # 1.5 * 2**23: the sum's low mantissa bits are the integer


def cell_table(thresholds: Tensor, bin_codes: Tensor) -> Tensor:
    """Return what the 4-bit kernel searches in: each cell's codes, and the thresholds within it.

    To be kept by the caller: making it waits for the device of ``thresholds``.

    Args:
        thresholds: float32 ``[15]``, ascending; a value's bin is how many are strictly below it.
        bin_codes: uint8 ``[16]``, the code of every bin.

    Returns:
        int32 ``[32 * (1 + most)]``, ``most`` being the largest number of thresholds in one cell: row 0 has eight
        nibbles, the code with 0, 1, ... of the cell's thresholds below; row ``1 + i`` the bits of threshold ``i``.

    Raises:
        ValueError: if a cell holds 8 thresholds or more; its word has room for 8 codes.
    """
    values = thresholds.detach().cpu().to(torch.float32)
    magic = values.clamp(-1.0, 1.0) * _CELL_SCALE.value + _CELL_MAGIC.value
    cells = magic.view(torch.int32) & (_CELLS.value - 1)
    counts = torch.bincount(cells, minlength=_CELLS.value)
    most, before = int(counts.max()), torch.cumsum(counts, 0) - counts
    if most > 7:
        raise ValueError(f"{most} thresholds lie within {1 / _CELL_SCALE.value:.3f} of each other; 7 are possible")
    table = torch.full((1 + most, _CELLS.value), float("inf"), dtype=torch.float32).view(torch.int32)
    codes = bin_codes.cpu().tolist()
    for cell in range(_CELLS.value):
        start, count = int(before[cell]), int(counts[cell])
        word = sum(codes[min(start + c, len(codes) - 1)] << (4 * c) for c in range(count + 1))
        table[0, cell] = word - (1 << 32) if word >= 1 << 31 else word
        table[1 : 1 + count, cell] = values[start : start + count].view(torch.int32)
    return table.reshape(-1).to(thresholds.device)


def steps_of(cells: Tensor) -> int:
    """Return how many comparisons within a cell :func:`cell_table`'s result takes."""
    return cells.numel() // _CELLS.value - 1


@triton.jit
def tile_of_blocks(program, numel, SIZE: tl.constexpr):
    """Return the number of a program's tile (64 bits), its first element, and how many of ``SIZE`` there are."""
    tile = tl.cast(program, tl.int64)
    first = tile * SIZE
    return tile, first, tl.minimum(numel - first, SIZE).to(tl.int32)


@triton.jit
def scaled_tile(
    x_ptr, absmax_ptr, numel, least_absmax, BLOCK: tl.constexpr, ROWS: tl.constexpr, GIVEN: tl.constexpr,
    DIVIDE_LAST: tl.constexpr,
):  # fmt: skip
    """Return the elements of ``ROWS`` blocks and each divided by its absmax, one-dimensional; store the absmax.

    In one dimension what is looked up for an element stays in its thread: of a two-dimensional look-up Triton
    changes the layout, through shared memory, there and back.
    """
    tile, first, left = tile_of_blocks(tl.program_id(0), numel, ROWS * BLOCK)
    flat = tl.arange(0, ROWS * BLOCK)
    elements = tl.load(x_ptr + first + flat, mask=flat < left, other=0.0).to(tl.float32)
    x = tl.reshape(elements, (ROWS, BLOCK))
    row = tl.arange(0, ROWS)
    row_exists = row * BLOCK < left
    at = absmax_ptr + tile * ROWS + row
    absmax = tl.load(at, mask=row_exists, other=1.0) if GIVEN else magnitude(x, 1)
    divisor = tl.maximum(absmax, least_absmax, propagate_nan=tl.PropagateNan.ALL)
    y = x * tl.div_rn(tl.full((ROWS,), 1.0, tl.float32), divisor)[:, None]
    if DIVIDE_LAST:
        short = (row + 1) * BLOCK > left
        if left < ROWS * BLOCK:  # only the last program pays for the divisions
            y = tl.where(short[:, None], tl.div_rn(x, tl.broadcast_to(divisor[:, None], x.shape)), y)
        absmax = tl.where(short, divisor, absmax)
    if not GIVEN:
        tl.store(at, absmax, mask=row_exists)
    return elements, tl.reshape(y, (ROWS * BLOCK,))


@triton.jit
def codes_4bit(y, cells_ptr, STEPS: tl.constexpr, NAN_CODE: tl.constexpr):
    """Return the codes of ratios: one table look-up for the cell, then STEPS comparisons within it."""
    clamped = tl.minimum(tl.maximum(y, -1.0), 1.0)
    cell = (clamped * _CELL_SCALE + _CELL_MAGIC).to(tl.int32, bitcast=True) & (_CELLS - 1)
    word = tl.load(cells_ptr + cell)
    for step in tl.static_range(STEPS):
        threshold = tl.load(cells_ptr + cell + _CELLS * (1 + step)).to(tl.float32, bitcast=True)
        word = tl.where(clamped > threshold, word >> 4, word)
    return tl.where(y == y, word & 15, NAN_CODE)


@triton.jit
def codes_8bit(y, thresholds_ptr, NAN_CODE: tl.constexpr):
    """Return the codes of ratios by halving: eight look-ups among 255 thresholds, which stay in the L1 cache."""
    code = tl.zeros(y.shape, tl.int32)
    for bit in tl.static_range(7, -1, -1):
        middle = code + (1 << bit)
        code = tl.where(y > tl.load(thresholds_ptr + middle - 1), middle, code)
    return tl.where(y == y, code, NAN_CODE)


@triton.jit
def codebook_absmax_kernel(
    x_ptr, absmax_ptr, numel, least_absmax, BLOCK: tl.constexpr, ROWS: tl.constexpr, SHORT: tl.constexpr
):
    """The largest magnitudes of ``ROWS`` blocks. SHORT: that of the last, which is one, is at least the least."""
    tile, first, left = tile_of_blocks(tl.program_id(0), numel, ROWS * BLOCK)
    row = tl.arange(0, ROWS)
    offsets = row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    absmax = magnitude(tl.load(x_ptr + first + offsets, mask=offsets < left, other=0.0).to(tl.float32), 1)
    if SHORT:
        least = tl.maximum(absmax, least_absmax, propagate_nan=tl.PropagateNan.ALL)
        absmax = tl.where((row + 1) * BLOCK > left, least, absmax)
    tl.store(absmax_ptr + tile * ROWS + row, absmax, mask=row * BLOCK < left)


@triton.jit
def codebook_quantize_4bit_kernel(
    x_ptr, absmax_ptr, cells_ptr, packed_ptr, numel, least_absmax,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr, NAN_CODE: tl.constexpr, ZERO_CODE: tl.constexpr,
    GIVEN: tl.constexpr, DIVIDE_LAST: tl.constexpr, WHOLE: tl.constexpr, ODD: tl.constexpr,
):  # fmt: skip
    """Codes of ``ROWS`` blocks, two to a byte.

    WHOLE: all blocks have all their elements, so that one comparison is enough for the bytes that a thread stores.
    """
    _, y = scaled_tile(x_ptr, absmax_ptr, numel, least_absmax, BLOCK, ROWS, GIVEN, DIVIDE_LAST)
    code = codes_4bit(y, cells_ptr, STEPS, NAN_CODE)
    _, first, left = tile_of_blocks(tl.program_id(0), numel, ROWS * BLOCK)
    if ODD:
        code = tl.where(tl.arange(0, ROWS * BLOCK) < left, code, ZERO_CODE)
    high, low = tl.split(tl.reshape(code, (ROWS * BLOCK // 2, 2)))
    packed = ((high << 4) | low).to(tl.uint8)
    pair = tl.arange(0, ROWS * BLOCK // 2)
    exists = pair // (BLOCK // 2) * BLOCK < left if WHOLE else 2 * pair < left
    tl.store(packed_ptr + first // 2 + pair, packed, mask=exists)


@triton.jit
def codebook_quantize_8bit_kernel(
    x_ptr, absmax_ptr, thresholds_ptr, codes_ptr, numel, least_absmax,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, NAN_CODE: tl.constexpr, GIVEN: tl.constexpr, DIVIDE_LAST: tl.constexpr,
):  # fmt: skip
    """Codes of ``ROWS`` blocks, one a byte."""
    _, y = scaled_tile(x_ptr, absmax_ptr, numel, least_absmax, BLOCK, ROWS, GIVEN, DIVIDE_LAST)
    code = codes_8bit(y, thresholds_ptr, NAN_CODE)
    _, first, left = tile_of_blocks(tl.program_id(0), numel, ROWS * BLOCK)
    flat = tl.arange(0, ROWS * BLOCK)
    tl.store(codes_ptr + first + flat, code.to(tl.uint8), mask=flat < left)


@triton.jit
def codebook_dequantize_4bit_kernel(
    packed_ptr, absmax_ptr, table_ptr, out_ptr, numel, BLOCK: tl.constexpr, ROWS: tl.constexpr
):
    """``table[code] * absmax``: the 16 values lie in 16 banks of L1, so that a look-up never conflicts."""
    tile, first, left = tile_of_blocks(tl.program_id(0), numel, ROWS * BLOCK)
    rows = tl.arange(0, ROWS)[:, None]
    pairs = rows * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    packed = tl.load(packed_ptr + tile * (ROWS * BLOCK // 2) + pairs, mask=2 * pairs < left, other=0).to(tl.int32)
    absmax = tl.load(absmax_ptr + tile * ROWS + rows, mask=rows * BLOCK < left, other=0.0)
    even = (tl.load(table_ptr + (packed >> 4)) * absmax).to(out_ptr.dtype.element_ty)
    odd = (tl.load(table_ptr + (packed & 15)) * absmax).to(out_ptr.dtype.element_ty)
    values = tl.reshape(tl.join(even, odd), (ROWS, BLOCK))
    offsets = rows * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(out_ptr + first + offsets, values, mask=offsets < left)


@triton.jit
def codebook_dequantize_8bit_kernel(
    codes_ptr, absmax_ptr, table_ptr, out_ptr, numel, BLOCK: tl.constexpr, ROWS: tl.constexpr
):
    """``table[code] * absmax`` with 256 values, 1 KiB of L1."""
    tile, first, left = tile_of_blocks(tl.program_id(0), numel, ROWS * BLOCK)
    rows = tl.arange(0, ROWS)[:, None]
    offsets = rows * BLOCK + tl.arange(0, BLOCK)[None, :]
    codes = tl.load(codes_ptr + first + offsets, mask=offsets < left, other=0).to(tl.int32)
    absmax = tl.load(absmax_ptr + tile * ROWS + rows, mask=rows * BLOCK < left, other=0.0)
    values = (tl.load(table_ptr + codes) * absmax).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + first + offsets, values, mask=offsets < left)


def launch_codebook_absmax(x: Tensor, *, block_size: int, least_absmax: float = 0.0) -> Tensor:
    """Return the largest magnitude of every block, float32 ``[ceil(numel / block_size)]``; NaN if it holds one.

    Args:
        x: floating point, any shape; taken flat.
        block_size: elements of a block, a power of two from 16 to 4096.
        least_absmax: of a short last block.

    Raises:
        ValueError: if ``block_size`` is not allowed.
    """
    check_block(block_size)
    numel = x.numel()
    absmax = torch.empty(blocks_of(numel, block_size), dtype=torch.float32, device=x.device)
    if numel:
        rows = max(1, _TILE_BACK // block_size)
        with on_device_of(x):
            launch(
                codebook_absmax_kernel,
                (blocks_of(len(absmax), rows),),
                (x.contiguous(), absmax, numel, least_absmax),
                {"BLOCK": block_size, "ROWS": rows, "SHORT": least_absmax > 0 and numel % block_size != 0},
                num_warps=_WARPS,
                **EXACT,
            )
    return absmax


def launch_codebook_quantize(
    x: Tensor,
    absmax: Tensor | None,
    search: Tensor,
    *,
    bits: int,
    block_size: int,
    nan_code: int,
    zero_code: int,
    least_absmax: float = 0.0,
    divide_last_block: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the codes of ``x`` as they are stored, and the absmax of its blocks.

    Args:
        x: floating point, any shape; taken flat.
        absmax: float32 ``[ceil(numel / block_size)]``, or None: found in the same pass.
        search: with 4 bits :func:`cell_table`'s; with 8 bits the thresholds, float32 ``[255]``, bin = code.
        bits: 4 or 8.
        block_size: elements that share an absmax, a power of two from 16 to 4096.
        nan_code: the code of a NaN.
        zero_code: what fills the last byte of an odd number of 4-bit codes.
        least_absmax: what a smaller absmax is taken for when values are divided by it.
        divide_last_block: a short last block is divided by its absmax instead of multiplied by the reciprocal, and
            the absmax kept for it is at least ``least_absmax``.

    Returns:
        uint8 ``[ceil(numel / 2)]`` with 4 bits, ``[numel]`` with 8; and the absmax, float32.

    Raises:
        ValueError: if ``bits`` or ``block_size`` is not allowed.
    """
    _check(bits, block_size)
    x, numel = x.contiguous(), x.numel()
    given, blocks = absmax is not None, blocks_of(numel, block_size)
    scales = torch.empty(blocks, dtype=torch.float32, device=x.device) if absmax is None else absmax.contiguous()
    codes = torch.empty((numel + 1) // 2 if bits == 4 else numel, dtype=torch.uint8, device=x.device)
    if numel == 0:
        return codes, scales
    rows = max(1, _TILE // block_size)
    shared = {"BLOCK": block_size, "ROWS": rows, "NAN_CODE": nan_code, "GIVEN": given}
    shared["DIVIDE_LAST"] = divide_last_block and numel % block_size != 0
    grid, options = (blocks_of(blocks, rows),), {"num_warps": _WARPS, **EXACT}
    with on_device_of(x):
        if bits == 4:
            steps, odd = steps_of(search), numel % 2 == 1
            codebook_quantize_4bit_kernel[grid](
                x, scales, search, codes, numel, least_absmax,
                **shared, STEPS=steps, ZERO_CODE=zero_code, WHOLE=numel % block_size == 0, ODD=odd, **options,
            )  # fmt: skip
        else:
            codebook_quantize_8bit_kernel[grid](x, scales, search, codes, numel, least_absmax, **shared, **options)
    return codes, scales


def launch_codebook_dequantize(
    packed: Tensor, absmax: Tensor, table: Tensor, numel: int, *, block_size: int, dtype: torch.dtype
) -> Tensor:
    """Return ``table[code] * absmax``, multiplied in float32, as a flat tensor.

    Args:
        packed: uint8, as :func:`launch_codebook_quantize` returns it.
        absmax: float32 ``[ceil(numel / block_size)]``.
        table: the value of every code, float32 ``[16]`` or ``[256]``, which says how many bits a code has.
        numel: elements of the result.
        block_size: elements that share an absmax, a power of two from 16 to 4096.
        dtype: of the result.

    Raises:
        ValueError: if ``table`` or ``block_size`` has a size that is not allowed.
    """
    bits = {16: 4, 256: 8}.get(table.numel(), table.numel())
    _check(bits, block_size)
    out = torch.empty(numel, dtype=dtype, device=packed.device)
    if numel == 0:
        return out
    rows = max(1, _TILE_BACK // block_size)
    kernel = codebook_dequantize_4bit_kernel if bits == 4 else codebook_dequantize_8bit_kernel
    grid = (blocks_of(blocks_of(numel, block_size), rows),)
    with on_device_of(packed):
        kernel[grid](
            packed.contiguous(), absmax.contiguous(), table, out, numel,
            BLOCK=block_size, ROWS=rows, num_warps=_WARPS, **EXACT,
        )  # fmt: skip
    return out


def _check(bits: int, block_size: int) -> None:
    if bits not in (4, 8):
        raise ValueError(f"codes of {bits} bits have no kernel; use 4 bits (16 values) or 8 bits (256 values)")
    check_block(block_size)


def check_block(block_size: int) -> None:
    """Raise ``ValueError`` where no kernel has blocks of this size."""
    if not 16 <= block_size <= _MOST_BLOCK or block_size & (block_size - 1):
        raise ValueError(f"block_size={block_size} has no kernel; use a power of two from 16 to {_MOST_BLOCK}")


def _tuned() -> dict[str, Tuned]:
    quantize = {"x_ptr": "*bf16:16", "absmax_ptr": "*fp32:16", "numel": "i32:16", "least_absmax": "fp32"}
    four = {**quantize, "cells_ptr": "*i32:16", "packed_ptr": "*u8:16"}
    eight = {**quantize, "thresholds_ptr": "*fp32:16", "codes_ptr": "*u8:16"}
    back = {"absmax_ptr": "*fp32:16", "table_ptr": "*fp32:16", "out_ptr": "*bf16:16", "numel": "i32:16"}
    rule = {"NAN_CODE": 15, "GIVEN": False, "DIVIDE_LAST": False}
    found = {}
    for block in (64, 4096):
        size = {"BLOCK": block, "ROWS": max(1, _TILE // block)}
        size_back = {"BLOCK": block, "ROWS": max(1, _TILE_BACK // block)}
        extra = {"ZERO_CODE": 7, "WHOLE": True, "ODD": False, "STEPS": 1}
        kernels = {
            f"absmax_{block}": (codebook_absmax_kernel, quantize, {**size_back, "SHORT": False}),
            f"nf4_quantize_{block}": (codebook_quantize_4bit_kernel, four, {**size, **rule, **extra}),
            f"dynamic_quantize_{block}": (codebook_quantize_8bit_kernel, eight, {**size, **rule}),
            f"dequantize_4bit_{block}": (codebook_dequantize_4bit_kernel, {**back, "packed_ptr": "*u8:16"}, size_back),
            f"dequantize_8bit_{block}": (codebook_dequantize_8bit_kernel, {**back, "codes_ptr": "*u8:16"}, size_back),
        }
        for name, (kernel, signature, constexprs) in kernels.items():
            found[name] = Tuned(kernel=kernel, signature=signature, constexprs=constexprs, num_warps=_WARPS)
    return found


TUNED = _tuned()

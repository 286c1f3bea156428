"""Fake quantization by block-wise codebooks and its gradient: what a training step with nf4, fp4 or the map runs.

Memory: x is read once and written once; the gradient takes one more read. 4 and 6 bytes per element for bfloat16, 8
and 12 for float32, and the absmax of each block: codes are never stored. Codes and values are found as
:mod:`lightning_qat.kernels.codebook` finds them, in the same order of roundings.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_qat.kernels.codebook import (
    check_block,
    codes_4bit,
    codes_8bit,
    scaled_tile,
    steps_of,
    tile_of_blocks,
)
from lightning_qat.kernels.fake_quantize import as_laid_out
from lightning_qat.kernels.launch import EXACT, Tuned, blocks_of, launch, on_device_of

#: Elements for four warps: as many as quantizing takes, and bytes of both streams of the gradient. A block with more
#: has more warps: 32 elements of a thread are spilled on an A100.
_TILE, _BYTES_BACK = 2048, 16384
#: The slack of the definition (``EDGE`` of the op).
EDGE = 1 + 2.0**-10


def _cut(block_size: int, elements: int) -> tuple[dict[str, int], int]:
    """Return the constexprs of a tile, and its warps."""
    rows = max(1, elements // block_size)
    return {"BLOCK": block_size, "ROWS": rows}, 4 * max(1, block_size // elements)


def _elements_back(x: torch.dtype) -> int:
    return _BYTES_BACK // (2 * x.itemsize)


@triton.jit
def codebook_fake_quantize_kernel(
    x_ptr, absmax_ptr, stored_ptr, search_ptr, table_ptr, out_ptr, numel, least_absmax,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, BITS: tl.constexpr, STEPS: tl.constexpr, NAN_CODE: tl.constexpr,
    DIVIDE_LAST: tl.constexpr,
):  # fmt: skip
    """Fake-quantize ``ROWS`` blocks; a NaN stays."""
    x, y = scaled_tile(x_ptr, absmax_ptr, numel, least_absmax, BLOCK, ROWS, True, DIVIDE_LAST)
    code = codes_4bit(y, search_ptr, STEPS, NAN_CODE) if BITS == 4 else codes_8bit(y, search_ptr, NAN_CODE)
    tile, first, left = tile_of_blocks(tl.program_id(0), numel, ROWS * BLOCK)
    row, flat = tl.arange(0, ROWS), tl.arange(0, ROWS * BLOCK)
    stored = tl.load(stored_ptr + tile * ROWS + row, mask=row * BLOCK < left, other=0.0)
    values = tl.reshape(tl.load(table_ptr + code), (ROWS, BLOCK)) * stored[:, None]
    values = tl.where(x == x, tl.reshape(values, (ROWS * BLOCK,)), x)
    tl.store(out_ptr + first + flat, values.to(out_ptr.dtype.element_ty), mask=flat < left)


@triton.jit
def codebook_fake_quantize_backward_kernel(
    grad_ptr, x_ptr, absmax_ptr, grad_x_ptr, numel, EDGE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr
):
    """The gradient where ``|x|`` is within its block's absmax, else 0; also at a NaN."""
    tile, first, left = tile_of_blocks(tl.program_id(0), numel, ROWS * BLOCK)
    row = tl.arange(0, ROWS)[:, None]
    offsets = row * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = offsets < left
    grad = tl.load(grad_ptr + first + offsets, mask=mask, other=0.0)
    x = tl.load(x_ptr + first + offsets, mask=mask, other=0.0).to(tl.float32)
    absmax = tl.load(absmax_ptr + tile * ROWS + row, mask=row * BLOCK < left, other=0.0)
    # Not a comparison of the two: the difference of infinities is a NaN, and no gradient passes there.
    inside = absmax * EDGE - tl.abs(x) >= 0.0
    tl.store(grad_x_ptr + first + offsets, tl.where(inside, grad, 0.0), mask=mask)


def launch_codebook_fake_quantize(
    x: Tensor,
    absmax: Tensor,
    stored: Tensor | None,
    search: Tensor,
    table: Tensor,
    *,
    block_size: int,
    nan_code: int,
    least_absmax: float = 0.0,
    divide_last_block: bool = False,
) -> Tensor:
    """Return ``x`` quantized and dequantized, in one pass.

    Args:
        x: float16, bfloat16 or float32, any shape; blocks run over its contiguous order.
        absmax: float32 ``[ceil(numel / block_size)]``, with which codes are chosen.
        stored: shaped as ``absmax``, with which values are computed; None is ``absmax``.
        search: what codes are found in, as :func:`~lightning_qat.kernels.codebook.launch_codebook_quantize` takes it.
        table: the value of every code, float32 ``[16]`` or ``[256]``.
        block_size: elements that share an absmax, a power of two from 16 to 4096.
        nan_code: the code of a ratio that is a NaN where ``x`` is none.
        least_absmax: what a smaller absmax is taken for when values are divided by it.
        divide_last_block: a short last block is divided by its absmax instead of multiplied by the reciprocal.

    Returns:
        A new tensor with the shape, dtype and strides of ``torch.empty_like(x)``.

    Raises:
        ValueError: if ``block_size`` is not allowed.
    """
    check_block(block_size)
    numel, four = x.numel(), table.numel() == 16
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if numel:
        tile, warps = _cut(block_size, _TILE)
        scale = absmax.contiguous()
        values = scale if stored is None else stored.contiguous()
        with on_device_of(x):
            launch(
                codebook_fake_quantize_kernel,
                (blocks_of(absmax.numel(), tile["ROWS"]),),
                (x.contiguous(), scale, values, search, table, out, numel, least_absmax),
                {
                    **tile, "BITS": 4 if four else 8, "STEPS": steps_of(search) if four else 0, "NAN_CODE": nan_code,
                    "DIVIDE_LAST": divide_last_block and numel % block_size != 0,
                },
                num_warps=warps,
                **EXACT,
            )  # fmt: skip
    return as_laid_out(out, x)


def launch_codebook_fake_quantize_backward(grad: Tensor, x: Tensor, absmax: Tensor, *, block_size: int) -> Tensor:
    """Return the gradient of ``x``: ``grad`` where ``|x| <= absmax * EDGE``, elsewhere 0.

    Args:
        grad: of the result, in the shape and dtype of ``x``.
        x: float16, bfloat16 or float32, any shape.
        absmax: float32 ``[ceil(numel / block_size)]``.
        block_size: elements that share an absmax, a power of two from 16 to 4096.

    Returns:
        A new tensor with the shape, dtype and strides of ``torch.empty_like(x)``.

    Raises:
        ValueError: if ``block_size`` is not allowed.
    """
    check_block(block_size)
    numel = x.numel()
    tile, warps = _cut(block_size, _elements_back(x.dtype))
    out = torch.empty(x.shape, dtype=grad.dtype, device=x.device)
    if numel:
        with on_device_of(x):
            launch(
                codebook_fake_quantize_backward_kernel,
                (blocks_of(absmax.numel(), tile["ROWS"]),),
                (grad.contiguous(), x.contiguous(), absmax.contiguous(), out, numel),
                {"EDGE": EDGE, **tile},
                num_warps=warps,
                **EXACT,
            )
    return as_laid_out(out, x)


def _forward(x: str, bits: int, block: int) -> Tuned:
    tile, warps = _cut(block, _TILE)
    return Tuned(
        kernel=codebook_fake_quantize_kernel,
        signature={
            **dict.fromkeys(("x_ptr", "out_ptr"), f"*{x}:16"),
            **dict.fromkeys(("absmax_ptr", "stored_ptr", "table_ptr"), "*fp32:16"),
            "search_ptr": "*i32:16" if bits == 4 else "*fp32:16",
            "numel": "i32:16",
            "least_absmax": "fp32",
        },
        constexprs={
            **tile, "BITS": bits, "STEPS": 1 if bits == 4 else 0, "NAN_CODE": 15 if bits == 4 else 0,
            "DIVIDE_LAST": False,
        },
        num_warps=warps,
    )  # fmt: skip


def _backward(x: str, block: int) -> Tuned:
    tile, warps = _cut(block, _elements_back({"bf16": torch.bfloat16, "fp32": torch.float32}[x]))
    return Tuned(
        kernel=codebook_fake_quantize_backward_kernel,
        signature={
            **dict.fromkeys(("grad_ptr", "x_ptr", "grad_x_ptr"), f"*{x}:16"),
            "absmax_ptr": "*fp32:16",
            "numel": "i32:16",
        },
        constexprs={"EDGE": EDGE, **tile},
        num_warps=warps,
    )


TUNED = {
    "nf4-bf16-64": _forward("bf16", 4, 64),
    "nf4-fp32-64": _forward("fp32", 4, 64),
    "nf4-bf16-4096": _forward("bf16", 4, 4096),
    "dynamic-bf16-256": _forward("bf16", 8, 256),
    "dynamic-fp32-256": _forward("fp32", 8, 256),
    "backward-bf16-64": _backward("bf16", 64),
    "backward-fp32-64": _backward("fp32", 64),
    "backward-bf16-4096": _backward("bf16", 4096),
    "backward-fp32-4096": _backward("fp32", 4096),
}

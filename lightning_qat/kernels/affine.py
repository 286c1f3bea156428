"""Affine integers of 4 and 8 bits: quantize and pack, unpack and dequantize, each in one pass.

Codes and bytes are those of :func:`lightning_qat.ops.affine.quantize_affine` and
:func:`lightning_qat.ops.packing.pack_bits`: correctly rounded quotients, then half to even; two 4-bit codes to a
byte along the flattened tensor, the **low** nibble the even element, signed codes offset by 8.

Bytes moved per element of a ``b``-byte input or output: ``b + bits / 8``, once, and the scales once per group.
"""

from __future__ import annotations

from math import gcd
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_qat.kernels.arithmetic import round_half_even
from lightning_qat.kernels.fake_quantize import codes_of
from lightning_qat.kernels.launch import EXACT, Tuned, blocks_of, launch, on_device_of

#: Elements and warps of a program: 16 elements per thread.
_TILE = 4096
_WARPS = 8
#: Consecutive elements for which one scale is loaded, where the group is a multiple of it.
_RUN = 16


@triton.jit
def _parameters(pointer, tile, numel, group, ROWS: tl.constexpr, RUN: tl.constexpr, PER_TENSOR: tl.constexpr):
    """Return the scale or zero point of every run of a tile, float32 ``[ROWS, 1]``."""
    run = tile * ROWS + tl.arange(0, ROWS)[:, None]
    index = tl.zeros_like(run) if PER_TENSOR else run // (group // RUN)
    return tl.load(pointer + index, mask=run < (numel + RUN - 1) // RUN, other=1.0).to(tl.float32)


@triton.jit
def quantize_pack_kernel(
    x_ptr, scale_ptr, zero_ptr, codes_ptr, numel, group,
    BITS: tl.constexpr, SYMMETRIC: tl.constexpr, ZERO: tl.constexpr, PER_TENSOR: tl.constexpr,
    ROWS: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """Quantize ``ROWS`` runs of ``RUN`` elements that share a scale, and store their codes."""
    tile = tl.program_id(0).to(tl.int64)
    first = tile * (ROWS * RUN)
    left = tl.minimum(numel - first, ROWS * RUN).to(tl.int32)
    offsets = tl.arange(0, ROWS)[:, None] * RUN + tl.arange(0, RUN)[None, :]
    x = tl.load(x_ptr + first + offsets, mask=offsets < left, other=0.0).to(tl.float32)
    scale = _parameters(scale_ptr, tile, numel, group, ROWS, RUN, PER_TENSOR)
    half: tl.constexpr = 1 << (BITS - 1)
    low: tl.constexpr = (-half + (1 if BITS == 8 else 0)) if SYMMETRIC else 0
    high: tl.constexpr = half - 1 if SYMMETRIC else 2 * half - 1
    zero = tl.zeros((ROWS, 1), tl.float32)
    if ZERO:
        zero = round_half_even(_parameters(zero_ptr, tile, numel, group, ROWS, RUN, PER_TENSOR))
    code = codes_of(x, scale, zero, low, high, ZERO) + zero
    # A NaN has no code and gets that of 0.0.
    code = tl.where(code == code, code, tl.broadcast_to(zero, code.shape))
    code = tl.minimum(tl.maximum(code, low), high).to(tl.int32)
    if BITS == 8:
        tl.store(codes_ptr + first + offsets, code.to(codes_ptr.dtype.element_ty), mask=offsets < left)
    else:
        if SYMMETRIC:
            code += half
        code = tl.where(offsets < left, code, 0)
        even, odd = tl.split(tl.reshape(code, (ROWS * RUN // 2, 2)))
        pairs = tl.arange(0, ROWS * RUN // 2)
        tl.store(codes_ptr + first // 2 + pairs, (even | (odd << 4)).to(tl.uint8), mask=2 * pairs < left)


@triton.jit
def unpack_dequantize_kernel(
    codes_ptr, scale_ptr, zero_ptr, out_ptr, numel, group,
    BITS: tl.constexpr, SYMMETRIC: tl.constexpr, ZERO: tl.constexpr, PER_TENSOR: tl.constexpr,
    ROWS: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """Dequantize ``ROWS`` runs of ``RUN`` elements that share a scale."""
    tile = tl.program_id(0).to(tl.int64)
    first = tile * (ROWS * RUN)
    left = tl.minimum(numel - first, ROWS * RUN).to(tl.int32)
    offsets = tl.arange(0, ROWS)[:, None] * RUN + tl.arange(0, RUN)[None, :]
    if BITS == 8:
        code = tl.load(codes_ptr + first + offsets, mask=offsets < left, other=0).to(tl.int32)
    else:
        pairs = tl.arange(0, ROWS * RUN // 2)
        packed = tl.load(codes_ptr + first // 2 + pairs, mask=2 * pairs < left, other=0).to(tl.int32)
        code = tl.reshape(tl.join(packed & 15, packed >> 4), (ROWS, RUN))
        if SYMMETRIC:
            code -= 8
    value = code.to(tl.float32)
    if ZERO:
        value -= round_half_even(_parameters(zero_ptr, tile, numel, group, ROWS, RUN, PER_TENSOR))
    value *= _parameters(scale_ptr, tile, numel, group, ROWS, RUN, PER_TENSOR)
    tl.store(out_ptr + first + offsets, value.to(out_ptr.dtype.element_ty), mask=offsets < left)


def launch_quantize_pack(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, *, bits: int, symmetric: bool, group_size: int | None = None
) -> Tensor:
    """Return the codes of ``x`` as they are stored.

    Args:
        x: floating point ``[N, ...]``, taken flat in contiguous order.
        scale: one element for the tensor, or one for each run of ``group_size`` elements.
        zero_point: shaped as ``scale``, integer or floating point; None is 0.
        bits: 4 or 8.
        symmetric: signed codes; with 8 bits -127 to 127, with 4 bits -8 to 7.
        group_size: consecutive elements that share a scale; None is ``numel / scale.numel()`` (per channel of
            dimension 0).

    Returns:
        With 8 bits int8 (symmetric) or uint8 in the shape of ``x``; with 4 bits uint8 ``[ceil(numel / 2)]``.

    Raises:
        ValueError: if ``bits`` is another or the groups do not cover ``x``.
    """
    if bits == 8:
        codes = torch.empty(x.shape, dtype=torch.int8 if symmetric else torch.uint8, device=x.device)
    else:
        codes = torch.empty((x.numel() + 1) // 2, dtype=torch.uint8, device=x.device)
    _launch(quantize_pack_kernel, x, codes, x.numel(), scale, zero_point, bits, symmetric, group_size)
    return codes


def launch_unpack_dequantize(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    shape: torch.Size | tuple[int, ...],
    *,
    bits: int,
    symmetric: bool,
    group_size: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return ``(code - round(zero_point)) * scale``, computed in float32, in ``shape`` and ``dtype``.

    Arguments and errors as in :func:`launch_quantize_pack`; ``codes`` is what it returned.
    """
    out = torch.empty(shape, dtype=dtype, device=codes.device)
    _launch(unpack_dequantize_kernel, codes, out, out.numel(), scale, zero_point, bits, symmetric, group_size)
    return out


def _launch(
    kernel: Any,
    source: Tensor,
    result: Tensor,
    numel: int,
    scale: Tensor,
    zero_point: Tensor | None,
    bits: int,
    symmetric: bool,
    group_size: int | None,
) -> None:
    if bits not in (4, 8):
        raise ValueError(f"bits={bits} has no kernel; use 4 or 8")
    if numel == 0:
        return
    per_tensor = scale.numel() == 1
    group = numel // max(scale.numel(), 1) if group_size is None or per_tensor else group_size
    if group * scale.numel() != numel:
        raise ValueError(f"{scale.numel()} scales of group_size={group} cover no tensor of {numel} elements")
    run = _RUN if per_tensor else gcd(group, _RUN)
    with on_device_of(source):
        zero = scale if zero_point is None else zero_point.contiguous()
        launch(
            kernel,
            (blocks_of(numel, _TILE),),
            (source.contiguous(), scale.contiguous(), zero, result, numel, group),
            {
                "BITS": bits, "SYMMETRIC": symmetric, "ZERO": zero_point is not None, "PER_TENSOR": per_tensor,
                "ROWS": _TILE // run, "RUN": run,
            },
            num_warps=_WARPS,
            **EXACT,
        )  # fmt: skip


def _tuned() -> dict[str, Tuned]:
    ends = {"scale_ptr": "*fp32:16", "numel": "i32:16", "group": "i32:16"}
    found = {}
    for bits, symmetric in ((4, True), (4, False), (8, True), (8, False)):
        zero = {"zero_ptr": "*fp32:16" if symmetric else "*i32:16"}
        codes = {"codes_ptr": "*i8:16" if bits == 8 and symmetric else "*u8:16"}
        constexprs = {"BITS": bits, "SYMMETRIC": symmetric, "ZERO": not symmetric, "PER_TENSOR": False}
        constexprs |= {"ROWS": _TILE // _RUN, "RUN": _RUN}
        for kernel, name, other in (
            (quantize_pack_kernel, "quantize", {"x_ptr": "*bf16:16"}),
            (unpack_dequantize_kernel, "dequantize", {"out_ptr": "*bf16:16"}),
        ):
            signature = {**ends, **zero, **codes, **other}
            key = f"{name}-{bits}bit-{'symmetric' if symmetric else 'zero'}"
            found[key] = Tuned(kernel=kernel, signature=signature, constexprs=constexprs, num_warps=_WARPS)
    return found


TUNED = _tuned()

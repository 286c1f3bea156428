"""Floating-point rows times a packed 4-bit weight that is dequantized in registers, with float32 sums.

Weights are ``[N, K]``, two codes to a byte along ``K``: integers in groups (**low** nibble first, signed codes offset
by 8; :mod:`lightning_qat.ops.packing`) or a codebook (**high** nibble first, flat blocks; bitsandbytes).

Three ways to multiply: :mod:`lightning_qat.kernels.w4a16_rows` for integers and up to 32 rows of 16 bits,
:mod:`lightning_qat.kernels.w4a16_gemv` for one or two others, and here tiles on the matrix units. What the units
multiply has the dtype of ``x``. Integers whose groups the tiles do not cross go in as ``code - zero_point``,
which float16 and bfloat16 hold exactly, and the scale is applied in float32 to the sum of each step. All others go in
as ``(value * scale).to(x.dtype)``, the dequantized weight rounded as a dense layer would hold it.

Bytes moved per weight: ``1/2 + 4 / group``, and again from L2 for every tile of rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_qat.kernels.launch import Tuned, blocks_of, launch, on_device_of
from lightning_qat.kernels.w4a16_gemv import add_parts, gemv_fits, launch_w4a16_gemv
from lightning_qat.kernels.w4a16_rows import launch_w4a16_rows, rows_fit

#: No code depends on these sums, and a multiply-add rounds once instead of twice.
_FUSED = {"enable_fp_fusion": True}


@triton.jit
def w4a16_matmul_kernel(
    x_ptr, packed_ptr, scale_ptr, zero_ptr, table_ptr, bias_ptr, out_ptr, M, N, K, group, part,
    CODEBOOK: tl.constexpr, SIGNED: tl.constexpr, ZERO: tl.constexpr, BIAS: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile of the result over ``part`` elements of the depth; WHOLE: no step crosses into another group."""
    program, split = tl.program_id(0), tl.program_id(1)
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    first_m = program // (GROUP * tiles_n) * GROUP
    height = tl.minimum(tiles_m - first_m, GROUP)
    inside = program % (GROUP * tiles_n)
    row = (first_m + inside % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = (inside // height) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_at = tl.where(row < M, row, 0).to(tl.int64)
    column_at = tl.where(column < N, column, 0).to(tl.int64)
    half: tl.constexpr = BLOCK_K // 2
    x_at = x_ptr + row_at[None, :] * K + tl.arange(0, BLOCK_K)[:, None]
    packed_at = packed_ptr + column_at[:, None] * (K // 2) + tl.arange(0, half)[None, :]
    end = tl.minimum((split + 1) * part, K)
    # The weight is the left operand, which the matrix units take from registers.
    sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k in range(split * part, end, BLOCK_K):
        x = tl.load(x_at + k, mask=tl.arange(0, BLOCK_K)[:, None] < end - k, other=0.0)
        packed = tl.load(packed_at + k // 2, mask=tl.arange(0, half)[None, :] < (end - k) // 2, other=0).to(tl.int32)
        if CODEBOOK:
            code = tl.reshape(tl.join(packed >> 4, packed & 15), (BLOCK_N, BLOCK_K))
            value = tl.load(table_ptr + code)
        else:
            code = tl.reshape(tl.join(packed & 15, packed >> 4), (BLOCK_N, BLOCK_K))
            # The bits of a small integer in the mantissa of 2**23 are a float: no conversion, and the rest is exact.
            value = (code | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + (8 if SIGNED else 0))
        if WHOLE:
            at = column_at * (K // group) + k // group
            scale = tl.load(scale_ptr + at)[:, None]
            if ZERO:
                value -= tl.load(zero_ptr + at).to(tl.float32)[:, None]
        else:
            depth = tl.minimum(k + tl.arange(0, BLOCK_K), K - 1)
            at = (column_at[:, None] * K + depth[None, :]) // group
            scale = tl.load(scale_ptr + at)
            if ZERO:
                value -= tl.load(zero_ptr + at).to(tl.float32)
        if WHOLE and not CODEBOOK:
            sums += tl.dot(value.to(x.dtype), x, input_precision="ieee") * scale
        else:
            sums = tl.dot((value * scale).to(x.dtype), x, sums, input_precision="ieee")
    value = tl.trans(sums)
    if BIAS:
        value += tl.load(bias_ptr + column_at).to(tl.float32)[None, :]
    out_at = out_ptr + (split * M + row).to(tl.int64)[:, None] * N + column[None, :]
    tl.store(out_at, value.to(out_ptr.dtype.element_ty), mask=(row < M)[:, None] & (column < N)[None, :])


@dataclass(frozen=True)
class Tile:
    """The part of the result that a program makes, and how."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


#: By the rows up to which they are taken; the depth of a step is cut down to one group.
TILES = (
    Tile(16, 64, 128, warps=4, stages=3),
    Tile(64, 64, 128, warps=4, stages=3),
    Tile(128, 64, 128, warps=8, stages=3),
)
#: float32 goes through the multiply-add units, whose operands both lie in registers.
_FLOAT32 = Tile(16, 32, 32, warps=4, stages=2)
#: Steps shallower than this feed the matrix units badly, and wrongly: bfloat16 products of depth 16 with operands from
#: registers differed on an H100 (Triton 3.6).
_LEAST_K = 32
#: Programs that keep every multiprocessor of a large GPU busy.
_PROGRAMS = 512


def choose_tile(m: int, dtype: torch.dtype) -> Tile:
    """Return the tile for ``m`` rows of ``x``."""
    if dtype == torch.float32:
        return _FLOAT32
    return next((tile for tile in TILES if m <= tile.m), TILES[-1])


def launch_w4a16_matmul(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    group_size: int,
    table: Tensor | None = None,
    signed: bool = True,
    tile: Tile | None = None,
    split: int | None = None,
) -> Tensor:
    """Return ``x @ weight.T + bias`` in the dtype of ``x``.

    Args:
        x: float16, bfloat16 or float32 ``[M, K]``.
        packed: uint8, ``N * K / 2`` bytes, ``K`` even.
        scale: float32, one for each ``group_size`` codes of the flattened weight; with ``table`` the absmax.
        zero_point: integer, shaped as ``scale``, for unsigned integers only; None is 0.
        bias: ``[N]`` or None.
        group_size: codes that share a scale. Integers: a divisor of ``K``. A codebook: any.
        table: the values of the 16 codes, float32; None for integers.
        signed: integers are -8 to 7, stored offset by 8; otherwise 0 to 15.
        tile: None is :func:`choose_tile`'s.
        split: parts into which the depth is cut, added in order by a second kernel; None follows from the shape.

    Raises:
        ValueError: if a shape does not fit.
    """
    (m, k), n = x.shape, scale.numel() * group_size // max(x.shape[1], 1)
    _check(x, packed, table, group_size)
    if x.numel() == 0 or packed.numel() == 0:
        n = bias.numel() if bias is not None else n
        return torch.zeros(m, n, dtype=x.dtype, device=x.device) + (0 if bias is None else bias.to(x.dtype))
    n = 2 * packed.numel() // k
    x, packed, scale = x.contiguous(), packed.contiguous(), scale.to(torch.float32).contiguous()
    zero, bias = _unsigned_zero(scale, zero_point, table, signed), None if bias is None else bias.contiguous()
    if tile is None and split is None and table is None and rows_fit(m, k, group_size, x.dtype):
        return launch_w4a16_rows(x, packed, scale, zero, bias, group=group_size)
    if tile is None and gemv_fits(m, k, group_size, codebook=table is not None):
        return launch_w4a16_gemv(x, packed, scale, zero, table, bias, group=group_size, split=split)
    tile = tile or choose_tile(m, x.dtype)
    # A step lies within one group if its depth divides the group's, or if the row is one group.
    depth = tile.k if group_size == k else gcd(tile.k, group_size)
    whole = depth >= _LEAST_K and k % group_size == 0
    depth = depth if whole else min(tile.k, 32)
    tiles = blocks_of(m, tile.m) * blocks_of(n, tile.n)
    steps = blocks_of(k, depth)
    part = blocks_of(steps, min(steps, split or max(1, _PROGRAMS // tiles))) * depth
    split = blocks_of(k, part)
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    target = out if split == 1 else torch.empty(split, m, n, dtype=torch.float32, device=x.device)
    own_bias = bias if split == 1 else None
    given = [scale if t is None else t for t in (zero, table, own_bias)]
    with on_device_of(x):
        launch(
            w4a16_matmul_kernel,
            (tiles, split),
            (x, packed, scale, *given, target, m, n, k, group_size, part),
            {
                "CODEBOOK": table is not None, "SIGNED": zero is None, "ZERO": zero is not None,
                "BIAS": own_bias is not None, "WHOLE": whole,
                "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": depth, "GROUP": 8,
            },
            num_warps=tile.warps,
            num_stages=tile.stages,
            **_FUSED,
        )  # fmt: skip
    return out if split == 1 else add_parts(target, bias, out)


def _unsigned_zero(scale: Tensor, zero_point: Tensor | None, table: Tensor | None, signed: bool) -> Tensor | None:
    """Return the zero point of unsigned integers, None for all others, whose zero is known."""
    if table is not None or (signed and zero_point is None):
        return None
    if zero_point is None:
        return torch.zeros_like(scale, dtype=torch.int32)
    if signed:
        raise ValueError("zero_point is given with signed=True, whose zero point is 0; leave it out")
    return zero_point.to(torch.int32).contiguous()


def _check(x: Tensor, packed: Tensor, table: Tensor | None, group_size: int) -> None:
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32) or x.dim() != 2:
        raise ValueError(f"x is {x.dtype} of shape {tuple(x.shape)}; use [M, K] of float16, bfloat16 or float32")
    k = x.shape[1]
    if k and (k % 2 or (2 * packed.numel()) % k):
        raise ValueError(
            f"{packed.numel()} bytes hold no whole rows of K={k} codes; K must be even: dequantize instead"
        )
    if k and table is None and k % group_size:
        raise ValueError(f"group_size must divide K: {k} % {group_size} != 0")


def _tuned() -> dict[str, Tuned]:
    signature = {"x_ptr": "*bf16:16", "packed_ptr": "*u8:16", "zero_ptr": "*i32:16", "out_ptr": "*bf16:16"}
    signature |= dict.fromkeys(("scale_ptr", "table_ptr", "bias_ptr"), "*fp32:16")
    signature |= {"M": "i32", "N": "i32:16", "K": "i32:16", "group": "i32:16", "part": "i32:16"}
    found = {}
    for tile in (*TILES, _FLOAT32):
        for name, codebook, zero in (("zero", False, True), ("symmetric", False, False), ("codebook", True, False)):
            types = signature if tile is not _FLOAT32 else {**signature, "x_ptr": "*fp32:16", "out_ptr": "*fp32:16"}
            constexprs: dict[str, int] = {
                "CODEBOOK": codebook,
                "SIGNED": not zero,
                "ZERO": zero,
                "BIAS": True,
                "WHOLE": True,
            }
            constexprs |= {"BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k, "GROUP": 8}
            found[f"{name}-{tile.m}x{tile.n}x{tile.k}"] = Tuned(
                kernel=w4a16_matmul_kernel, signature=types, constexprs=constexprs,
                num_warps=tile.warps, num_stages=tile.stages, options=_FUSED,
            )  # fmt: skip
    return found


TUNED = _tuned()

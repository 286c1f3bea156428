"""int8 times int8 with exact int32 sums, scaled, shifted and rounded in the same kernel.

``out = (a @ b.T - a_zero_point * sum(b)) * (a_scale * b_scale) + bias``: the sum in int32, then in float32 one
rounding for the product of the scales, one for the conversion, one for the product and one for the sum, as
:mod:`lightning_qat.ops.integer_linear` does. Equal to that bit for bit: integer sums have no order.

Bytes moved of ``[M, K] x [N, K]``: ``M K + N K + b M N`` once and again from L2 for every tile; a tile of 128 x 256
reads 1/128 + 1/256 bytes per multiply-add, a quarter of the shared-memory traffic of bfloat16 at 128 x 128.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_qat.kernels.launch import CAPABILITIES, EXACT, Tuned, blocks_of, launch, on_device_of


@triton.jit
def _store_columns(
    sums, a_scale, row, first, out_ptr, b_scale_ptr, bias_ptr, M, N,
    B_PER_ROW: tl.constexpr, BIAS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Scale, shift and store some columns; all at once, the factors would not fit the registers beside the sums."""
    column = first + tl.arange(0, COLUMNS)
    inside = column < N
    b_scale = tl.load(b_scale_ptr + (column if B_PER_ROW else tl.zeros_like(column)), mask=inside, other=0.0)
    value = sums.to(tl.float32) * (a_scale[:, None] * b_scale[None, :])
    if BIAS:
        value += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    out_at = out_ptr + row.to(tl.int64)[:, None] * N + column[None, :]
    tl.store(out_at, value.to(out_ptr.dtype.element_ty), mask=(row < M)[:, None] & inside[None, :])


@triton.jit
def w8a8_matmul_kernel(
    a_ptr, b_ptr, out_ptr, a_scale_ptr, b_scale_ptr, bias_ptr, zero_ptr, sums_ptr, M, N, K,
    A_PER_ROW: tl.constexpr, B_PER_ROW: tl.constexpr, BIAS: tl.constexpr, ZERO: tl.constexpr,
    ZERO_PER_ROW: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile of the result. Programs go down GROUP row tiles before the next column, so that both stay in L2."""
    program = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    first_m = program // (GROUP * tiles_n) * GROUP
    group = tl.minimum(tiles_m - first_m, GROUP)
    inside = program % (GROUP * tiles_n)
    row = (first_m + inside % group) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = (inside // group) * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows beyond the end repeat the first: their sums are never stored, and the loop needs no mask for them.
    a_row = tl.where(row < M, row, 0).to(tl.int64)
    b_row = tl.where(column < N, column, 0).to(tl.int64)
    depth = tl.arange(0, BLOCK_K)
    a_at = a_ptr + a_row[:, None] * K + depth[None, :]
    b_at = b_ptr + b_row[None, :] * K + depth[:, None]
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    if ZERO:  # before the loop: at its end the registers hold the sums, the scales and the bias
        zero = tl.load(zero_ptr + (a_row if ZERO_PER_ROW else tl.zeros_like(a_row)))
        sums -= zero[:, None] * tl.load(sums_ptr + b_row)[None, :]
    for k in range(0, K, BLOCK_K):
        if EVEN_K:
            a, b = tl.load(a_at), tl.load(b_at)
        else:
            a = tl.load(a_at, mask=depth[None, :] < K - k, other=0)
            b = tl.load(b_at, mask=depth[:, None] < K - k, other=0)
        sums = tl.dot(a, b, sums, out_dtype=tl.int32)
        a_at += BLOCK_K
        b_at += BLOCK_K
    a_scale = tl.load(a_scale_ptr + (a_row if A_PER_ROW else tl.zeros_like(a_row)))
    half: tl.constexpr = BLOCK_N // 2
    left, right = tl.split(tl.permute(tl.reshape(sums, (BLOCK_M, 2, half)), (0, 2, 1)))
    first_n = (inside // group) * BLOCK_N
    _store_columns(left, a_scale, row, first_n, out_ptr, b_scale_ptr, bias_ptr, M, N, B_PER_ROW, BIAS, half)
    _store_columns(right, a_scale, row, first_n + half, out_ptr, b_scale_ptr, bias_ptr, M, N, B_PER_ROW, BIAS, half)


@dataclass(frozen=True)
class Tile:
    """The part of the result that a program makes, and how."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    group: int = 8
    since: int = 80

    @property
    def shared(self) -> int:
        """Bytes of shared memory that the pipeline takes."""
        return (self.m + self.n) * self.k * self.stages

    def constexprs(self) -> dict[str, int]:
        return {"BLOCK_M": self.m, "BLOCK_N": self.n, "BLOCK_K": self.k, "GROUP": self.group}


#: From the largest to the smallest; the first that suits the shape and fits the GPU is taken.
TILES = (
    # 192 KiB. The sums take 128 registers of each thread; on sm_80 the operands go there too, and do not fit.
    Tile(128, 256, 128, warps=8, stages=4, since=90),
    Tile(128, 128, 128, warps=8, stages=3),  # 96 KiB
    Tile(64, 128, 128, warps=4, stages=4),
    Tile(16, 64, 256, warps=4, stages=4),
)
#: Fewer tiles than about this many leave multiprocessors idle, and a smaller tile is faster.
_ENOUGH_PROGRAMS = 100


def choose_tile(m: int, n: int, capability: int, shared: int) -> Tile:
    """Return the tile for a result ``[m, n]`` on a GPU.

    Args:
        m: rows.
        n: columns.
        capability: such as 90.
        shared: bytes of shared memory that a program may take.
    """
    for tile in TILES[:-1]:
        enough = blocks_of(m, tile.m) * blocks_of(n, tile.n) >= _ENOUGH_PROGRAMS or tile is TILES[-2]
        if tile.shared <= shared and capability >= tile.since and enough and 2 * m > tile.m:
            return tile
    return TILES[-1]


def limits_of(x: Tensor) -> tuple[int, int]:
    """Return the capability of the GPU where ``x`` is, such as 90, and its shared memory for a program in bytes."""
    if not x.is_cuda:
        return 90, 227 * 1024
    device = torch.cuda.get_device_properties(x.device)
    # Where it is missing there is no more than every program gets.
    shared = getattr(device, "shared_memory_per_block_optin", device.shared_memory_per_block)
    return 10 * device.major + device.minor, int(shared)


def launch_w8a8_matmul(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    bias: Tensor | None = None,
    *,
    a_zero_point: Tensor | int | None = None,
    b_sums: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    tile: Tile | None = None,
) -> Tensor:
    """Return ``(a - a_zero_point) * a_scale @ (b * b_scale).T + bias``.

    The products must fit an int32 sum, which they do for ``K`` up to 131,071, and with a zero point to half of it.

    Args:
        a: int8 ``[M, K]``. Codes of 0 to 255 become int8 by ``(codes ^ 128).view(torch.int8)``, their zero point by
            subtracting 128.
        a_scale: float32, one element or ``[M]`` or ``[M, 1]``.
        b: int8 ``[N, K]``.
        b_scale: float32, one element or ``[N]`` or ``[N, 1]``.
        bias: ``[N]``, any floating dtype.
        a_zero_point: integer; a tensor has one element or one for each row.
        b_sums: int32 ``[N]``, the sum of each row of ``b``; only looked at with ``a_zero_point``, and made here,
            which reads all of ``b``, where it is None.
        dtype: of the result.
        tile: None is :func:`choose_tile`'s.

    Raises:
        ValueError: if a dtype or shape does not fit.
    """
    _check(a, b)
    (m, k), n = a.shape, b.shape[0]
    out = torch.empty(m, n, dtype=dtype, device=a.device)
    if out.numel() == 0:
        return out
    a, b = a.contiguous(), b.contiguous()
    scales = a_scale.to(torch.float32).contiguous(), b_scale.to(torch.float32).contiguous()
    zero = torch.full((1,), a_zero_point, dtype=torch.int32, device=a.device) if isinstance(a_zero_point, int) else None
    if isinstance(a_zero_point, Tensor):
        zero = a_zero_point.to(torch.int32).contiguous()
    if zero is not None and b_sums is None:
        b_sums = b.sum(1, dtype=torch.int32)
    tile = tile or choose_tile(m, n, *limits_of(a))
    given = (out if bias is None else bias.contiguous(), a if zero is None else zero, a if b_sums is None else b_sums)
    with on_device_of(a):
        launch(
            w8a8_matmul_kernel,
            (blocks_of(m, tile.m) * blocks_of(n, tile.n),),
            (a, b, out, *scales, *given, m, n, k),
            {
                "A_PER_ROW": a_scale.numel() > 1, "B_PER_ROW": b_scale.numel() > 1, "BIAS": bias is not None,
                "ZERO": zero is not None, "ZERO_PER_ROW": zero is not None and zero.numel() > 1,
                "EVEN_K": k % tile.k == 0, **tile.constexprs(),
            },
            num_warps=tile.warps,
            num_stages=tile.stages,
            **EXACT,
        )  # fmt: skip
    return out


def _check(a: Tensor, b: Tensor) -> None:
    for name, t in (("a", a), ("b", b)):
        if t.dtype != torch.int8 or t.dim() != 2:
            raise ValueError(f"{name} is {t.dtype} of shape {tuple(t.shape)}; use torch.int8 with two dimensions")
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"a has {a.shape[1]} columns and b {b.shape[1]}; they must be equal")


def _tuned() -> dict[str, Tuned]:
    signature = {"a_ptr": "*i8:16", "b_ptr": "*i8:16", "out_ptr": "*bf16:16", "zero_ptr": "*i32:16"}
    signature |= dict.fromkeys(("a_scale_ptr", "b_scale_ptr", "bias_ptr"), "*fp32:16")
    signature |= {"sums_ptr": "*i32:16", "M": "i32:16", "N": "i32:16", "K": "i32:16"}
    rows = {"A_PER_ROW": True, "B_PER_ROW": True, "BIAS": True, "ZERO": True, "ZERO_PER_ROW": True, "EVEN_K": True}
    return {
        f"{t.m}x{t.n}x{t.k}": Tuned(
            kernel=w8a8_matmul_kernel, signature=signature, constexprs={**rows, **t.constexprs()},
            num_warps=t.warps, num_stages=t.stages,
            capabilities=tuple(c for c in CAPABILITIES if c >= t.since),
        )
        for t in TILES
    }  # fmt: skip


TUNED = _tuned()

"""int8 products: equal to integer sums in 64 bits, scaled one rounding at a time."""

from __future__ import annotations

import pytest
import torch
import triton
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import aot
from torch import Tensor

from lightning_qat.kernels import w8a8_matmul as kernels

SMALL = kernels.Tile(16, 32, 32, warps=4, stages=2, group=3)


def codes(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randint(-128, 128, (rows, columns), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


def exact(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None, zero: Tensor | int | None
) -> Tensor:
    """The sums in 64-bit integers, then the four roundings that the kernel documents."""
    shift = zero.long().reshape(-1, 1) if isinstance(zero, Tensor) else (zero or 0)
    sums = (a.long() - shift) @ b.long().t()
    value = sums.float() * (a_scale.reshape(-1, 1) * b_scale.reshape(1, -1))
    return value if bias is None else value + bias.float()


def test_the_reference_is_plain_arithmetic() -> None:
    a, b = codes(3, 5, 1), codes(2, 5, 2)
    by_hand = [[sum((x - 7) * y for x, y in zip(r, s, strict=True)) / 4 + 1 for s in b.tolist()] for r in a.tolist()]
    quarter = torch.tensor([0.25])
    assert exact(a, quarter, b, torch.ones(1), torch.ones(2), 7).tolist() == by_hand


@given(
    st.tuples(st.integers(1, 50), st.integers(1, 80), st.integers(1, 100)),
    st.tuples(st.booleans(), st.booleans(), st.booleans()),
    st.sampled_from(("none", "number", "one", "rows")),
    st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
    st.integers(0, 2**16),
)
@settings(max_examples=60, deadline=None)
def test_products_are_exact(
    device: str,
    shape: tuple[int, int, int],
    options: tuple[bool, bool, bool],
    zero_kind: str,
    dtype: torch.dtype,
    seed: int,
) -> None:
    m, n, k = shape
    per_row, per_column, with_bias = options
    a, b = codes(m, k, seed), codes(n, k, seed + 1)
    a_scale, b_scale = torch.rand(m if per_row else 1) / 100, torch.rand(n if per_column else 1) / 100
    bias = torch.randn(n).to(dtype) if with_bias else None
    zeros = {"none": None, "number": 9, "one": torch.tensor([-5]), "rows": torch.arange(m) - 3}
    zero = zeros[zero_kind]
    on = [t.to(device) if isinstance(t, Tensor) else t for t in (a, a_scale, b, b_scale, bias, zero)]
    tile = SMALL if device == "cpu" else None
    out = kernels.launch_w8a8_matmul(*on[:5], a_zero_point=on[5], dtype=dtype, tile=tile)
    assert out.dtype == dtype
    assert torch.equal(out.cpu(), exact(a, a_scale, b, b_scale, bias, zero).to(dtype))


@pytest.mark.parametrize("tile", kernels.TILES, ids=lambda t: f"{t.m}x{t.n}x{t.k}")
def test_every_tile_is_right_beyond_its_edges(device: str, tile: kernels.Tile, poisoned: None) -> None:
    capability, shared = kernels.limits_of(torch.empty(0, device=device))
    if capability < tile.since or shared < tile.shared:
        pytest.skip("not on this GPU")
    m, n, k = tile.m + 3, tile.n + 5, 2 * tile.k + 7
    a, b = codes(m, k, 3), codes(n, k, 4)
    scales = torch.rand(m, 1), torch.rand(n, 1)
    out = kernels.launch_w8a8_matmul(a.to(device), scales[0].to(device), b.to(device), scales[1].to(device), tile=tile)
    assert torch.equal(out.cpu(), exact(a, scales[0], b, scales[1], None, None))


def test_sums_given_and_sums_made(device: str) -> None:
    a, b, one = codes(5, 64, 5).to(device), codes(7, 64, 6).to(device), torch.ones(1, device=device)
    sums = b.sum(1, dtype=torch.int32)
    made = kernels.launch_w8a8_matmul(a, one, b, one, a_zero_point=3)
    assert torch.equal(made, kernels.launch_w8a8_matmul(a, one, b, one, a_zero_point=3, b_sums=sums))


def test_the_largest_sums(device: str) -> None:
    k = 4096
    a, b = torch.full((1, k), -128, dtype=torch.int8), torch.full((1, k), -128, dtype=torch.int8)
    one = torch.ones(1, device=device)
    assert kernels.launch_w8a8_matmul(a.to(device), one, b.to(device), one).item() == 128.0**2 * k


def test_unsigned_codes_become_signed_as_documented(device: str) -> None:
    a = torch.randint(0, 256, (4, 33), dtype=torch.uint8)
    b, one = codes(6, 33, 8), torch.ones(1)
    signed = (a ^ 128).view(torch.int8)
    on = (signed.to(device), one.to(device), b.to(device), one.to(device))
    out = kernels.launch_w8a8_matmul(*on, a_zero_point=100 - 128)
    assert torch.equal(out.cpu(), ((a.long() - 100) @ b.long().t()).float())


@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 0, 4), (2, 3, 0)])
def test_empty(device: str, shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    one, bias = torch.ones(1, device=device), torch.arange(n, device=device).float()
    out = kernels.launch_w8a8_matmul(codes(m, k, 0).to(device), one, codes(n, k, 0).to(device), one, bias)
    assert torch.equal(out, bias.expand(m, n))


def test_wrong_arguments_are_named(device: str) -> None:
    a, one = codes(2, 4, 0), torch.ones(1)
    with pytest.raises(ValueError, match="a has 4 columns and b 5; they must be equal"):
        kernels.launch_w8a8_matmul(a, one, codes(2, 5, 0), one)
    with pytest.raises(ValueError, match="b is torch.uint8 of shape .2, 4.; use torch.int8"):
        kernels.launch_w8a8_matmul(a, one, a.view(torch.uint8), one)


def test_tiles_follow_the_shape() -> None:
    h200 = (90, 227 * 1024)
    assert kernels.choose_tile(8192, 8192, *h200).n == 256
    assert kernels.choose_tile(8192, 8192, 80, 163 * 1024).n == 128
    assert kernels.choose_tile(8192, 8192, 89, 99 * 1024).shared <= 99 * 1024
    assert kernels.choose_tile(1, 8192, *h200).m == 16
    assert kernels.choose_tile(512, 1024, *h200).m == 64


# --- the compiler ---------------------------------------------------------------------------------


@pytest.mark.parametrize("tile", kernels.TILES, ids=lambda t: f"{t.m}x{t.n}x{t.k}")
def test_compiles_without_spills(compiler: None, tile: kernels.Tile) -> None:
    name = f"{tile.m}x{tile.n}x{tile.k}"
    capabilities = tuple(c for c in aot.CAPABILITIES if c >= tile.since)
    limits = {80: 163, 90: 227, 100: 227}
    for capability in capabilities:
        used = aot.measure(kernels.TUNED[name], capability)
        assert used["spills"] == 0
        assert used["shared"] <= limits[capability] * 1024


@pytest.mark.parametrize(
    ("capability", "instruction"),
    [(80, "mma.sync.aligned.m16n8k32"), (90, "wgmma.mma_async.sync.aligned.m64"), (100, "kind::i8")],
)
def test_products_are_made_by_the_matrix_units(compiler: None, capability: int, instruction: str) -> None:
    if capability == 100 and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7):
        pytest.skip(f"Triton {triton.__version__} multiplies integers on sm_100 without tensor memory")
    text = aot.ptx(kernels.TUNED["128x128x128"], capability)
    assert instruction in text
    assert "cp.async" in text

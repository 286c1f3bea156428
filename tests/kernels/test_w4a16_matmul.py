"""Products with packed 4-bit weights against float64, within what float32 sums of float products can lose."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import aot
from tensors import randn
from torch import Tensor

from lightning_qat.kernels import w4a16_gemv as gemv
from lightning_qat.kernels import w4a16_matmul as kernels
from lightning_qat.kernels import w4a16_rows
from lightning_qat.ops.codebook_tables import codebook
from lightning_qat.ops.packing import pack_bits

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMATS = ("signed", "unsigned", "zero", "nf4", "fp4")
SMALL = kernels.Tile(16, 16, 32, warps=4, stages=2)


@pytest.fixture(autouse=True, scope="module")
def bfloat16_products() -> Iterator[None]:
    """Triton's interpreter multiplies the bits of bfloat16 as integers; give it the float32 numbers that they are."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    original = InterpreterBuilder.create_dot

    def widened(handle: Any) -> Any:
        if str(handle.dtype.scalar) != "bf16":
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << np.uint32(16)).view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return original(self, widened(a), widened(b), *rest)

    InterpreterBuilder.create_dot = create_dot
    yield
    InterpreterBuilder.create_dot = original


class Weight:
    """Random codes of one format: as stored, and as the float64 numbers that they stand for."""

    def __init__(self, name: str, n: int, k: int, group: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        codes = torch.randint(0, 16, (n, k), generator=generator, dtype=torch.uint8)
        self.scale = torch.rand(-(-n * k // group), generator=generator) + 0.1
        self.zero = torch.randint(0, 16, self.scale.shape, generator=generator) if name == "zero" else None
        self.table = codebook(name, "cpu") if name in ("nf4", "fp4") else None
        self.signed, self.group, self.name = name == "signed", group, name
        steps = self.scale.double().repeat_interleave(group)[: n * k].view(n, k)
        if self.table is not None:
            flat = codes.view(-1, 2)
            self.packed, values = (flat[:, 0] << 4) | flat[:, 1], self.table[codes.long()].double()
        else:
            values = codes.double() - (8 if self.signed else 0)
            self.packed = pack_bits(values.to(torch.int8), 4, signed=self.signed)
            if self.zero is not None:
                values -= self.zero.repeat_interleave(group).view(n, k)
        self.exact = values * steps

    def multiply(
        self, x: Tensor, bias: Tensor | None, tile: kernels.Tile | None = None, split: int | None = None
    ) -> Tensor:
        def on(t: Tensor | None) -> Tensor | None:
            return t if t is None else t.to(x.device)

        return kernels.launch_w4a16_matmul(
            x, self.packed.to(x.device), self.scale.to(x.device), on(self.zero), on(bias), group_size=self.group,
            table=on(self.table), signed=self.signed, tile=tile, split=split,
        )  # fmt: skip


def assert_close(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, of_weight: float) -> None:
    """Each product and sum may lose a rounding of float32, each weight ``of_weight``, the result one of its dtype."""
    exact = x.double() @ weight.t()
    size = x.double().abs() @ weight.abs().t()
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    least = torch.finfo(out.dtype).smallest_normal
    limit = size * ((x.shape[1] + 8) * 2.0**-24 + of_weight) + exact.abs() * torch.finfo(out.dtype).eps / 2 + least
    assert out.isfinite().all()
    worst = (out.double() - exact).abs() / limit
    assert worst.max() <= 1.0, float(worst.max())


def rounding(name: str, x: Tensor, whole: bool) -> float:
    """What a weight loses before it is multiplied: nothing if an integer, else half a unit of the dtype of ``x``."""
    if name in ("nf4", "fp4") or not whole:
        return torch.finfo(x.dtype).eps / 2
    return 0.0


@st.composite
def cases(draw: st.DrawFn) -> tuple[int, int, int, int]:
    k, group = draw(st.sampled_from(((32, 32), (64, 16), (96, 48), (96, 96), (128, 32), (160, 8), (60, 10), (70, 70))))
    return draw(st.integers(1, 40)), draw(st.integers(1, 40)), k, group


@pytest.mark.parametrize("name", FORMATS)
@given(shape=cases(), dtype=st.sampled_from(DTYPES), split=st.sampled_from((None, 2, 3)), with_bias=st.booleans())
@settings(max_examples=12, deadline=None)
def test_tiles(
    device: str, name: str, shape: tuple[int, int, int, int], dtype: torch.dtype, split: int | None, with_bias: bool
) -> None:
    m, n, k, group = shape
    weight, x = Weight(name, n, k, group), randn(m, k, seed=m).to(dtype)
    bias = randn(n, seed=9).to(dtype) if with_bias else None
    out = weight.multiply(x.to(device), bias, SMALL, split).cpu()
    assert out.dtype == dtype
    whole = group == k or group % 32 == 0
    assert_close(out, x, weight.exact, bias, rounding(name, x, whole))


@pytest.mark.parametrize("name", FORMATS)
@given(
    shape=st.tuples(
        st.integers(1, 2), st.integers(1, 40), st.sampled_from(((32, 8), (64, 64), (1032, 24), (2304, 128)))
    ),
    dtype=st.sampled_from(DTYPES),
    split=st.sampled_from((1, None, 2)),
    with_bias=st.booleans(),
)
@settings(max_examples=8, deadline=None)
def test_few_rows(
    device: str, name: str, shape: tuple[int, int, tuple[int, int]], dtype: torch.dtype, split: int, with_bias: bool
) -> None:
    m, n, (k, group) = shape
    weight, x = Weight(name, n, k, group), randn(m, k, seed=m).to(dtype)
    bias = randn(n, seed=9).to(dtype) if with_bias else None
    fits = gemv.gemv_fits(m, k, group, codebook=weight.table is not None)
    assert fits == (m == 1 or weight.table is None)
    out = weight.multiply(x.to(device), bias, split=split).cpu()
    assert_close(out, x, weight.exact, bias, 0.0 if fits else rounding(name, x, False))


ROW_SHAPES = ((64, 64), (96, 32), (320, 64), (128, 128), (320, 160), (576, 192), (2304, 256), (1152, 1152))


@pytest.mark.parametrize("name", ["signed", "unsigned", "zero"])
@given(
    shape=st.tuples(st.integers(1, 32), st.integers(1, 70), st.sampled_from(ROW_SHAPES)),
    dtype=st.sampled_from(DTYPES[1:]),
    with_bias=st.booleans(),
)
@settings(max_examples=10, deadline=None)
def test_rows_on_the_matrix_units(
    device: str, name: str, shape: tuple[int, int, tuple[int, int]], dtype: torch.dtype, with_bias: bool
) -> None:
    m, n, (k, group) = shape
    weight, x = Weight(name, n, k, group), randn(m, k, seed=m).to(dtype)
    bias = randn(n, seed=9).to(dtype) if with_bias else None
    assert w4a16_rows.rows_fit(m, k, group, dtype)
    assert_close(weight.multiply(x.to(device), bias).cpu(), x, weight.exact, bias, 0.0)


def test_rows_of_a_large_weight(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many columns for each program as a weight gets that keeps a GPU busy, and a part of the depth left over."""
    monkeypatch.setattr(w4a16_rows, "_PROGRAMS", 1)
    n, k = 2 * w4a16_rows._MANY_COLUMNS - 5, 1056
    weight, x = Weight("signed", n, k, 32), randn(2, k).bfloat16()
    assert_close(weight.multiply(x.to(device), None).cpu(), x, weight.exact, None, 0.0)


@pytest.mark.parametrize("side", [2, 4])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_either_order_of_the_depth_is_that_of_both_operands(
    device: str, monkeypatch: pytest.MonkeyPatch, side: int, group: int
) -> None:
    monkeypatch.setattr(w4a16_rows, "_SIDE_BY_SIDE", side)
    weight = Weight("zero", 16, 128, group)
    identity = torch.eye(128).bfloat16()
    rows = torch.cat([weight.multiply(part.to(device), None) for part in identity.split(16)]).cpu()
    assert torch.equal(rows, weight.exact.float().bfloat16().t())


@pytest.mark.parametrize(
    ("dtype", "k", "group", "rows"),
    [
        (torch.float32, 128, 128, 1),
        (torch.bfloat16, 128, 16, 1),
        (torch.bfloat16, 112, 112, 1),
        (torch.bfloat16, 128, 128, 33),
        (torch.bfloat16, 128, 128, 0),
    ],
)
def test_what_the_rows_do_not_take(dtype: torch.dtype, k: int, group: int, rows: int) -> None:
    assert not w4a16_rows.rows_fit(rows, k, group, dtype)


@pytest.mark.parametrize("name", FORMATS)
def test_every_code_in_every_place_of_a_word(device: str, name: str) -> None:
    """Products with the rows of the identity are the weights themselves."""
    n, k = 16, 32
    weight = Weight(name, n, k, 32)
    identity = torch.eye(k)
    few = 2 if weight.table is None else 1
    rows = torch.cat([weight.multiply(part.to(device), None) for part in identity.split(few)]).cpu()
    tiles = weight.multiply(identity.to(device), None, SMALL).cpu()
    assert torch.equal(rows, tiles)
    assert torch.allclose(rows.double().t(), weight.exact, rtol=2.0**-22, atol=0)


def test_a_block_of_a_codebook_may_cross_rows(device: str) -> None:
    n, k, group = 6, 40, 64
    weight, x = Weight("nf4", n, k, group), randn(3, k)
    assert_close(weight.multiply(x.to(device), None).cpu(), x, weight.exact, None, rounding("nf4", x, False))


@pytest.mark.parametrize("name", ["signed", "nf4"])
@pytest.mark.parametrize(("rows", "split"), [(1, None), (1, 2), (3, None), (40, 1)])
def test_a_bias_of_any_strides(device: str, name: str, rows: int, split: int | None) -> None:
    weight, x = Weight(name, 21, 2048, 64), randn(rows, 2048).to(device).bfloat16()
    bias = randn(21, 2, seed=9).to(device)[:, 1]
    assert torch.equal(weight.multiply(x, bias, split=split), weight.multiply(x, bias.contiguous(), split=split))


@pytest.mark.parametrize("rows", [2, 20])
def test_everything_is_written_and_equal_in_every_run(device: str, rows: int, poisoned: None) -> None:
    weight, x = Weight("signed", 37, 2048, 128), randn(rows, 2048).to(device).bfloat16()
    tile = SMALL if rows > 2 else None
    first = weight.multiply(x, None, tile, 2)
    assert torch.equal(first, weight.multiply(x, None, tile, 2))
    assert first.isfinite().all()


@pytest.mark.parametrize("shape", [(0, 3, 32), (2, 0, 32)])
def test_empty(device: str, shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    weight = Weight("signed", n, k, 32)
    assert weight.multiply(torch.ones(m, k, device=device), None).shape == (m, n)


def test_wrong_arguments_are_named(device: str) -> None:
    packed, scale = torch.zeros(32, dtype=torch.uint8), torch.ones(2)
    call: Callable[..., Tensor] = kernels.launch_w4a16_matmul
    with pytest.raises(ValueError, match="group_size must divide K: 32 % 24 != 0"):
        call(torch.ones(1, 32), packed, scale, group_size=24)
    with pytest.raises(ValueError, match="hold no whole rows of K=31 codes"):
        call(torch.ones(1, 31), packed, scale, group_size=31)
    with pytest.raises(ValueError, match="zero_point is given with signed=True"):
        call(torch.ones(1, 32), packed, scale, torch.ones(2), group_size=32)
    with pytest.raises(ValueError, match="x is torch.float64"):
        call(torch.ones(1, 32).double(), packed, scale, group_size=32)


# --- the compiler ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(kernels.TUNED))
def test_tiles_compile_without_spills(compiler: None, name: str) -> None:
    aot.check(kernels.TUNED[name])


@pytest.mark.parametrize("name", sorted(w4a16_rows.TUNED))
def test_rows_compile_without_spills_or_exchanges_of_the_weight(compiler: None, name: str) -> None:
    """Threads hand each other scales, zero points and sums; the weight would be 32 stores and more."""
    aot.check(w4a16_rows.TUNED[name])
    for capability in aot.CAPABILITIES:
        ptx = aot.ptx(w4a16_rows.TUNED[name], capability)
        assert "mma.sync" in ptx
        assert ptx.count("st.shared") + ptx.count("stmatrix") <= 12
        assert ptx.count("shfl.sync") <= 48  # the sum over the parts of the depth


@pytest.mark.parametrize("name", sorted(gemv.TUNED))
def test_few_rows_compile_without_spills(compiler: None, name: str) -> None:
    aot.check(gemv.TUNED[name])


@pytest.mark.parametrize(("capability", "instruction"), [(80, "mma.sync"), (90, "wgmma"), (100, "mma")])
def test_products_are_made_by_the_matrix_units(compiler: None, capability: int, instruction: str) -> None:
    assert instruction in aot.ptx(kernels.TUNED["symmetric-16x64x128"], capability)


@pytest.mark.parametrize("name", sorted(gemv.TUNED))
def test_few_rows_need_no_exchange_between_threads_but_sums(compiler: None, name: str) -> None:
    """x and the words that it meets are in the same thread; a change of layout is 16 barriers for four rows."""
    rows = gemv.TUNED[name].constexprs["ROWS"]
    assert aot.ptx(gemv.TUNED[name]).count("bar.sync") <= 6 * rows

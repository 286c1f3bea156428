"""Few float tokens and packed weights: as near to float64 as PyTorch's product with the dequantized weight."""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensors import randn

from lightning_qat.native import build
from lightning_qat.native import linear_float as native
from lightning_qat.native.library import without_native
from lightning_qat.ops import float_linear as float_linear_module
from lightning_qat.ops.codebook_tables import codebook
from lightning_qat.ops.float_linear import (
    eight_bits_fit,
    float_linear,
    four_bits_fit,
    most_tokens,
    of_eight_bits,
    of_four_bits,
)
from lightning_qat.ops.nibbles import pack_nibbles
from lightning_qat.ops.packing import pack_bits

pytestmark = pytest.mark.skipif(native._FAMILY.functions() is None, reason="no compiler here")

DTYPES = st.sampled_from((torch.float32, torch.float32, torch.bfloat16, torch.float16))


def four_bits(rows, columns, size, kind, seed):
    """Return a weight and its values in float64, worked out from the codes."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (rows, columns), generator=generator)
    scale = randn(rows, columns // size, seed=seed + 1) * 0.01  # both signs
    steps = scale.double().repeat_interleave(size, 1)
    if kind in ("nf4", "fp4"):
        packed = pack_nibbles(codes.to(torch.uint8), kind)
        table = codebook(kind, torch.device("cpu")).double()
        return of_four_bits(packed, scale.view(-1), None, rows, size, kind), table[codes] * steps
    if kind == "signed":
        packed = pack_bits(codes - 8, 4, signed=True)
        return of_four_bits(packed, scale.view(-1), None, rows, size, None), (codes - 8).double() * steps
    zero = torch.randint(0, 16, scale.shape, generator=generator, dtype=torch.int32)
    packed = pack_bits(codes, 4, signed=False)
    values = (codes - zero.repeat_interleave(size, 1)).double() * steps
    return of_four_bits(packed, scale.view(-1), zero.view(-1), rows, size, None), values


def assert_near(got, x, values, bias):
    """The bound is that of a float32 sum of so many products, each of a weight rounded to float32."""
    exact = x.double() @ values.t() + (0 if bias is None else bias.double())
    sizes = x.double().abs() @ values.abs().t() + (0 if bias is None else bias.double().abs())
    bound = sizes * (values.shape[1] / 16 + 10) * 2.0**-24
    if x.dtype != torch.float32:
        bound = bound + exact.abs() * torch.finfo(x.dtype).eps + 1e-7
    assert got.dtype == x.dtype
    assert got.shape == exact.shape
    assert ((got.double() - exact).abs() <= bound).all()


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 9), st.integers(1, 23), st.integers(1, 9), st.sampled_from((8, 16, 24, 32, 64, 72, 128, 256)),
    st.sampled_from(("signed", "unsigned", "nf4", "fp4")), DTYPES, st.booleans(), st.sampled_from((1, 1, 1, 3)),
    st.integers(0, 2**16),
)  # fmt: skip
def test_four_bits(tokens, rows, groups, size, kind, dtype, has_bias, threads, seed):
    weight, values = four_bits(rows, groups * size, size, kind, seed)
    x, bias = randn(tokens, groups * size, seed=seed).to(dtype), randn(rows, seed=seed) if has_bias else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "threads_for", lambda _: threads)
        got = float_linear(x, weight, bias)
    assert_near(got, x, values, bias)
    assert torch.equal(got, float_linear(x, weight, bias))  # whatever the threads
    assert torch.equal(got[-1], float_linear(x[-1], weight, bias))  # and the other tokens


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 150), st.sampled_from(("signed", "unsigned", "nf4")), st.integers(0, 2**16))
def test_four_bits_without_groups(tokens, half, kind, seed):
    weight, values = four_bits(5, 2 * half, 2 * half, kind, seed)
    x = randn(tokens, 2 * half, seed=seed)
    assert_near(float_linear(x, weight, None), x, values, None)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 23), st.integers(1, 5), st.integers(1, 100), st.booleans(), DTYPES,
    st.sampled_from((1, 1, 1, 3)), st.integers(0, 2**16),
)  # fmt: skip
def test_eight_bits(tokens, rows, groups, size, in_groups, dtype, threads, seed):
    size, groups = (16 * size, groups) if in_groups else (size, 1)
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-128, 128, (rows, groups * size), generator=generator).to(torch.int8)
    scale, x = randn(rows, groups, seed=seed + 1) * 0.01, randn(tokens, groups * size, seed=seed).to(dtype)
    weight, bias = of_eight_bits(codes, scale), randn(rows, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "threads_for", lambda _: threads)
        got = float_linear(x, weight, bias)
    assert_near(got, x, codes.double() * scale.double().repeat_interleave(size, 1), bias)
    assert torch.equal(got, float_linear(x, weight, bias))
    assert torch.equal(got[-1], float_linear(x[-1], weight, bias))
    assert weight.codes.data_ptr() == codes.data_ptr()  # read as it is stored


def test_one_scale_for_the_tensor():
    codes = torch.arange(-60, 60, dtype=torch.int8).view(4, 30)
    got = float_linear(torch.ones(30), of_eight_bits(codes, torch.tensor(0.5)), None)
    assert torch.equal(got, codes.float().sum(1) * 0.5)


@pytest.mark.parametrize("kind", ["signed", "unsigned", "nf4"])
def test_it_is_as_near_to_exact_as_a_float32_product(kind):
    weight, values = four_bits(256, 1024, 128, kind, 0)
    x = randn(4, 1024)
    exact = x.double() @ values.t()
    ours, by_float = float_linear(x, weight, None).double() - exact, (x @ values.float().t()).double() - exact
    assert ours.square().mean() <= 2 * by_float.square().mean()


def test_nan_and_infinity_go_the_way_of_floats_and_spare_other_tokens():
    for size in (32, 128):
        weight, values = four_bits(9, 256, size, "signed", 3)
        x = randn(5, 256)
        x[1, 3], x[2, 0], x[3, 0], x[3, 1] = math.nan, math.inf, math.inf, -math.inf
        got, wanted = float_linear(x, weight, None), x @ values.float().t()
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5, equal_nan=True)
        assert got[[0, 4]].isfinite().all()


def test_scales_and_inputs_of_any_size_do_not_overflow_on_the_way():
    weight = of_eight_bits(torch.full((2, 64), 127, dtype=torch.int8), torch.tensor(1e-4))
    got = float_linear(torch.full((1, 64), 1e37), weight, None)
    torch.testing.assert_close(got, torch.full((1, 2), 64 * 127 * 1e33))


def test_other_layouts():
    weight, values = four_bits(7, 64, 32, "signed", 3)
    x = randn(64, 6).t()
    assert_near(float_linear(x, weight, None), x, values, None)
    assert_near(float_linear(x.reshape(2, 3, 64), weight, None).view(6, 7), x, values, None)


def test_what_fits(monkeypatch):
    monkeypatch.setattr(float_linear_module, "has_linear_float", lambda: True)
    for rows, columns, size, four, eight in [
        (256, 256, 32, True, True),
        (256, 256, 8, True, False),
        (256, 256, 4, False, False),
        (256, 255, 255, False, True),
        (256, 250, 250, True, True),
        (256, 160, 64, False, False),  # blocks that go on in the next row
        (8, 64, 32, False, False),  # too small
    ]:
        assert four_bits_fit(rows, columns, size) == four
        assert eight_bits_fit(rows, columns, size) == eight
    monkeypatch.undo()
    with without_native():
        assert not four_bits_fit(256, 256, 32)


def test_up_to_how_many_tokens():
    half, single = torch.bfloat16, torch.float32
    for size, eight, four in [(4096, 4, 8), (2048, 16, 32), (1024, 64, 64), (256, 64, 64), (32768, 1, 1)]:
        assert most_tokens(8, size, size, size, single) == most_tokens(8, size, size, size, half) == eight
        assert most_tokens(4, size, size, size, half) == four
    assert [most_tokens(4, 256, 256, 128, d) for d in (single, half)] == [128, 64]
    assert [most_tokens(b, 256, 256, 64, d) for b in (4, 8) for d in (single, half)] == [64, 32] * 2


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize("flag", ["-DQAT_PLAIN", "-march=native"])
def test_plain_loops_give_nearly_the_same(tmp_path, monkeypatch, flag):
    """What another processor computes with: products and sums are rounded one by one there, in the same order."""
    library = tmp_path / "plain.so"
    source = str(build._SOURCES / "linear_float.cpp")
    subprocess.run(["g++", *build._FLAGS, flag, "-DQAT_PLAIN", "-shared", source, "-o", str(library)], check=True)
    plain = ctypes.CDLL(str(library))
    for name in native._FAMILY.signatures:
        getattr(plain, name).argtypes = getattr(native._FAMILY.functions(), name).argtypes
    monkeypatch.setattr(native._FAMILY, "_functions", plain)
    for size in (24, 32, 128, 336):
        for kind in ("signed", "unsigned", "fp4"):
            weight, values = four_bits(7, 8 * size, size, kind, 3)
            x = randn(6, 8 * size)
            assert_near(float_linear(x, weight, None), x, values, None)
    codes = torch.arange(-60, 60, dtype=torch.int8).view(4, 30)
    x = randn(3, 30)
    assert_near(float_linear(x, of_eight_bits(codes, torch.tensor(0.5)), None), x, codes.double() * 0.5, None)

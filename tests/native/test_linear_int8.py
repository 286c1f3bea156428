"""Few tokens and int8 weights: codes and outputs are those of the path without these kernels, bit for bit."""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensors import DENORMAL, LARGEST, randn

from lightning_qat.native import build
from lightning_qat.native import linear_int8 as native
from lightning_qat.native.library import without_native
from lightning_qat.ops.affine import choose_scale_zero_point
from lightning_qat.ops.integer_linear import (
    FEW_ROWS,
    code_range,
    integer_linear,
    integer_linear_per_tensor,
    integer_linear_per_token,
    linear_is_exact,
    pack_linear,
    quantize_unsigned,
)

pytestmark = pytest.mark.skipif(not native.has_linear_int8(), reason="no compiler here")
needs_witness = pytest.mark.skipif(not linear_is_exact(), reason="no exact kernel to compare with")

SIZES = st.sampled_from((0.0, 1e-42, 1e-30, 1e-3, 1.0, 1e20, 3e38))
DTYPES = st.sampled_from((torch.float32, torch.float32, torch.bfloat16, torch.float16))


def random_weight(n, k, seed, per_channel):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-128, 128, (n, k), generator=generator).to(torch.int8)
    return codes, randn(n if per_channel else 1, seed=seed + 1) * 0.01  # both signs


def by_definition(x, step, grid, codes, scale, bias):
    """``float(sum) * (scale * weight scale) + bias``; oneDNN's kernel multiplies small shapes in another order."""
    with without_native():
        rows = quantize_unsigned(x, step, grid).long() - grid.zero_point
    product = (rows @ codes.long().t()).float() * (step * scale)
    return (product if bias is None else product + bias.float()).to(x.dtype)


def equal(a, b):
    return a.dtype == b.dtype and torch.equal(a.nan_to_num(7.25), b.nan_to_num(7.25)) and _signs(a, b)


def _signs(a, b):
    return torch.equal(torch.signbit(a) & ~a.isnan(), torch.signbit(b) & ~b.isnan())


@needs_witness
@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, FEW_ROWS + 3), st.integers(1, 200), st.integers(1, 23), SIZES, DTYPES, st.integers(2, 8),
    st.booleans(), st.booleans(), st.booleans(), st.sampled_from((1, 1, 1, 3)), st.integers(0, 2**16), st.data(),
)  # fmt: skip
def test_the_bits_are_those_of_the_definition(
    tokens, k, n, size, dtype, bits, symmetric, per_channel, has_bias, threads, seed, data
):
    x = (randn(tokens, k, seed=seed) * torch.exp2(torch.arange(k) % 5) * size).to(dtype)
    special = data.draw(st.sampled_from((None, math.nan, math.inf, -math.inf, -0.0, DENORMAL, LARGEST)))
    if special is not None:
        x[-1, seed % k] = special
    if data.draw(st.booleans()):
        x = x.t().contiguous().t()
    codes, scale = random_weight(n, k, seed, per_channel)
    bias = randn(n, seed=seed + 2).to(dtype) if has_bias else None
    grid = code_range(bits, symmetric, 0 if symmetric else seed % 2**bits)
    step = torch.tensor(0.031)

    found, found_zero = choose_scale_zero_point(*torch.aminmax(x), bits=bits, symmetric=symmetric)
    found_grid = code_range(bits, symmetric, 0 if found_zero is None else int(found_zero))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "threads_for", lambda _: threads)
        weight = pack_linear(codes, scale)
        per_token = integer_linear_per_token(x, bits, weight, bias)
        per_tensor = integer_linear_per_tensor(x, bits, symmetric, weight, bias)
        static = integer_linear(x, step, grid, weight, bias, step.item())
        unsigned = quantize_unsigned(x, step, grid)
    with without_native():
        assert equal(per_token, integer_linear_per_token(x, bits, pack_linear(codes, scale), bias))
        assert torch.equal(unsigned, quantize_unsigned(x, step, grid))
    if tokens <= weight.few:
        assert equal(per_tensor, by_definition(x, found, found_grid, codes, scale, bias))
        assert equal(static, by_definition(x, step, grid, codes, scale, bias))


@given(st.integers(1, 9), st.integers(1, 300), st.integers(1, 9), st.integers(0, 2**16))
@settings(max_examples=50, deadline=None)
def test_sums_are_exact_whatever_the_codes(tokens, k, n, seed):
    """The witness is int64; codes at the ends saturate kernels that sum pairs in 16 bits."""
    generator = torch.Generator().manual_seed(seed)
    ends = torch.tensor([0, 255, 255, 255])[torch.randint(4, (tokens, k), generator=generator)].to(torch.uint8)
    weight = torch.tensor([-128, 127, -128])[torch.randint(3, (n, k), generator=generator)].to(torch.int8)
    sums, one = weight.sum(1, dtype=torch.int32), torch.ones(1)
    zero = seed % 256
    got = native.multiply_codes_native(ends, 1.0, zero, weight, sums, one, None, per_token=False)
    assert torch.equal(got.double(), ((ends.long() - zero) @ weight.long().t()).float().double())


@needs_witness
def test_more_tokens_than_few_are_multiplied_by_the_packed_weight():
    weight = pack_linear(*random_weight(5, 40, 0, True))
    assert weight.few == (2 * FEW_ROWS if native.linear_int8_is_fast() else 2)
    integer_linear_per_token(randn(weight.few, 40), 8, weight, None)
    assert "packed" not in vars(weight)
    integer_linear_per_token(randn(weight.few + 1, 40), 8, weight, None)
    assert "packed" in vars(weight)
    with without_native():  # as before there were these kernels: one copy
        weight = pack_linear(*random_weight(5, 40, 0, True))
    assert weight.codes is None
    assert weight.few == 0


@needs_witness
@pytest.mark.parametrize("columns", [3 * 2**13 - 4, 3 * 2**13 - 3, 50_000])  # two tokens fill the stack, or do not fit
def test_codes_that_do_not_fit_the_stack_are_kept_elsewhere(columns):
    x, bias = randn(2, columns), randn(7)
    codes, scale = random_weight(7, columns, 3, True)
    weight, step, grid = pack_linear(codes, scale), torch.tensor(0.05), code_range(8, False, 77)
    static = integer_linear(x, step, grid, weight, bias, 0.05)
    per_token = integer_linear_per_token(x, 8, weight, bias)
    assert equal(static, by_definition(x, step, grid, codes, scale, bias))
    assert equal(per_token, torch.cat([integer_linear_per_token(row, 8, weight, bias) for row in x.split(1)]))
    with without_native():
        assert equal(per_token, integer_linear_per_token(x, 8, pack_linear(codes, scale), bias))


def test_results_are_memory_of_their_own():
    weight = pack_linear(*random_weight(5, 40, 0, True))
    first = integer_linear_per_token(randn(2, 40), 8, weight, None)
    before = first.clone()
    second = integer_linear_per_token(randn(2, 40, seed=1), 8, weight, None)
    assert torch.equal(first, before)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("count", [1, 7, 16, 40])  # PyTorch converts tails of vectors with other instructions
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nan_becomes_the_code_of_zero(count, dtype):
    x = torch.full((count,), math.nan, dtype=dtype)
    x.view(torch.int16)[:] |= 0x1FF  # of float32, every second half
    x[-1] = math.nan
    for codes in (code_range(8, True), code_range(4, False, 3)):
        with without_native():
            reference = quantize_unsigned(x, torch.tensor(0.1), codes)
        assert (reference == codes.zero_point).all()
        assert torch.equal(quantize_unsigned(x, torch.tensor(0.1), codes), reference)


def test_the_weight_is_read_as_it_is_stored():
    codes, scale = random_weight(5, 40, 0, True)
    assert pack_linear(codes, scale).codes.data_ptr() == codes.data_ptr()


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_plain_loops_give_the_same_bits(tmp_path, monkeypatch):
    """What a processor without these instructions computes with."""
    library = tmp_path / "plain.so"
    source = str(build._SOURCES / "linear_int8.cpp")
    flags = [flag for flag in build._FLAGS if flag != "-fPIC"]
    subprocess.run(["g++", *flags, "-fPIC", "-DQAT_PLAIN", "-shared", source, "-o", str(library)], check=True)
    x, (codes, scale), bias = randn(3, 77), random_weight(13, 77, 1, True), randn(13)

    def outputs():
        weight = pack_linear(codes, scale)
        return integer_linear_per_token(x, 8, weight, bias), integer_linear_per_tensor(x, 8, False, weight, bias)

    wanted, plain = outputs(), ctypes.CDLL(str(library))
    for name, letters in native._FAMILY.signatures.items():
        getattr(plain, name).argtypes = getattr(native._FAMILY.functions(), name).argtypes
        assert len(getattr(plain, name).argtypes) == len(letters)
    monkeypatch.setattr(native._FAMILY, "_functions", plain)
    for got, want in zip(outputs(), wanted, strict=True):
        assert torch.equal(got, want)


def test_memory_is_on_the_cpu_whatever_the_default_device_is():
    x, (codes, scale) = randn(3, 40), random_weight(5, 40, 0, True)
    wanted = integer_linear_per_token(x, 8, pack_linear(codes, scale), None)
    with torch.device("meta"):
        weight = pack_linear(codes, scale)
        assert torch.equal(integer_linear_per_token(x, 8, weight, None), wanted)
        assert integer_linear_per_tensor(x, 8, False, weight, None).device.type == "cpu"
        assert integer_linear_per_token(x.repeat(9, 1), 8, weight, None).is_cpu

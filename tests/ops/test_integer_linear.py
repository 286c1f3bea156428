"""Integer products against exact arithmetic in int64, whatever the shape, zero point and sign of the scales."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensors import DENORMAL, LARGEST, batches, randn

from lightning_qat.ops import integer_linear as integer_linear_module
from lightning_qat.ops.affine import choose_scale_zero_point, quantize_affine
from lightning_qat.ops.integer_linear import (
    MAX_TERMS,
    code_range,
    integer_linear,
    integer_linear_per_token,
    linear_is_exact,
    pack_linear,
    quantize_unsigned,
)

needs_kernel = pytest.mark.skipif(not linear_is_exact(), reason="this CPU has no exact integer kernel")

#: Of float32, at the size of the larger summand: four roundings of half a unit.
TWO_ULPS = 2 * 2.0**-23


def random_codes(*shape, low=-128, high=127, seed=0):
    return torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(seed)).to(torch.int8)


def assert_exact(result, acc, scale, bias):
    """``acc`` int64, ``scale`` and ``bias`` float64; all broadcast."""
    product, bias = acc.double() * scale, torch.zeros(()) if bias is None else bias.double()
    assert ((result.double() - (product + bias)).abs() <= TWO_ULPS * (product.abs() + bias.abs())).all()


@given(batches(), st.floats(1e-6, 10.0), st.integers(2, 8), st.booleans(), st.data())
def test_codes_are_those_of_quantize_affine(batch, scale, bits, symmetric, data):
    x = batch[0] if batch[0].dtype != torch.float64 else batch[0].float()
    zero_point = None if symmetric else torch.tensor(data.draw(st.integers(0, 2**bits - 1)), dtype=torch.int32)
    scale = torch.tensor(scale)
    codes = quantize_unsigned(x, scale, code_range(bits, symmetric, 0 if symmetric else int(zero_point)))
    wanted = quantize_affine(x, scale, zero_point, bits=bits, symmetric=symmetric)
    assert torch.equal(codes.int(), wanted.int() + (128 if symmetric else 0))


@pytest.mark.parametrize("zero_point", [0, 1, 37, 128, 254, 255])
def test_ties_ends_and_what_is_no_number(zero_point):
    halves = torch.arange(-300, 300, dtype=torch.float32) + 0.5
    odd = torch.tensor([math.nan, -math.nan, math.inf, -math.inf, LARGEST, -LARGEST, DENORMAL, 0.0, -0.0, 2.0**31])
    near = torch.cat([halves, torch.nextafter(halves, torch.tensor(math.inf)), odd])
    for scale in (1.0, 0.1, 2.0**-126, 3e38):
        x, s = near * scale, torch.tensor(scale)
        codes = quantize_unsigned(x, s, code_range(8, False, zero_point))
        assert torch.equal(codes, quantize_affine(x, s, torch.tensor(zero_point), bits=8, symmetric=False))
        codes = quantize_unsigned(x, s, code_range(8, True))
        assert torch.equal(codes.int() - 128, quantize_affine(x, s, bits=8, symmetric=True).int())


@given(batches(), st.sampled_from((1, 5, 64)), st.booleans())
def test_blocks_make_no_difference(batch, limit, per_token):
    x = batch[0] if batch[0].dtype != torch.float64 else batch[0].float()
    if per_token:
        x = x.reshape(-1, x.shape[-1])
    scale = randn(len(x), 1).abs() + 0.01 if per_token else torch.tensor(0.3)
    wanted = quantize_affine(x, scale, torch.full_like(scale, 77, dtype=torch.int32), bits=8, symmetric=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(integer_linear_module, "_BLOCK_ELEMENTS", limit)
        codes = quantize_unsigned(x, scale, code_range(8, False, 77))
    assert torch.equal(codes, wanted)


def test_layout_is_kept():
    x = randn(2, 3, 5, 7).to(memory_format=torch.channels_last)
    codes = quantize_unsigned(x, torch.tensor(0.1), code_range(8, False, 3))
    assert codes.is_contiguous(memory_format=torch.channels_last)


@needs_kernel
@settings(deadline=None)
@given(
    st.lists(st.integers(1, 9), max_size=2),
    st.integers(1, 70),
    st.integers(1, 37),
    st.sampled_from((0, 1, 37, 128, 254, 255)),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**16),
)
def test_static_product_is_exact(lead, k, n, zero_point, symmetric, per_channel, has_bias, seed):
    x = randn(*lead, k, seed=seed) * 3.0  # part of it beyond the grid
    w = random_codes(n, k, seed=seed)
    w_scale = randn(n if per_channel else 1, seed=seed + 1) * 0.01  # both signs
    bias = randn(n, seed=seed + 2) if has_bias else None
    scale, codes = torch.tensor(0.031), code_range(8, symmetric, 0 if symmetric else zero_point)
    result = integer_linear(x, scale, codes, pack_linear(w, w_scale), bias, scale.item())
    zero = None if symmetric else torch.tensor(zero_point)
    x_codes = quantize_affine(x, scale, zero, bits=8, symmetric=symmetric).long() - (0 if symmetric else zero_point)
    assert_exact(result, x_codes @ w.long().T, scale.double() * w_scale.double(), bias)
    assert result.shape == (*lead, n)


@needs_kernel
@settings(deadline=None)
@given(
    st.lists(st.integers(1, 9), max_size=2), st.integers(1, 70), st.integers(1, 37), st.integers(2, 8), st.booleans(),
    st.sampled_from((1e-30, 1e-3, 1.0, 1e20)), st.integers(0, 2**16),
)  # fmt: skip
def test_per_token_product_is_exact(lead, k, n, bits, has_bias, size, seed):
    x = randn(*lead, k, seed=seed) * torch.exp2(torch.arange(k) % 5) * size
    x.view(-1, k)[0] = 0.0
    w, w_scale = random_codes(n, k, seed=seed), randn(n, seed=seed + 1) * 0.01
    bias = randn(n, seed=seed + 2) if has_bias else None
    rows = x.reshape(-1, k)
    scale, _ = choose_scale_zero_point(rows.amin(1, True), rows.amax(1, True), bits=bits, symmetric=True)
    x_codes = quantize_affine(rows, scale, bits=bits, symmetric=True).long()
    result = integer_linear_per_token(x, bits, pack_linear(w, w_scale), bias)
    assert_exact(result.reshape(-1, n), x_codes @ w.long().T, scale.double() * w_scale.double(), bias)
    assert result.shape == (*lead, n)


@needs_kernel
def test_the_longest_sum_does_not_overflow():
    x, w = torch.full((2, MAX_TERMS), 300.0), torch.full((3, MAX_TERMS), -128, dtype=torch.int8)
    one = torch.tensor(1.0)
    result = integer_linear(x, one, code_range(8, False, 0), pack_linear(w, one), None, 1.0)
    assert (result.long() == float(torch.tensor(-255.0 * 128 * MAX_TERMS))).all()


@needs_kernel
def test_a_nan_counts_as_zero_on_a_fixed_grid_and_spoils_its_token_on_a_dynamic_one():
    x = randn(3, 8)
    zeroed = x.clone()
    x[1, 4], zeroed[1, 4] = math.nan, 0.0
    weight, scale = pack_linear(random_codes(5, 8), torch.tensor(0.1)), torch.tensor(0.02)
    for codes in (code_range(8, False, 77), code_range(8, True)):
        both = [integer_linear(t, scale, codes, weight, None, scale.item()) for t in (x, zeroed)]
        assert torch.equal(*both)
    dynamic = integer_linear_per_token(x, 8, weight, None)
    assert dynamic[1].isnan().all()
    assert torch.equal(dynamic[[0, 2]], integer_linear_per_token(zeroed, 8, weight, None)[[0, 2]])


@pytest.mark.parametrize("bits", [1, 9])
def test_bits_that_do_not_fit_a_byte(bits):
    with pytest.raises(ValueError, match=f"bits={bits} is not allowed"):
        code_range(bits, True)

"""Float inputs times integer weights against float64, within the bound that the module states."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensors import DENORMAL, LARGEST, randn
from torch.nn import functional as F

from lightning_qat.ops import digit_linear as digit_linear_module
from lightning_qat.ops.digit_linear import digit_linear, digits_are_exact, digits_pay, pack_digits
from lightning_qat.ops.integer_linear import MAX_TERMS

pytestmark = pytest.mark.skipif(not digits_are_exact(), reason="this CPU has no exact integer kernel")


def random_codes(*shape, seed=0):
    return torch.randint(-128, 128, shape, generator=torch.Generator().manual_seed(seed)).to(torch.int8)


def exact_weight(values, scale, group_size):
    """``[N, K]`` in float64."""
    n, k = values.shape
    return (values.double().view(n, -1, group_size or k) * scale.double().view(-1, scale.numel() // n or 1, 1)).view(
        n, k
    )


def assert_close(got, x, weight, bias, group_size=None):
    """The bound of the module's docstring: fixed point, and one float32 rounding for each step and group."""
    k = weight.shape[1]
    rows, size = x.double().reshape(-1, k), group_size or k
    bias = torch.zeros(()) if bias is None else bias.double()
    wanted = rows @ weight.T + bias
    magnitudes = rows.abs() @ weight.abs().T
    largest = rows.abs().view(len(rows), -1, size).amax(2)
    fixed_point = 2.0**-30 * largest @ weight.abs().view(len(weight), -1, size).sum(2).T
    rounding = 2.0**-24 * (2 * (8 + k // size) * magnitudes + wanted.abs())
    error = (got.double().reshape(wanted.shape) - wanted).abs()
    assert (error <= fixed_point + rounding + 2 * DENORMAL).all()
    assert got.shape == (*x.shape[:-1], len(weight))


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.integers(1, 5), max_size=2), st.integers(1, 7), st.sampled_from((1, 2, 3, 16, 40)),
    st.integers(1, 19), st.sampled_from(("tensor", "channel", "group")), st.booleans(),
    st.integers(-148, 110), st.integers(0, 60), st.integers(-60, 6), st.integers(0, 2**16),
)  # fmt: skip
def test_the_error_is_within_the_bound(lead, groups, size, n, granularity, has_bias, power, spread, w_power, seed):
    """Over the whole range of float32, elements of one token ``2**spread`` apart, denormals among them."""
    k, group_size = groups * size, size if granularity == "group" else None
    x = randn(*lead, k, seed=seed).double() * torch.exp2(power - (torch.arange(k) * 7 % (spread + 1)).double())
    x = x.float()
    values = random_codes(n, k, seed=seed)
    shape = {"tensor": (1,), "channel": (n,), "group": (n, groups)}[granularity]
    scale = randn(*shape, seed=seed + 1) * 2.0**w_power  # both signs
    bias = randn(n, seed=seed + 2) * 2.0 ** max(power + w_power, -149) if has_bias else None
    weight = exact_weight(values, scale.expand(n) if granularity == "tensor" else scale, group_size)
    assert_close(digit_linear(x, pack_digits(values, scale, group_size), bias), x, weight, bias, group_size)


@pytest.mark.parametrize("group_size", [None, 32, 128])
@pytest.mark.parametrize("outlier", [1.0, 1e3])
def test_no_worse_than_a_float_product(group_size, outlier):
    """Both against float64, the worst of many outputs: also beside one input a thousand times larger."""
    n, k = 512, 1024
    x, values = randn(8, k), random_codes(n, k, seed=1)
    x[:, 5] *= outlier
    scale = randn(n, 1 if group_size is None else k // group_size, seed=2).abs() * 0.01
    weight, bias = exact_weight(values, scale, group_size), randn(n, seed=3)
    wanted = x.double() @ weight.T + bias.double()
    got = digit_linear(x, pack_digits(values, scale if group_size else scale.view(-1), group_size), bias)
    error = (got.double() - wanted).abs().max()
    assert error <= (F.linear(x, weight.float(), bias).double() - wanted).abs().max()


@pytest.mark.parametrize(
    "values",
    [
        [1.0],
        [-1.0, 2.0**-23],
        [LARGEST, -LARGEST],
        [DENORMAL, 0.0],
        [-DENORMAL] * 3,
        [2.0**-126, DENORMAL],
        [0.0, -0.0],
        [1.0, 2.0**-30, -(2.0**-31)],
        [2.0**24 - 1],
    ],
)
def test_single_values_come_back(values):
    """A diagonal weight of 1: each output is an input, exactly but for what is below ``2**-30`` of the largest."""
    x = torch.tensor(values)
    got = digit_linear(x, pack_digits(torch.eye(len(values)).to(torch.int8), torch.ones(1)), None)
    assert ((got - x).abs() <= 2.0**-30 * x.abs().max()).all()
    assert torch.equal(got[:1], x[:1])


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded", "reversed"])
def test_any_layout_of_the_input(layout):
    x = {
        "transposed": lambda: randn(12, 5).t(),
        "strided": lambda: randn(5, 12, 2)[..., 1],
        "expanded": lambda: randn(1, 12).expand(5, 12),
        "reversed": lambda: randn(12, 3, 5).permute(2, 1, 0),
    }[layout]()
    for group_size in (None, 4):
        weight = pack_digits(random_codes(7, 12), randn(7, 3).abs()[:, : 3 if group_size else 1], group_size)
        assert torch.equal(digit_linear(x, weight, None), digit_linear(x.contiguous(), weight, None))


@pytest.mark.parametrize("groups", [2, 3, 5, 8])
def test_blocks_of_tokens_and_widths_of_products_are_free(groups, monkeypatch):
    x, values, scale = randn(9, groups * 8), random_codes(11, groups * 8), randn(11, groups)
    monkeypatch.setattr(digit_linear_module, "_TOKEN_GROUPS", 2 * groups)
    assert_close(digit_linear(x, pack_digits(values, scale, 8), None), x, exact_weight(values, scale, 8), None, 8)
    monkeypatch.setattr(digit_linear_module, "_COLUMNS", 8)
    assert_close(digit_linear(x, pack_digits(values, scale, 8), None), x, exact_weight(values, scale, 8), None, 8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype):
    x, values, scale = randn(3, 24).to(dtype), random_codes(5, 24), randn(5)
    got = digit_linear(x, pack_digits(values, scale), None)
    assert got.dtype is dtype
    assert torch.equal(got, digit_linear(x.float(), pack_digits(values, scale), None).to(dtype))


def test_the_longest_sum_does_not_overflow():
    x, values = torch.full((2, MAX_TERMS), -1.9999999), torch.full((3, MAX_TERMS), -128, dtype=torch.int8)
    assert_close(digit_linear(x, pack_digits(values, torch.ones(1)), None), x, values.double(), None)
    with pytest.raises(ValueError, match=f"use group_size={MAX_TERMS} or less"):
        pack_digits(torch.ones(1, MAX_TERMS + 1, dtype=torch.int8), torch.ones(1))


def test_a_token_has_no_part_in_the_error_of_another():
    values, scale = random_codes(7, 12), randn(7, 3)
    x = randn(3, 12) * torch.tensor([[1.0], [1e30], [1e-30]])
    assert_close(digit_linear(x, pack_digits(values, scale, 4), None), x, exact_weight(values, scale, 4), None, 4)


def test_where_it_pays():
    assert digits_pay(1, (4096, 4096), 128)
    assert digits_pay(256, (4096, 4096), None)
    assert digits_pay(256, (4096, 4096), 256)
    assert digits_pay(32, (4096, 4096), 128)
    assert not digits_pay(33, (4096, 4096), 128)
    assert not digits_pay(1, (64, 64), None)


def test_nothing_is_kept_in_float():
    weight = pack_digits(random_codes(64, 256), randn(64, 8), 32)
    assert all(part.codes is None for part in weight.parts)
    held = [part.packed for part in weight.parts] + [weight.scale]
    assert sum(t.untyped_storage().nbytes() for t in held if t.layout == torch.strided) <= 64 * 256 + 64 * 8 * 4
    assert math.prod(weight.scale.shape) == 64 * 8

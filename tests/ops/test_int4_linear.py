"""Packed 4-bit products: never further from exact than a weight dequantized to bfloat16."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensors import randn
from torch import nn
from torch.nn import functional as F

import lightning_qat as lq
from lightning_qat.native.library import without_native
from lightning_qat.nn import linear
from lightning_qat.ops.int4_linear import INT4_GROUPS, int4_is_exact, int4_linear, pack_int4

pytestmark = pytest.mark.skipif(not int4_is_exact(), reason="no packed int4 kernel here")


@pytest.fixture(autouse=True)
def _without_native():
    with without_native():  # what computes where there is no compiler, and more tokens
        yield


def weight(rows, groups, size, symmetric, seed=0):
    generator = torch.Generator().manual_seed(seed)
    low, high = (-8, 8) if symmetric else (0, 16)
    codes = torch.randint(low, high, (rows, groups * size), generator=generator).to(
        torch.int8 if symmetric else torch.uint8
    )
    scale = torch.rand(rows, groups, generator=generator) * 0.01 + 1e-3
    zero = None if symmetric else torch.randint(0, 16, (rows, groups), generator=generator, dtype=torch.int32)
    values = codes.double().view(rows, groups, size)
    if zero is not None:
        values = values - zero.double().unsqueeze(2)
    return codes, scale, zero, (values * scale.double().unsqueeze(2)).view(rows, -1)


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(INT4_GROUPS),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 9),
    st.booleans(),
    st.integers(0, 999),
)
def test_the_error_is_a_rounding_of_the_result_to_bfloat16(size, groups, rows16, tokens, symmetric, seed):
    """The witness is float64. The bound: two roundings to bfloat16, and scales off by 2**-17 of themselves."""
    codes, scale, zero, values = weight(16 * rows16, groups, size, symmetric, seed)
    x = randn(tokens, groups * size, seed=seed).bfloat16()
    exact = x.double() @ values.t()
    result = int4_linear(x, pack_int4(codes, scale, zero, size), None)
    magnitudes = x.double().abs() @ values.abs().t()
    zero_part = 0 if zero is None else (8 - zero.double()).abs().amax() * scale.amax() * x.double().abs().sum(1, True)
    bound = exact.abs() * 2.0**-7 + (magnitudes + zero_part) * 2.0**-15
    assert ((result.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_it_is_nearer_to_exact_than_the_reference(symmetric):
    codes, scale, zero, values = weight(256, 8, 128, symmetric)
    x = randn(64, 8 * 128).bfloat16()
    exact = x.double() @ values.t()
    ours = int4_linear(x, pack_int4(codes, scale, zero, 128), None).double() - exact
    reference = F.linear(x, values.bfloat16()).double() - exact
    assert ours.square().mean() < reference.square().mean()


def converted(plan, rows=32, columns=256):
    torch.manual_seed(0)
    layer = nn.Linear(columns, rows)
    model = lq.prepare(nn.Sequential(layer), plan)
    return lq.convert(model)[0].bfloat16()


PLANS = {
    "symmetric": lq.QATConfig("int4", bits=4, group_size=128, activation_bits=None),
    "asymmetric": lq.QATConfig("int4", bits=4, group_size=64, symmetric=False, activation_bits=None),
}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("shape", [(1, 256), (5, 256), (2, 3, 256), (256,)])
def test_a_bfloat16_layer_uses_it(plan, shape):
    layer = converted(PLANS[plan])
    assert layer.execution == "packed int4, weight-only"
    x = randn(*shape).bfloat16()
    with torch.no_grad():
        result = layer(x)
        expected = F.linear(x.double(), lq.schemes.get_scheme("int4").dequantize(
            layer.codes, layer.weight_scale, layer.weight_zero_point, layer.weight_format, torch.float64
        ), layer.bias.double())  # fmt: skip
    assert result.dtype == torch.bfloat16
    assert result.shape == expected.shape
    torch.testing.assert_close(result.double(), expected, rtol=2**-7, atol=2**-8)


def test_many_tokens_are_multiplied_by_the_dequantized_weight(monkeypatch):
    layer, rows = converted(PLANS["symmetric"]), []
    multiply = linear.int4_linear
    monkeypatch.setattr(linear, "int4_linear", lambda x, *rest: rows.append(len(x)) or multiply(x, *rest))
    x = randn(17, 256).bfloat16()
    with torch.no_grad():
        many, few = layer(x), layer(x[:16])
    assert rows == [16]
    assert torch.equal(many, F.linear(x, layer.weight, layer.bias))
    torch.testing.assert_close(many[:16], few, rtol=2**-6, atol=2**-6)


def test_not_a_number_and_infinity_stay_in_their_token():
    layer, x = converted(PLANS["symmetric"]), randn(3, 256).bfloat16()
    with torch.no_grad():
        expected = layer(x)
        x[1, 7] = float("nan")
        x[2, 9] = float("inf")
        result = layer(x)
    assert torch.equal(result[0], expected[0])
    assert result[1].isnan().all()
    assert not result[2].isfinite().any()


@pytest.mark.parametrize(("rows", "columns", "group"), [(17, 256, 128), (32, 240, 16), (32, 512, 512)])
def test_other_shapes_stay_where_they_were(rows, columns, group):
    config = lq.QATConfig("int4", bits=4, group_size=group, activation_bits=None)
    assert "packed int4" not in converted(config, rows, columns).execution


def test_float32_layers_and_changed_codes():
    layer = converted(PLANS["symmetric"])
    x = randn(2, 256).bfloat16()
    with torch.no_grad():
        before = layer(x)
        layer.weight_scale.mul_(2)
        after = layer(x)
        layer.float()
        assert "packed int4" not in layer.execution
    bias = layer.bias
    torch.testing.assert_close((after.float() - bias), 2 * (before.float() - bias), rtol=0.02, atol=0.02)

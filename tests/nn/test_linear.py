"""Converted Linears beside float64: weight-only with integers, and ranges per tensor found at run time."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensors import randn
from torch import nn
from torch.nn import functional as F

import lightning_qat as lq
from lightning_qat.native.library import without_native
from lightning_qat.native.linear_int8 import has_linear_int8
from lightning_qat.nn import linear as linear_module
from lightning_qat.nn.execution import weight_values
from lightning_qat.ops.affine import choose_scale_zero_point, quantize_affine
from lightning_qat.ops.bag_linear import bags_are_exact
from lightning_qat.ops.digit_linear import digits_are_exact
from lightning_qat.ops.int4_linear import int4_is_exact

pytestmark = pytest.mark.skipif(not digits_are_exact(), reason="no exact integer kernel here")

KERNEL = "native" if has_linear_int8() else "onednn"


def converted(linear, plan):
    return lq.convert(lq.prepare(nn.Sequential(copy.deepcopy(linear)), plan))[0]


def weight_only(**settings):
    return lq.QATConfig(settings.pop("scheme", "int8"), activation_bits=None, **settings)


@pytest.fixture
def digits(monkeypatch):
    """The number of calls computed from digits, which here pay at any size."""
    calls, compute = [], linear_module.digit_linear
    monkeypatch.setattr(linear_module, "digits_pay", lambda *_: True)
    monkeypatch.setattr(linear_module, "digit_linear", lambda *a: calls.append(1) or compute(*a))
    with without_native():  # what computes where there is no compiler, and more tokens
        yield calls


def reference(layer, x):
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(linear_module, "takes_integers", lambda *_: False)
        return layer(x)


def exact(layer, x):
    """In float64, of the codes and scales that the layer holds."""
    values, scale = weight_values(layer).double(), layer.weight_scale.double()
    weight = (values.reshape(scale.numel(), -1) * scale.reshape(-1, 1)).view(values.shape)
    return x.double() @ weight.T + (0 if layer.bias is None else layer.bias.double())


WEIGHTS = {
    "int8 per channel": ("int8_weight_only", 0),
    "int8 per tensor": (weight_only(), 0),
    "w4a16": ("w4a16", 128),
    **{f"{bits} bits": (weight_only(bits=bits, group_size=32), 32) for bits in range(2, 9)},
    **{f"asymmetric {b} bits": (weight_only(bits=b, symmetric=False, group_size=64), 64) for b in range(2, 8)},
    "asymmetric, per tensor": (weight_only(bits=5, symmetric=False), 0),
    "asymmetric, per channel": (weight_only(bits=7, symmetric=False, per_channel=True), 0),
}


@pytest.mark.parametrize("shape", [(1, 640), (640,), (2, 3, 640), (7, 640)])
@pytest.mark.parametrize("weight", WEIGHTS)
def test_weight_only_is_as_near_to_float64_as_float(weight, shape, digits):
    torch.manual_seed(0)
    linear, x = nn.Linear(640, 61), torch.randn(shape)
    layer = converted(linear, WEIGHTS[weight][0])
    assert layer.execution == "onednn int8, weight-only"
    got, wanted, by_float = layer(x), exact(layer, x), reference(layer, x)
    assert len(digits) == 1
    assert got.shape == by_float.shape
    assert got.dtype is torch.float32
    # The mean over outputs: the largest of a few is chance.
    assert (got - wanted).square().mean() <= 4 * (by_float - wanted).square().mean()


@settings(deadline=None)
@given(
    st.integers(1, 9), st.integers(1, 40), st.integers(1, 23), st.booleans(), st.integers(2, 8), st.booleans(),
    st.sampled_from(("tensor", "channel", "group")), st.integers(0, 2**16),
)  # fmt: skip
def test_weight_only_of_any_shape(tokens, k, n, has_bias, bits, symmetric, granularity, seed):
    torch.manual_seed(seed)
    linear, x = nn.Linear(k, n, bias=has_bias), torch.randn(tokens, k)
    group_size = next(d for d in (8, 5, 3, 2, 1) if k % d == 0) if granularity == "group" else None
    fits = {"bits": bits, "symmetric": symmetric or bits == 8}
    layer = converted(linear, weight_only(**fits, per_channel=granularity == "channel", group_size=group_size))
    with pytest.MonkeyPatch.context() as patch, without_native():
        patch.setattr(linear_module, "digits_pay", lambda *_: True)
        assert layer.execution == "onednn int8, weight-only"
        got = layer(x)
    bound = 2.0**-20 * (x.double().abs() @ layer.weight.double().abs().T + 1.0)
    assert ((got - exact(layer, x)).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("plan", ["int8_weight_only", "w4a16"])
def test_half_precision_is_nearer_to_exact_than_the_reference(dtype, plan, digits):
    torch.manual_seed(0)
    layer = converted(nn.Linear(256, 64), plan).to(dtype)
    x = torch.randn(16, 256).to(dtype)
    got, wanted, by_float = layer(x), exact(layer, x), reference(layer, x)
    packed = (dtype, plan) == (torch.bfloat16, "w4a16") and int4_is_exact()
    assert len(digits) == (0 if packed else 1)
    assert ("packed int4" in layer.execution) == packed
    assert got.dtype is dtype
    assert (got - wanted).square().sum() <= (by_float - wanted).square().sum()


def test_nan_and_infinity_take_the_reference_and_spare_other_tokens(digits):
    layer, x = converted(nn.Linear(32, 8), "int8_weight_only"), randn(5, 32)
    x[1, 3], x[2, 0], x[3, 0], x[3, 1] = math.nan, math.inf, math.inf, -math.inf
    got = layer(x)
    assert not digits
    torch.testing.assert_close(got, reference(layer, x), rtol=0, atol=0, equal_nan=True)
    assert not got[1:4].isfinite().any()
    assert got[[0, 4]].isfinite().all()


def test_changes_in_place_and_empty_inputs(digits):
    layer, x = converted(nn.Linear(64, 16), weight_only(bits=4, group_size=16)), randn(3, 64)
    before = layer(x)
    layer.weight_scale.mul_(2.0)
    torch.testing.assert_close(layer(x) - layer.bias, 2 * (before - layer.bias))
    layer.weight_packed.bitwise_not_()
    torch.testing.assert_close(layer(x).double(), exact(layer, x), rtol=1e-5, atol=1e-5)
    assert len(digits) == 3
    assert layer(x[:0]).shape == (0, 16)
    assert len(digits) == 3
    assert set(copy.deepcopy(layer).state_dict()) == set(layer.state_dict())


REASONS = {
    "asymmetric 8-bit weights": (lambda: nn.Linear(8, 4), weight_only(symmetric=False)),
    "12-bit weights": (lambda: nn.Linear(8, 4), weight_only(bits=12)),
    "weight-only, too small to gain": (lambda: nn.Linear(8, 4), "int8_weight_only"),
    "weight-only": (lambda: nn.Conv2d(2, 3, 2), "int8_weight_only"),
}


@pytest.mark.parametrize("reason", REASONS)
def test_the_reference_says_why(reason):
    build, plan = REASONS[reason]
    assert converted(build(), plan).execution == f"reference: {reason}"


def test_many_tokens_of_a_weight_in_groups_take_the_reference(monkeypatch):
    layer = converted(nn.Linear(1024, 1024), "w4a16")
    with without_native():
        assert layer.execution == ("fbgemm int4, weight-only" if bags_are_exact() else "onednn int8, weight-only")
    assert torch.equal(layer(randn(4096, 1024)), reference(layer, randn(4096, 1024)))
    assert not torch.equal(layer(randn(1, 1024)), reference(layer, randn(1, 1024)))


# --- one range for the whole input, found at run time ------------------------------------------------


def per_tensor(**settings):
    return lq.QATConfig("int8", per_channel=True, activation_dynamic="tensor", **settings)


@pytest.mark.parametrize("shape", [(5, 96), (2, 3, 96), (96,)])
@pytest.mark.parametrize("bits", [8, 5])
@pytest.mark.parametrize("symmetric", [False, True])
def test_codes_of_a_range_per_tensor_are_those_of_the_reference_quantizer(shape, bits, symmetric):
    torch.manual_seed(0)
    linear = nn.Linear(96, 31)
    layer = converted(linear, per_tensor(activation_bits=bits, activation_symmetric=symmetric))
    assert layer.execution == f"{KERNEL} int8 per tensor, dynamic"
    for x in (torch.randn(shape) + 2, torch.randn(shape) * 1e-3 - 1, torch.rand(shape), torch.zeros(shape)):
        scale, zero = choose_scale_zero_point(x.min(), x.max(), bits=bits, symmetric=symmetric)
        codes = quantize_affine(x, scale, zero, bits=bits, symmetric=symmetric).double()
        values = (codes - (0 if zero is None else zero)) * scale.double()
        wanted = exact(layer, values)
        assert ((layer(x) - wanted).abs() <= 1e-6 * (values.abs() @ layer.weight.double().abs().T + 1)).all()
        torch.testing.assert_close(reference(layer, x).double(), wanted, rtol=1e-5, atol=1e-5)


def test_a_range_per_tensor_is_trained_as_it_ships(tmp_path):
    torch.manual_seed(0)
    linear = nn.Linear(24, 8)
    x = torch.randn(6, 24)
    prepared = lq.prepare(nn.Sequential(copy.deepcopy(linear)), "int8_dynamic_per_tensor")
    values = x.clone().requires_grad_()
    trained = prepared(values)
    trained.sum().backward()
    scale, zero = choose_scale_zero_point(x.min(), x.max(), bits=8, symmetric=False)
    grid = lq.fake_quantize(x, scale, zero, bits=8, symmetric=False)
    weight = prepared[0].quantized_weight()
    torch.testing.assert_close(trained, F.linear(grid, weight, linear.bias), rtol=0, atol=0)
    torch.testing.assert_close(values.grad, weight.sum(0).expand(6, 24))  # all within the range
    layer = lq.convert(prepared, verify=[x])
    assert lq.parity_report(layer) is not None
    lq.save_quantized(layer, tmp_path / "model")
    loaded = lq.load_quantized(tmp_path / "model", nn.Sequential(nn.Linear(24, 8)))
    assert loaded[0].input_format == layer[0].input_format
    assert loaded[0].input_format.dynamic_range == "tensor"
    assert torch.equal(loaded(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_range_per_tensor_in_half_precision(dtype):
    layer = converted(nn.Linear(64, 16), "int8_dynamic_per_tensor").to(dtype)
    x = randn(5, 64).to(dtype)
    got, wanted = layer(x), exact(layer, layer.quantized_input(x.float()))
    assert got.dtype is dtype
    assert (got - wanted).square().sum() <= (reference(layer, x) - wanted).square().sum()


def test_a_range_that_is_no_range():
    layer, x = converted(nn.Linear(16, 4), "int8_dynamic_per_tensor"), randn(3, 16)
    x[1, 2] = math.nan
    assert layer(x).isnan().all()
    assert reference(layer, x).isnan().all()
    x[1, 2] = math.inf
    assert torch.equal(layer(x).isnan(), reference(layer, x).isnan())
    assert layer(x[:0]).shape == (0, 4)


def test_a_convolution_with_a_range_per_tensor():
    model, x = nn.Sequential(nn.Conv2d(3, 5, 3)), randn(2, 3, 7, 7) * torch.tensor([1.0, 10.0]).view(2, 1, 1, 1)
    prepared = lq.prepare(model, "int8_dynamic_per_tensor")
    grid = prepared[0].quantized_input(x)
    assert len(grid.unique()) <= 256
    assert len(grid[0].unique()) < 50  # the range is the other sample's
    torch.testing.assert_close(lq.convert(prepared)(x), prepared.eval()(x))

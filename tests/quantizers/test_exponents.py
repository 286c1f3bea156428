"""Learned scales on a CPU: single numbers and compiled kernels have the bits of PyTorch's operations."""

import contextlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_qat.native import fake_quantize as native
from lightning_qat.native.library import without_native
from lightning_qat.ops.fake_quantize import fake_quantize_op
from lightning_qat.quantizers.exponents import scale_where_right, zero_point_where_right
from lightning_qat.quantizers.scale_gradients import gradients_of_numbers, parameter_gradients, slope_of


def equal_bits(ours, theirs):
    return torch.equal(ours.nan_to_num(7.0), theirs.nan_to_num(7.0))


@pytest.mark.parametrize("scale", [1e-37, 0.01, 1.0, 40.0])
@pytest.mark.parametrize("grad", [-3.7e4, -1e-9, 0.0, 2.5, 3e38, 1e39, math.inf, math.nan])
@pytest.mark.parametrize("offset", [None, -0.1, 0.0, 0.3, 1.0])
def test_gradients_of_numbers_have_the_bits_of_their_tensors(grad, scale, offset):
    step, place = torch.tensor([scale]), None if offset is None else torch.tensor([offset])
    found = gradients_of_numbers(grad, 0.7 * grad, step, None if place is None else place.item(), 0.0371, 255)
    of_both = torch.tensor([[grad], [0.7 * grad]], dtype=torch.float64).float()
    expected = parameter_gradients(of_both[0], None if offset is None else of_both[1], step, place, 0.0371, 255)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or equal_bits(ours, theirs)


@pytest.mark.skipif(not native.has_kernels(torch.empty(1)), reason="no compiled kernels")
@pytest.mark.parametrize("huge", [1.0, 1e30, 3e38, math.inf, math.nan])
@pytest.mark.parametrize("channels", [1, 3, 17])
def test_the_kernels_sums_of_one_and_of_several_scales(huge, channels):
    torch.manual_seed(channels)
    x, grad, values = torch.randn(channels, 20_001), torch.randn(channels, 20_001), torch.empty(channels, 20_001)
    grad[0, 5] = huge
    steps = torch.linspace(0.01, 0.03, channels)
    exponents, layout = torch.empty(channels), (1, channels, 20_001)
    sums = native.learned_sums(grad, x, None, layout, steps, None, -8, 7, factor=0.37, exponents=exponents)
    assert equal_bits(exponents, sums[:, 0].float() * 0.37 / slope_of(steps))
    one, zero = torch.tensor([0.02]), torch.tensor([3], dtype=torch.int32)
    of_scale, of_zero = native.learned_sums_of_one(grad, x, None, one, zero, 0, 15, values=values)
    expected = native.learned_sums(grad, x, None, (1, 1, x.numel()), one, zero, 0, 15)
    assert equal_bits(torch.tensor([[of_scale, of_zero]], dtype=torch.float64), expected)
    assert torch.equal(values, fake_quantize_op(x, one, zero, 0, 15, -1, 0))


@pytest.mark.parametrize("wrong", [None, -126.5, 127.5, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("count", [1, 2, 33])
@pytest.mark.parametrize("native_kernels", [True, False])
def test_scales_of_a_cpu_are_those_of_operations_or_none(wrong, count, native_kernels):
    p = torch.linspace(-126.0, 127.0, count)
    expected = ((p * 2.0**23).to(torch.int32) + 0x3F800000).view(torch.float32)
    if wrong is not None:
        p[count // 2] = wrong
    with contextlib.nullcontext() if native_kernels else without_native():
        found = scale_where_right(p, (count, 1))
    assert found is None if wrong is not None else torch.equal(found, expected.view(count, 1))


@settings(deadline=None)
@given(st.floats(-0.5, 1.5, width=32), st.integers(2, 16))
def test_one_zero_point_is_that_of_operations(offset, bits):
    found = zero_point_where_right(torch.tensor([offset]), bits, ())
    expected = torch.round(torch.tensor(offset).clamp(0.0, 1.0) * float(2**bits - 1)).to(torch.int32)
    assert found.dtype == torch.int32
    assert torch.equal(found, expected)


@pytest.mark.parametrize("wrong", [math.inf, -math.inf, math.nan])
def test_a_zero_point_that_is_none_is_told(wrong):
    assert zero_point_where_right(torch.tensor([wrong]), 8, ()) is None
    assert zero_point_where_right(torch.tensor([0.5, wrong]), 8, (2,)) is None


def test_exponents_of_another_dtype_are_read_in_float32():
    """``load_state_dict(assign=True)`` may leave such: 2**23 is not a float16."""
    exponents = torch.tensor([-5.5, 1.25, 2.0])
    found = scale_where_right(exponents.half(), (3,))
    assert torch.equal(found, scale_where_right(exponents, (3,)))


def test_exponents_are_asked_for_of_one_outer_dimension_only():
    x, out = torch.randn(2, 3, 4), torch.empty(3)
    grid = (2, 3, 4), torch.ones(3), None, -8, 7
    assert native.learned_sums(x, x, None, *grid, factor=1.0, exponents=out) is None

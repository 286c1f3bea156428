"""Ranges to grids, values to codes and back: against the fake quantizer and plain arithmetic."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_qat.ops.affine import choose_scale_zero_point, codes_dtype, dequantize_affine, quantize_affine
from lightning_qat.ops.fake_quantize import fake_quantize, quant_range

MAX = torch.finfo(torch.float32).max
TINY = torch.finfo(torch.float32).tiny

#: Options and the shape of the scale for x of shape [4, 6, 10].
GRANULARITIES: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "tensor": ({}, ()),
    "channel": ({"axis": 1}, (6,)),
    "group": ({"group_size": 12}, (4, 5)),
    "token": ({}, (4, 6, 1)),
}

bits_and_symmetry = st.tuples(st.integers(2, 16), st.booleans())
ranges = st.lists(
    st.tuples(st.floats(-MAX, MAX, width=32), st.floats(-MAX, MAX, width=32)).map(sorted), min_size=1, max_size=8
)


# --- codes ----------------------------------------------------------------------------------------


@given(
    st.sampled_from(sorted(GRANULARITIES)),
    bits_and_symmetry,
    st.sampled_from((torch.float32, torch.bfloat16, torch.float16, torch.float64)),
    st.integers(0, 2**32),
    st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_dequantized_codes_equal_fake_quantize_exactly(
    granularity: str, grid: tuple[int, bool], dtype: torch.dtype, seed: int, transposed: bool
) -> None:
    options, shape = GRANULARITIES[granularity]
    bits, symmetric = grid
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(4, 6, 10, generator=generator) * 3).to(dtype)
    x.view(-1)[:5] = torch.tensor([float("inf"), -float("inf"), 0.0, -0.0, 1e-30], dtype=dtype)
    if transposed:
        x = x.transpose(0, 2).contiguous().transpose(0, 2)
    low, high = torch.rand(shape, generator=generator) * -3, torch.rand(shape, generator=generator) * 3
    scale, zero_point = choose_scale_zero_point(low, high, bits=bits, symmetric=symmetric)
    codes = quantize_affine(x, scale, zero_point, bits=bits, symmetric=symmetric, **options)
    values = dequantize_affine(codes, scale, zero_point, dtype=dtype, **options)
    assert torch.equal(values, fake_quantize(x, scale, zero_point, bits=bits, symmetric=symmetric, **options))
    assert codes.dtype == codes_dtype(bits, symmetric)
    assert codes.stride() == values.stride() == x.stride()
    quant_min, quant_max = quant_range(bits, symmetric)
    assert quant_min <= int(codes.min())
    assert int(codes.max()) <= quant_max


@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_equal_numpy(symmetric: bool) -> None:
    x, scale = torch.randn(64, 100), torch.rand(64) / 20 + 0.01
    zero_point = None if symmetric else torch.arange(64, dtype=torch.int32) * 4
    codes = quantize_affine(x, scale, zero_point, bits=8, symmetric=symmetric, axis=0)
    zero = 0 if zero_point is None else zero_point.numpy()[:, None]
    expected = np.clip(np.rint(x.numpy() / scale.numpy()[:, None]) + zero, *quant_range(8, symmetric))
    assert np.array_equal(codes.numpy(), expected)


@pytest.mark.parametrize(
    ("bits", "signed", "dtype"),
    [
        (2, True, torch.int8),
        (8, True, torch.int8),
        (9, True, torch.int16),
        (16, True, torch.int16),
        (2, False, torch.uint8),
        (8, False, torch.uint8),
        (9, False, torch.int32),
        (16, False, torch.int32),
    ],
)
def test_codes_dtype(bits: int, signed: bool, dtype: torch.dtype) -> None:
    assert codes_dtype(bits, signed) == dtype


def test_nan_becomes_the_code_of_zero() -> None:
    x, scale = torch.full((2, 5), float("nan")), torch.ones(2)
    zero_point = torch.tensor([3, 200], dtype=torch.int32)
    assert quantize_affine(x, scale, bits=8, symmetric=True, axis=0).eq(0).all()
    codes = quantize_affine(x, scale, zero_point, bits=8, symmetric=False, axis=0)
    assert codes.tolist() == [[3] * 5, [200] * 5]


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)])
def test_empty(shape: tuple[int, ...]) -> None:
    codes = quantize_affine(torch.ones(shape), torch.ones(()), bits=4, symmetric=True)
    assert codes.shape == shape
    assert codes.dtype == torch.int8
    assert dequantize_affine(codes, torch.ones(()), dtype=torch.float16).dtype == torch.float16


# --- grids ----------------------------------------------------------------------------------------


@given(ranges, bits_and_symmetry)
@settings(max_examples=300, deadline=None)
def test_grid_is_finite_and_covers_the_range(pairs: list[list[float]], grid: tuple[int, bool]) -> None:
    bits, symmetric = grid
    low, high = torch.tensor(pairs).unbind(1)
    scale, zero_point = choose_scale_zero_point(low, high, bits=bits, symmetric=symmetric)
    quant_min, quant_max = quant_range(bits, symmetric)
    assert scale.dtype == torch.float32
    assert scale.shape == low.shape
    assert scale.isfinite().all()
    assert (scale >= TINY).all()
    assert (zero_point is None) == symmetric
    zero = torch.zeros_like(low).double() if zero_point is None else zero_point.double()
    if zero_point is not None:
        assert zero_point.dtype == torch.int32
        assert ((zero_point >= quant_min) & (zero_point <= quant_max)).all()
    # Half a step beyond the end codes still rounds to them; the zero point's own rounding may take another half.
    slack = 0.5 + (0.0 if symmetric else 0.5) + 2e-7 * 2**bits
    assert (low.double() / scale.double() >= quant_min - zero - slack).all()
    assert (high.double() / scale.double() <= quant_max - zero + slack).all()


@pytest.mark.parametrize(
    ("bits", "low", "high", "expected"),
    [(8, -1.0, 2.0, 2.0 / 127), (8, -3.0, 2.0, 3.0 / 127), (4, -3.0, 1.0, 3.0 / 7.5), (16, 1.0, 2.0, 2.0 / 32767)],
)
def test_symmetric_scale(bits: int, low: float, high: float, expected: float) -> None:
    scale, _ = choose_scale_zero_point(torch.tensor(low), torch.tensor(high), bits=bits, symmetric=True)
    assert scale.item() == torch.tensor(expected).item()


@pytest.mark.parametrize(
    ("low", "high", "scale", "zero_point"),
    [(-3.0, 1.0, 4 / 255, 191), (0.5, 1.0, 1 / 255, 0), (-1.0, -0.5, 1 / 255, 255), (-51.0, 204.0, 1.0, 51)],
)
def test_asymmetric_range_contains_zero(low: float, high: float, scale: float, zero_point: int) -> None:
    s, z = choose_scale_zero_point(torch.tensor(low), torch.tensor(high), bits=8, symmetric=False)
    assert s.item() == pytest.approx(scale)
    assert z is not None
    assert z.item() == zero_point


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_extreme_ranges(bits: int, symmetric: bool) -> None:
    low = torch.tensor([0.0, -0.0, -1e-45, -MAX, -MAX, -float("inf"), 1e-42])
    high = torch.tensor([0.0, 0.0, 0.0, MAX, 0.0, float("inf"), 1e-42])
    scale, _ = choose_scale_zero_point(low, high, bits=bits, symmetric=symmetric)
    assert scale[:2].tolist() == [1.0, 1.0]
    assert scale[[2, 6]].tolist() == [TINY, TINY]
    assert scale[3:6].isfinite().all()
    assert (scale[3:6] > MAX / 2**bits / 2).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_ranges_of_other_dtypes(dtype: torch.dtype) -> None:
    low, high = torch.tensor([-1.5, -2.0], dtype=dtype), torch.tensor([2.5, 1.0], dtype=dtype)
    scale, _ = choose_scale_zero_point(low, high, bits=8, symmetric=True)
    assert torch.equal(scale, torch.tensor([2.5, 2.0]) / 127)


def test_inputs_are_left_alone() -> None:
    low, high = torch.tensor([1.0, -2.0]), torch.tensor([2.0, -1.0])
    choose_scale_zero_point(low, high, bits=8, symmetric=False)
    assert low.tolist() == [1.0, -2.0]
    assert high.tolist() == [2.0, -1.0]


# --- tracing and errors ---------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [True, False])
def test_compiled_equals_eager_bit_for_bit(symmetric: bool) -> None:
    def round_trip(x: Tensor) -> tuple[Tensor, Tensor]:
        scale, zero = choose_scale_zero_point(x.amin(dim=1), x.amax(dim=1), bits=8, symmetric=symmetric)
        codes = quantize_affine(x, scale, zero, bits=8, symmetric=symmetric, axis=0)
        return codes, dequantize_affine(codes, scale, zero, axis=0)

    x = torch.randn(37, 211)
    compiled = torch.compile(round_trip, fullgraph=True, backend="inductor" if symmetric else "aot_eager")
    for actual, expected in zip(compiled(x), round_trip(x), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: quantize_affine(torch.ones(3).int(), torch.ones(()), bits=8, symmetric=True),
            "x has dtype torch.int32",
        ),
        (lambda: quantize_affine(torch.ones(3), torch.ones(3), bits=8, symmetric=True), "it takes one element"),
        (
            lambda: quantize_affine(torch.ones(3), torch.ones(()), torch.ones(()), bits=8, symmetric=True),
            "leave it out",
        ),
        (lambda: dequantize_affine(torch.ones(3), torch.ones(())), "codes have dtype torch.float32"),
        (lambda: dequantize_affine(torch.ones(3).int(), torch.ones(()), dtype=torch.int8), "dtype=torch.int8"),
        (lambda: dequantize_affine(torch.ones(3).int(), torch.ones(2), axis=0), r"it takes \(3,\)"),
        (lambda: choose_scale_zero_point(torch.ones(2), torch.ones(3), bits=8, symmetric=True), "must be equal"),
        (lambda: choose_scale_zero_point(torch.ones(2), torch.ones(2), bits=1, symmetric=True), "use 2 to 16"),
    ],
)
def test_errors_name_what_is_allowed(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("bits", [4, 8])
def test_symmetric_ranges_are_widened_to_contain_zero(bits: int) -> None:
    """Ranges on one side of zero, empty ones (no value was seen), infinite ones and NaN, against the definition."""
    ends = (-math.inf, -3.0, -1e-45, 0.0, 2.0, 3e38, math.inf, math.nan)
    low, high = torch.tensor(list(itertools.product(ends, ends))).unbind(1)
    scale, zero_point = choose_scale_zero_point(low, high, bits=bits, symmetric=True)
    assert zero_point is None
    for a, b, found in zip(low.tolist(), high.tolist(), scale.tolist(), strict=True):
        if math.isnan(a) or math.isnan(b):
            assert math.isnan(found)
            continue
        absmax = min(max(-a, b, 0.0), MAX)
        steps = 2 ** (bits - 1) - (1 if bits >= 8 else 0.5)
        expected = max(float(torch.tensor(absmax) / torch.tensor(float(steps))), TINY) if absmax else 1.0
        assert found == expected, (a, b)


def any_float32():
    return st.floats(width=32) | st.sampled_from([0.0, -0.0, 1e-45, 1.1754944e-38, 3.4028234e38])


@given(any_float32(), any_float32(), st.sampled_from([2, 3, 4, 7, 8, 16]), st.booleans())
def test_one_range_has_the_bits_that_it_has_among_several(low, high, bits, symmetric):
    """One range is computed by Python's numbers on a CPU, several by tensor operations."""
    one = choose_scale_zero_point(torch.tensor(low), torch.tensor(high), bits=bits, symmetric=symmetric)
    ranges = torch.tensor([low, 1.0]), torch.tensor([high, 2.0])
    several = choose_scale_zero_point(*ranges, bits=bits, symmetric=symmetric)
    assert one[0].view(torch.int32) == several[0][0].view(torch.int32) or (one[0].isnan() and several[0][0].isnan())
    assert symmetric or torch.equal(one[1], several[1][0])
    assert one[0].shape == ()
    assert one[0].dtype == torch.float32

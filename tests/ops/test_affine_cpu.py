"""Codes found in pieces are those of the definition, and so are values."""

from __future__ import annotations

import math
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensors import DTYPES, batches, randn
from torch._subclasses import FakeTensorMode

from lightning_qat import QuantizationConfig, fake_quantize, quantize
from lightning_qat.native.library import without_native
from lightning_qat.ops import affine
from lightning_qat.ops.affine import choose_scale_zero_point, dequantize_affine, quantize_affine


def by_definition(function, *args, **kwargs):
    with patch.object(affine, "takes_pieces", lambda *tensors: False):
        return function(*args, **kwargs)


def same(x, scale, zero, bits, symmetric, **layout) -> None:
    options = {"bits": bits, "symmetric": symmetric, **layout}
    codes = quantize_affine(x, scale, zero, **options)
    expected = by_definition(quantize_affine, x, scale, zero, **options)
    assert (codes.dtype, codes.stride()) == (expected.dtype, expected.stride())
    assert torch.equal(codes, expected)
    for dtype in DTYPES:
        values = dequantize_affine(codes, scale, zero, **layout, dtype=dtype)
        wanted = by_definition(dequantize_affine, codes, scale, zero, **layout, dtype=dtype)
        assert (values.dtype, values.stride()) == (wanted.dtype, wanted.stride())
        assert torch.equal(values, wanted)


@settings(max_examples=200, deadline=None)
@given(
    drawn=batches(),
    bits=st.integers(2, 9),
    symmetric=st.booleans(),
    layout=st.sampled_from(["tensor", "axis", "group", "token"]),
    spoil=st.sampled_from([None, math.nan, math.inf, -math.inf]),
    narrow=st.sampled_from([1.0, 0.3]),
)
def test_pieces_are_the_definition(drawn, bits, symmetric, layout, spoil, narrow) -> None:
    x, axis = drawn
    if layout in ("group", "token") and x.dim() < 2:
        layout = "tensor"
    rows = {
        "tensor": lambda: x.reshape(1, -1),
        "axis": lambda: x.movedim(axis, 0).reshape(x.shape[axis], -1),
        "group": lambda: x.reshape(x.shape[0], -1),
        "token": lambda: x.reshape(-1, x.shape[-1]),
    }[layout]()
    low, high = rows.amin(1).float() * narrow, rows.amax(1).float() * narrow
    shape = {"tensor": (), "axis": (x.shape[axis],), "group": (x.shape[0], 1), "token": (*x.shape[:-1], 1)}[layout]
    scale, zero = choose_scale_zero_point(low.reshape(shape), high.reshape(shape), bits=bits, symmetric=symmetric)
    if spoil is not None:
        x = x.clone()
        x[(0,) * x.dim()] = spoil
    row = math.prod(x.shape[1:])
    options = {"axis": {"axis": axis}, "group": {"group_size": row}}.get(layout, {})
    same(x, scale, zero, bits, symmetric, **options)


@pytest.mark.parametrize("size", [32_703, 32_704, 32_705, 100_001])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("axis", [0, None])
def test_more_than_a_piece(size: int, symmetric: bool, axis: int | None) -> None:
    x = randn(3, size)
    rows = x if axis == 0 else x.reshape(1, -1)
    shape = (3,) if axis == 0 else ()
    low, high = rows.amin(1).reshape(shape), rows.amax(1).reshape(shape)
    same(x, *choose_scale_zero_point(low, high, bits=8, symmetric=symmetric), 8, symmetric, axis=axis)


def test_halves_go_to_even_codes_and_ends_are_kept() -> None:
    x = torch.tensor([[-200.0, -127.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 126.5, 127.5, 1e30, -0.0]])
    codes = quantize_affine(x, torch.ones(1), bits=8, symmetric=True, axis=0)
    assert codes.tolist() == [[-127, -127, -2, -2, 0, 0, 2, 2, 126, 127, 127, 0]]
    same(x, torch.ones(1), None, 8, True, axis=0)


@pytest.mark.parametrize("zero", [-3.0, 0.4, 0.5, 2.5, 255.0, 300.0, 1e9])
def test_any_zero_point(zero: float) -> None:
    same(randn(4, 9) * 50, torch.tensor(0.5), torch.tensor(zero), 8, False)


def test_a_nan_with_a_payload_is_zero() -> None:
    x = torch.tensor([0x7FC00055, 0x3F800000], dtype=torch.int32).view(torch.float32)
    assert quantize_affine(x, torch.tensor(0.5), bits=8, symmetric=True).tolist() == [0, 2]


def test_scales_that_learn_keep_their_gradient() -> None:
    scale = torch.tensor(0.5, requires_grad=True)
    dequantize_affine(torch.tensor([1, 2, 3]), scale).sum().backward()
    assert scale.grad == 6.0


def test_another_default_dtype_changes_nothing() -> None:
    x, w = randn(5, 70), randn(6, 40)
    configs = ("nf4", "dynamic_tree", "llm_int8", QuantizationConfig("int4", group_size=8))
    held = [quantize(w, config) for config in configs]
    scale = x.abs().amax(1) / 7.5
    expected = [fake_quantize(x, scale, bits=4, axis=0), *(h.dequantize() for h in held), *(h.codes for h in held)]
    torch.set_default_dtype(torch.float64)
    try:
        again = [quantize(w, config) for config in configs]
        actual = [fake_quantize(x, scale, bits=4, axis=0), *(h.dequantize() for h in again), *(h.codes for h in again)]
    finally:
        torch.set_default_dtype(torch.float32)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype
        assert torch.equal(a, e)


def test_the_default_device_does_not_matter_without_a_compiler() -> None:
    x, scale = randn(5, 70), torch.full((5,), 0.1)
    with without_native():
        codes = quantize_affine(x, scale, bits=8, symmetric=True, axis=0)
        values = dequantize_affine(codes, scale, axis=0)
        with torch.device("meta"):
            assert torch.equal(quantize_affine(x, scale, bits=8, symmetric=True, axis=0), codes)
            assert torch.equal(dequantize_affine(codes, scale, axis=0), values)


def test_values_that_are_to_be_negated() -> None:
    x, codes, scale = randn(5, 70), torch.arange(-5, 5, dtype=torch.int8), torch.tensor(0.1)
    kept = {"bits": 8, "symmetric": True}
    assert torch.equal(quantize_affine(torch._neg_view(x), scale, **kept), quantize_affine(-x, scale, **kept))
    assert torch.equal(dequantize_affine(codes, torch._neg_view(-scale)), dequantize_affine(codes, scale))


@pytest.mark.filterwarnings("error")
def test_fake_memory_has_no_address_that_is_asked_for() -> None:
    codes, scale = torch.ones(4096, 1024, dtype=torch.int8), torch.tensor(0.1)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert dequantize_affine(codes, scale).shape == codes.shape
        assert quantize_affine(codes.float(), scale, bits=8, symmetric=True).shape == codes.shape

"""Packed 4-bit integers become the values that unpacking and dequantizing gives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensors import DTYPES, randn

from lightning_qat.ops.affine import choose_scale_zero_point, dequantize_affine, quantize_affine
from lightning_qat.ops.int4_dequantize import dequantize_int4, int4_dequantize_op, int4_run
from lightning_qat.ops.packing import pack_bits


@settings(max_examples=150, deadline=None)
@given(
    rows=st.integers(0, 9),
    groups=st.integers(1, 5),
    size=st.integers(1, 40),
    layout=st.sampled_from(["tensor", "channel", "group"]),
    symmetric=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**16),
)
def test_values_are_those_of_the_definition(rows, groups, size, layout, symmetric, dtype, seed) -> None:
    x = randn(rows, groups * size, seed=seed)
    axis, group = (0 if layout == "channel" else None), (size if layout == "group" else None)
    count = {"tensor": 1, "channel": rows, "group": rows * groups}[layout]
    flat = x.reshape(count, -1) if x.numel() else x.new_zeros(count, 1)
    shape = {"tensor": (), "channel": (rows,), "group": (rows, groups)}[layout]
    low, high = flat.amin(1), flat.amax(1)
    scale, zero = choose_scale_zero_point(low.reshape(shape), high.reshape(shape), bits=4, symmetric=symmetric)
    options = {"axis": axis, "group_size": group}
    codes = quantize_affine(x, scale, zero, bits=4, symmetric=symmetric, **options)
    packed = pack_bits(codes, 4, signed=symmetric)
    run = int4_run(x.shape, axis, group)
    actual = dequantize_int4(packed, scale, zero, x.shape, run, dtype)
    expected = dequantize_affine(codes, scale, zero, **options, dtype=dtype)
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize(("rows", "size"), [(3, 70_001), (2, 65_536), (5, 32_704), (1, 32_705)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_longer_than_a_chunk(rows: int, size: int, symmetric: bool) -> None:
    x = randn(rows, size)
    scale, zero = choose_scale_zero_point(x.amin(1), x.amax(1), bits=4, symmetric=symmetric)
    codes = quantize_affine(x, scale, zero, bits=4, symmetric=symmetric, axis=0)
    actual = dequantize_int4(pack_bits(codes, 4, signed=symmetric), scale, zero, x.shape, size)
    assert torch.equal(actual, dequantize_affine(codes, scale, zero, axis=0))


def test_no_run_where_channels_are_not_rows() -> None:
    assert int4_run((3, 4, 5), 1, None) is None
    assert int4_run((3, 4, 5), 0, None) == 20
    assert int4_run((3, 4, 5), None, None) == 60
    assert int4_run((3, 8), None, 4) == 4


def test_the_op_is_well_formed() -> None:
    packed = pack_bits(torch.randint(-8, 8, (4, 6)), 4, signed=True)
    arguments = (packed, torch.rand(4), None, 24, 6, torch.float32)
    torch.library.opcheck(int4_dequantize_op, arguments)

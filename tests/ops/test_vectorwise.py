"""Vector-wise int8 against the installed bitsandbytes, and the fake quantization of activations."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops import bitsandbytes_witness as witness
from tensors import DTYPES, batches, randn
from torch import Tensor

from lightning_qat.ops import vectorwise as ops
from lightning_qat.ops.vectorwise import (
    dequantize_vectorwise,
    fake_quantize_beside,
    fake_quantize_vectorwise,
    quantize_vectorwise,
)

THRESHOLDS = (0.0, 1e-3, 3.0, 6.0, 6.001)


def test_the_witness_is_right() -> None:
    """Codes are the nearest of 255 steps of a row's largest magnitude that is no outlier, in float64."""
    x = randn(20, 300).half()
    x[3, 7], x[9, 7], x[9, 11] = 50.0, -6.0, 8.0
    codes, absmax, columns = witness.quantize_vectorwise(x, 6.0)
    assert columns is not None
    assert columns.tolist() == [7, 11]
    kept = torch.where(x.abs() >= 6.0, 0.0, x.double())
    assert torch.equal(absmax.double(), kept.abs().amax(1))
    kept[:, [7, 11]] = 0.0
    assert float((codes.double() - kept * 127 / absmax[:, None].double()).abs().max()) <= 0.5 + 1e-4


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(DTYPES), st.sampled_from(THRESHOLDS), st.integers(0, 2**32 - 1))
def test_codes_are_those_of_bitsandbytes(dtype: torch.dtype, threshold: float, seed: int) -> None:
    draw = random.Random(seed)
    for case in range(25):
        rows, columns = draw.choice((1, 2, 7, 33)), draw.choice((1, 2, 5, 64, 129, 1000))
        x = (randn(rows, columns, seed=seed + case) * draw.choice((1.0, 4.0, 1e-4, 1e-7, 1e4, 0.0))).to(dtype)
        x[0] *= draw.choice((0, 1))
        expected, expected_absmax, expected_columns = witness.quantize_vectorwise(x, threshold)
        codes, absmax, outliers = quantize_vectorwise(x, threshold)
        assert torch.equal(codes, expected)
        assert torch.equal(absmax, expected_absmax)
        assert (outliers is None) == (expected_columns is None)
        if outliers is not None and expected_columns is not None:
            assert torch.equal(outliers, expected_columns)
        values = witness.functional.int8_vectorwise_dequant(expected, expected_absmax)
        assert torch.equal(dequantize_vectorwise(codes, absmax), values)


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(nan=0.0), b.nan_to_num(nan=0.0))


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(((0, 4), (4, 0), (1, 1), (3, 1000), (70, 1001), (2, 40_001))),
    st.sampled_from(DTYPES),
    st.sampled_from(THRESHOLDS),
    st.lists(st.tuples(st.integers(0), st.sampled_from((0.0, math.nan, math.inf, 7.0, 65504.0))), max_size=3),
)
def test_the_cpu_kernels_equal_the_definition(
    shape: tuple[int, int], dtype: torch.dtype, threshold: float, special: list[tuple[int, float]]
) -> None:
    x = randn(*shape).to(dtype)
    for place, value in special:
        if x.numel():
            x.view(-1)[place % x.numel()] = value
    results, expected = ops.vectorwise_quantize_op(x, threshold), ops.reference_quantize(x, threshold)
    assert all(same(a, b) and a.dtype == b.dtype for a, b in zip(results, expected, strict=True))
    fake = ops.vectorwise_fake_quantize_op(x, threshold)
    assert same(fake, ops.reference_fake_quantize(x, threshold))


@settings(max_examples=60, deadline=None)
@given(batches(), st.sampled_from(THRESHOLDS))
def test_fake_quantize_is_quantize_and_dequantize_beside_the_outliers(
    case: tuple[Tensor, int], threshold: float
) -> None:
    x, _ = case
    if float(x.abs().max()) > 65000:
        x = torch.zeros_like(x)
    fake = fake_quantize_vectorwise(x, threshold)
    rows = x.reshape(-1, x.shape[-1])
    codes, absmax, outliers = quantize_vectorwise(rows, threshold)
    expected = dequantize_vectorwise(codes, absmax, dtype=x.dtype)
    if outliers is not None:
        expected[:, outliers] = rows[:, outliers]
    assert torch.equal(fake, expected.view(x.shape))
    assert fake.stride() == torch.empty_like(x).stride()


def test_the_gradient_passes_everywhere() -> None:
    x = (randn(2, 3, 40) * 4).requires_grad_()
    y = fake_quantize_vectorwise(x, 6.0)
    grad = randn(2, 3, 40, seed=1)
    assert torch.equal(torch.autograd.grad(y, x, grad)[0], grad)


@settings(max_examples=40, deadline=None)
@given(batches(), st.integers(0, 2**16))
def test_columns_that_are_given_stay(case: tuple[Tensor, int], seed: int) -> None:
    x, _ = case
    kept = torch.rand(x.shape[-1], generator=torch.Generator().manual_seed(seed)) < 0.5
    fake = fake_quantize_beside(x.requires_grad_(), kept)
    assert same(fake, torch.where(kept, x, fake_quantize_vectorwise(torch.where(kept, 0.0, x))))
    assert fake.stride() == torch.empty_like(x).stride()
    grad = torch.ones_like(fake)
    assert torch.equal(torch.autograd.grad(fake, x, grad)[0], grad)


@pytest.mark.parametrize("threshold", [0.0, 2.0])
def test_opcheck(threshold: float) -> None:
    torch.library.opcheck(ops.vectorwise_quantize_op, (randn(5, 7), threshold))
    torch.library.opcheck(ops.vectorwise_fake_quantize_op, (randn(2, 5, 7).requires_grad_(), threshold))
    kept = torch.arange(7) < 3
    torch.library.opcheck(ops.vectorwise_fake_quantize_beside_op, (randn(2, 5, 7).requires_grad_(), kept))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_in_one_graph(dynamic: bool) -> None:
    def step(x: Tensor) -> Tensor:
        return fake_quantize_vectorwise(x * 3, 6.0).sin()

    x = randn(4, 9, 32).requires_grad_()
    results = []
    for function in (step, torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=dynamic)):
        y = function(x)
        results.append((y.detach(), torch.autograd.grad(y.sum(), x)[0]))
    torch.testing.assert_close(results[1], results[0])


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"shape \(2, 3, 4\); use a matrix"):
        quantize_vectorwise(torch.ones(2, 3, 4))
    with pytest.raises(ValueError, match=r"threshold=-1\.0"):
        quantize_vectorwise(torch.ones(2, 3), -1.0)
    with pytest.raises(ValueError, match=r"threshold=nan"):
        fake_quantize_vectorwise(torch.ones(2, 3), math.nan)
    with pytest.raises(ValueError, match=r"torch\.int64"):
        fake_quantize_vectorwise(torch.arange(3))
    with pytest.raises(ValueError, match=r"shape \(2,\) for x of shape \(2, 3\); use torch\.bool with one element for"):
        fake_quantize_beside(torch.ones(2, 3), torch.ones(2, dtype=torch.bool))
    with pytest.raises(ValueError, match="kept is on meta and the tensor on cpu"):
        fake_quantize_beside(torch.ones(2, 3), torch.ones(3, dtype=torch.bool, device="meta"))
    with pytest.raises(ValueError, match="row_absmax is on meta and the tensor on cpu"):
        dequantize_vectorwise(torch.ones(2, 3, dtype=torch.int8), torch.ones(2, device="meta"))
    with pytest.raises(ValueError, match="with 2"):
        dequantize_vectorwise(torch.ones(2, 3, dtype=torch.int8), torch.ones(3))

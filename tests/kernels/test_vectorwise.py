"""Vector-wise int8 on Triton's kernels: codes are the definition's and bitsandbytes', to the last bit."""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernels import aot
from kernels.cases import DTYPES, same
from tensors import randn
from torch import Tensor

from lightning_qat.kernels import vectorwise as kernels
from lightning_qat.kernels import vectorwise_codes as codes_file
from lightning_qat.native.library import without_native
from lightning_qat.ops import vectorwise as ops
from lightning_qat.ops import vectorwise_cuda
from lightning_qat.ops.vectorwise_codes import (
    column_absmax_op,
    columns_above_quantile,
    reference_codes,
    reference_column_absmax,
    takes_op,
    vectorwise_codes_op,
)

SETTINGS = settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
#: The smallest is 0.0 in float16, where everything is an outlier; the largest is infinite there.
THRESHOLDS = st.sampled_from((0.0, 0.0, 1e-9, 1.5, 6.001, 60000.0, 1e6))
SPECIAL = (0.0, math.nan, math.inf, -math.inf, 6.0, 65504.0, 65520.0, 6e-8, 2e-8, -0.1)


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    """Return a matrix of any layout, with rows of zeros, magnitudes beyond float16 and what is no number."""
    shape = draw(st.sampled_from(((1, 1), (1, 65), (3, 1), (7, 33), (40, 16), (2, 300), (129, 20), (5, 130))))
    dtype = draw(st.sampled_from(DTYPES))
    x = randn(*shape, seed=draw(st.integers(0, 2**16))) * draw(st.sampled_from((1.0, 4.0, 1e-4, 1e-7, 1e4)))
    x[draw(st.integers(0, shape[0] - 1))] *= draw(st.sampled_from((0.0, 1.0)))
    for value in draw(st.lists(st.sampled_from(SPECIAL), max_size=4)):
        x.view(-1)[draw(st.integers(0, x.numel() - 1))] = value
    x = x.to(dtype)
    layout = draw(st.sampled_from(("plain", "plain", "transposed", "strided")))
    if layout == "transposed":
        return x.t().contiguous().t()
    return torch.stack((x, torch.full_like(x, math.nan)), dim=-1)[..., 0] if layout == "strided" else x


@SETTINGS
@given(matrices(), THRESHOLDS, st.sampled_from((64, 8192)))
def test_everything_is_the_definition(device: str, poisoned: None, x: Tensor, threshold: float, most: int) -> None:
    moved = x.to(device)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "MOST_COLUMNS", most)  # rows longer than a tile
        found = vectorwise_cuda.vectorwise_quantize_cuda(moved, threshold)
        fake = vectorwise_cuda.vectorwise_fake_quantize_cuda(moved, threshold)
    expected = ops.reference_quantize(x, threshold)
    for one, other in zip(found, expected, strict=True):
        assert same(one, other)
        assert one.is_contiguous()
    assert same(fake, ops.reference_fake_quantize(x, threshold))
    assert fake.stride() == torch.empty_like(moved).stride()
    codes, absmax, _ = found
    values = vectorwise_cuda.vectorwise_dequantize_cuda(codes, absmax, x.dtype)
    assert same(values, ops.reference_dequantize(*expected[:2], x.dtype))
    for scale in (expected[1], expected[1] * 0.5, torch.zeros_like(expected[1])):
        given_codes = vectorwise_cuda.vectorwise_codes_cuda(moved, scale.to(device))
        assert same(given_codes, reference_codes(x, scale))
        assert given_codes.is_contiguous()


@settings(SETTINGS, max_examples=15)
@given(matrices(), st.sampled_from((64, 8192)), st.sampled_from((0.0, 0.3, 1.0)))
def test_given_columns_stay(device: str, poisoned: None, x: Tensor, most: int, share: float) -> None:
    kept = torch.rand(x.shape[1], generator=torch.Generator().manual_seed(0)) < share
    expected = ops.reference_fake_quantize_beside(x, kept)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "MOST_COLUMNS", most)
        moved = x.to(device)
        fake = vectorwise_cuda.vectorwise_fake_quantize_beside_cuda(moved, kept.to(device))
    assert same(fake, expected)
    assert fake.stride() == torch.empty_like(moved).stride()
    if device == "cpu":
        assert same(ops.fake_quantize_beside(x, kept), expected)
    assert same(vectorwise_cuda.column_absmax_cuda(moved), reference_column_absmax(x))


@settings(SETTINGS, max_examples=10)
@given(matrices(), THRESHOLDS)
def test_what_the_cpu_computes(device: str, x: Tensor, threshold: float) -> None:
    moved = x.to(device)
    found = [*vectorwise_cuda.vectorwise_quantize_cuda(moved, threshold)]
    found += [vectorwise_cuda.vectorwise_codes_cuda(moved, found[1] * 0.7)]
    found += [vectorwise_cuda.vectorwise_fake_quantize_cuda(moved, threshold)]

    def on_the_cpu() -> list[Tensor]:
        codes, absmax, is_outlier = ops.vectorwise_quantize_op(x, threshold)
        fake = ops.vectorwise_fake_quantize_op(x, threshold)
        return [codes, absmax, is_outlier, vectorwise_codes_op(x, absmax * 0.7), fake]

    assert all(same(a, b) for a, b in zip(found, on_the_cpu(), strict=True))
    with without_native():
        assert all(same(a, b) for a, b in zip(found, on_the_cpu(), strict=True))


@pytest.mark.parametrize("threshold", [0.0, 2.5, 6.0])
@pytest.mark.parametrize("shape", [(1, 40), (33, 130)])
def test_codes_are_those_of_bitsandbytes(device: str, threshold: float, shape: tuple[int, int]) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    x = (randn(*shape, seed=shape[1]) * 2).half()
    x[0, 7] = -6.0
    expected, absmax, columns = functional.int8_vectorwise_quant(x.clone(), threshold=threshold)
    found = vectorwise_cuda.vectorwise_quantize_cuda(x.to(device), threshold)
    assert torch.equal(found[0].cpu(), expected)
    assert torch.equal(found[1].cpu(), absmax)
    assert found[2].nonzero().view(-1).tolist() == ([] if columns is None else columns.tolist())
    values = vectorwise_cuda.vectorwise_dequantize_cuda(found[0], found[1], torch.float32)
    assert torch.equal(values.cpu(), functional.int8_vectorwise_dequant(expected, absmax))


def test_halves_of_a_step_go_to_the_even_code(device: str) -> None:
    # With an absmax of 127 / 4 a step is a quarter, exact in float16 as its halves are.
    x = torch.cat((torch.arange(-253, 254) / 8, torch.tensor([31.75]))).repeat(2, 1)
    codes, absmax, _ = vectorwise_cuda.vectorwise_quantize_cuda(x.to(device), 0.0)
    assert absmax.tolist() == [31.75, 31.75]
    assert torch.equal(codes.cpu(), torch.round(x * 4).to(torch.int8))
    values = vectorwise_cuda.vectorwise_fake_quantize_cuda(x.to(device), 0.0).cpu()
    assert not (values == 0).logical_and(values.signbit()).any()  # a code of zero has no sign


@pytest.mark.parametrize("rows", [1, 2, 128, 129])
def test_outlier_columns_of_every_tile(device: str, poisoned: None, rows: int) -> None:
    x = randn(rows, 130, seed=rows).half().clamp(-3, 3)
    x[rows - 1, 0], x[0, 127], x[rows // 2, 129] = 7.0, -6.0, 100.0
    codes, absmax, is_outlier = vectorwise_cuda.vectorwise_quantize_cuda(x.to(device), 6.0)
    assert is_outlier.nonzero().view(-1).tolist() == [0, 127, 129]
    assert codes[:, is_outlier].eq(0).all()
    assert absmax.max() <= 3
    values = vectorwise_cuda.vectorwise_fake_quantize_cuda(x.to(device), 6.0)
    assert torch.equal(values[:, is_outlier].cpu(), x[:, is_outlier.cpu()])
    again = vectorwise_cuda.vectorwise_fake_quantize_cuda(x.to(device), 6.0)
    assert torch.equal(values, again)


@pytest.mark.parametrize("shape", [(5,), (2, 3, 40), (2, 2, 2, 9)])
@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_every_index_but_the_last_is_a_token(
    device: str, poisoned: None, shape: tuple[int, ...], threshold: float
) -> None:
    x = randn(*shape)
    for each in (x, x.transpose(0, -1)):
        found = vectorwise_cuda.vectorwise_fake_quantize_cuda(each.to(device), threshold)
        assert same(found, ops.reference_fake_quantize(each, threshold))


@pytest.mark.parametrize("threshold", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (3, 5)])
def test_what_is_registered_takes_everything(
    device: str, shape: tuple[int, int], dtype: torch.dtype, threshold: float
) -> None:
    x = randn(*shape).to(dtype)
    moved = x.to(device)
    expected = ops.reference_quantize(x, threshold)
    found = vectorwise_cuda.vectorwise_quantize_cuda(moved, threshold)
    assert all(same(a, b) for a, b in zip(found, expected, strict=True))
    assert same(
        vectorwise_cuda.vectorwise_fake_quantize_cuda(moved, threshold), ops.reference_fake_quantize(x, threshold)
    )
    values = vectorwise_cuda.vectorwise_dequantize_cuda(found[0], found[1], dtype)
    assert same(values, ops.reference_dequantize(*expected[:2], dtype))
    kept = torch.arange(shape[1]) % 2 == 0
    fake = vectorwise_cuda.vectorwise_fake_quantize_beside_cuda(moved, kept.to(device))
    assert same(fake, ops.reference_fake_quantize_beside(x, kept))
    if x.numel():
        assert same(vectorwise_cuda.column_absmax_cuda(moved), reference_column_absmax(x))
    for scale in (expected[1], expected[1].double()):
        assert same(vectorwise_cuda.vectorwise_codes_cuda(moved, scale.to(device)), reference_codes(x, scale))


def test_the_ops_of_a_gpu(device: str) -> None:
    codes, absmax = torch.arange(-6, 6, dtype=torch.int8).view(3, 4).to(device), torch.rand(3, device=device)
    torch.library.opcheck(ops.vectorwise_dequantize_op, (codes, absmax, torch.bfloat16))
    torch.library.opcheck(column_absmax_op, (randn(3, 5).to(device),))
    assert takes_op(codes, absmax) == (device == "cuda")
    scale = absmax.requires_grad_()
    values = ops.dequantize_vectorwise(codes, scale)  # has a gradient, which the op has not
    assert torch.autograd.grad(values.sum(), scale)[0].isfinite().all()


@pytest.mark.parametrize("quantile", [0.0, 0.01, 0.5, 0.99, 1.0])
def test_columns_above_a_quantile(device: str, quantile: float) -> None:
    x = randn(300, 131)
    x[7, 5], x[:, 9] = math.nan, 0.0
    assert torch.equal(columns_above_quantile(x.to(device), quantile).cpu(), columns_above_quantile(x, quantile))


@triton.jit
def place_kernel(found_ptr, program, columns, ROWS: tl.constexpr):
    row, start = kernels.start_of_rows(program, columns, ROWS)
    at = tl.arange(0, ROWS)
    tl.store(found_ptr + at, row)
    tl.store(found_ptr + ROWS + at, start)


def test_offsets_are_wide(device: str) -> None:
    found = torch.zeros(4, dtype=torch.int64, device=device)
    place_kernel[(1,)](found, 2**20, 8192, ROWS=2)
    assert found.tolist() == [2**21, 2**21 + 1, 2**34, 2**34 + 8192]


# --- the compiler ---------------------------------------------------------------------------------


TUNED = {**kernels.TUNED, **codes_file.TUNED}


@pytest.mark.parametrize("name", sorted(n for n in TUNED if not n.startswith("columns")))
def test_memory_is_walked_in_accesses_of_16_bytes(compiler: None, name: str) -> None:
    text = aot.ptx(TUNED[name])
    assert "ld.global.v4.b32" in text
    assert ("st.global.v4.b32" in text) == (not name.startswith("column"))  # which stores a number for each column
    assert "fma" not in text
    assert ".ftz" not in text
    assert "atom." not in text
    assert ("div.rn.f32" in text) == (not name.startswith(("dequantize", "column")))
    assert "div.full" not in text


def test_marking_outliers_exchanges_nothing_between_threads(compiler: None) -> None:
    tuned = kernels.TUNED
    for name in ("quantize-bf16-4096", "fake-quantize-bf16-4096"):
        plain, marked = (aot.check(tuned[n], (90,))["sm_90"] for n in (name, f"{name}-outliers"))
        assert marked["shared"] == plain["shared"]

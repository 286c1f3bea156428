"""Histograms and the ranges chosen from them, against numpy and a brute-force search."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensors import DENORMAL, batches, randn
from torch import Tensor, nn

from lightning_qat.ops.affine import choose_scale_zero_point
from lightning_qat.ops.fake_quantize import fake_quantize
from lightning_qat.quantizers import histogram
from lightning_qat.quantizers.observers import (
    HistogramObserver,
    MSEObserver,
    Observer,
    PercentileObserver,
)

if TYPE_CHECKING:
    from collections.abc import Callable

HISTOGRAMS = ("percentile", "histogram", "mse")


# --- the histogram ------------------------------------------------------------------------------


@pytest.mark.parametrize("num_bins", [16, 100, 4096])
@settings(max_examples=40, deadline=None)
@given(
    exponents=st.lists(st.integers(-149, 127), min_size=2, max_size=4),
    seed=st.integers(0, 2**16),
    channels=st.sampled_from((None, 3)),
)
def test_batches_merge_exactly(num_bins: int, exponents: list[int], seed: int, channels: int | None) -> None:
    # Only a quarter of each batch is small noise; exact powers of two lie on the edges of bins.
    data = []
    for i, exponent in enumerate(exponents):
        x = randn(3, 12, seed=seed + i).clamp(-1.9, 1.9)
        x[:, :2] = torch.tensor([1.0, -1.0])
        x[:, 2:4] = torch.tensor([0.0, -DENORMAL])
        data.append((x.double() * 2.0**exponent).float())
    apart = MSEObserver(num_bins, num_channels=channels)
    at_once = MSEObserver(num_bins, num_channels=channels)
    for x in data:
        apart.update(x)
    at_once.update(torch.cat(data, dim=1))
    assert torch.equal(apart.half_range, at_once.half_range)
    assert torch.equal(apart.counts, at_once.counts)
    torch.testing.assert_close(apart.sums, at_once.sums, rtol=1e-12, atol=1e-12 * float(at_once.half_range.max()))
    assert int(apart.counts.sum()) == sum(x.numel() for x in data)


@settings(max_examples=40, deadline=None)
@given(batch=batches(), num_bins=st.sampled_from((16, 256, 4096)))
def test_the_counts_are_those_of_numpy(batch: tuple[Tensor, int], num_bins: int) -> None:
    x, axis = batch
    observer = MSEObserver(num_bins, num_channels=x.shape[axis], axis=axis)
    observer.update(x)
    rows = x.movedim(axis, 0).flatten(1) if x.dim() > 1 else x[:, None]
    for row, counts, sums, half_range in zip(
        rows.float().double().numpy(), observer.counts, observer.sums, observer.half_range.tolist(), strict=True
    ):
        peak = np.abs(row).max()
        assert half_range == 0 if peak == 0 else half_range / 2 <= peak < half_range
        reach = half_range or 1.0
        edges = np.arange(-num_bins // 2, num_bins // 2 + 1) * (2 * reach / num_bins)
        np.testing.assert_array_equal(counts.numpy(), np.histogram(row, edges)[0])
        expected = np.histogram(row, edges, weights=row)[0]
        np.testing.assert_allclose(sums.numpy(), expected, rtol=1e-12, atol=1e-13 * reach)


def test_float64_is_counted_as_the_float32_that_the_extremes_are() -> None:
    observer = MSEObserver()
    observer.update(torch.tensor([1.0 - 1e-12, 1.5], dtype=torch.float64))
    assert observer.counts[0, 4096 * 3 // 4 :].sum() == 2  # 1.0 is the lower edge of that bin


@pytest.mark.parametrize("name", HISTOGRAMS)
def test_pieces_do_not_show(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = {"percentile": PercentileObserver, "histogram": HistogramObserver, "mse": MSEObserver}
    whole, pieces = (kinds[name](num_bins=128, num_channels=5, axis=1) for _ in range(2))
    data = [randn(7, 5, 11, seed=s) * 3.0**s for s in range(3)]
    for x in data:
        whole.update(x)
    expected = [whole.range(s, b) for s, b in ((True, 8), (False, 4))]
    monkeypatch.setattr(histogram, "_CHUNK", 200)
    for x in data:
        pieces.update(x)
    for key, value in whole.state_dict().items():
        torch.testing.assert_close(pieces.state_dict()[key], value, rtol=1e-12, atol=1e-12)
    for (low, high), (symmetric, bits) in zip(expected, ((True, 8), (False, 4)), strict=True):
        torch.testing.assert_close(pieces.range(symmetric, bits), (low, high), rtol=1e-6, atol=0)


# --- percentile ---------------------------------------------------------------------------------


@pytest.mark.parametrize("percentile", [60.0, 90.0, 99.0, 99.9, 99.99])
@pytest.mark.parametrize("count", [1, 2, 10, 1001, 20000])
def test_percentiles_are_those_of_numpy_within_a_bin(percentile: float, count: int) -> None:
    x = randn(4, count) ** 3 * torch.tensor([[1.0], [100.0], [1e-3], [1.0]])
    x[3].abs_()
    observer = PercentileObserver(percentile, num_channels=4)
    for part in x.split(500, dim=1):
        observer.update(part)
    width = (2 * observer.half_range / observer.num_bins).numpy()
    low, high = observer.range()
    expected = np.percentile(x.double().numpy(), [100 - percentile, percentile], axis=1)
    assert (np.abs(low.numpy() - expected[0]) <= width * 1.0001).all()
    assert (np.abs(high.numpy() - expected[1]) <= width * 1.0001).all()


@settings(max_examples=40, deadline=None)
@given(batch=batches())
def test_the_hundredth_percentile_is_min_max(batch: tuple[Tensor, int]) -> None:
    x, axis = batch
    ours = PercentileObserver(100, num_channels=x.shape[axis], axis=axis)
    ours.update(x)
    assert torch.equal(ours.range()[0], ours.min_val)
    assert torch.equal(ours.range()[1], ours.max_val)


def test_a_percentile_leaves_outliers_out() -> None:
    x = randn(100_000)
    x[7] = 1000.0
    low, high = _observed(PercentileObserver(99.9), x).range()
    assert -4 < low < -2.5
    assert 2.5 < high < 4


# --- least error --------------------------------------------------------------------------------


def _observed(observer: Observer, x: Tensor) -> Observer:
    for part in x.split(5000):
        observer.update(part)
    return observer


def _error(x: Tensor, low: Tensor, high: Tensor, *, symmetric: bool, bits: int, norm: float = 2.0) -> float:
    scale, zero_point = choose_scale_zero_point(low, high, bits=bits, symmetric=symmetric)
    q = fake_quantize(x, scale, zero_point, bits=bits, symmetric=symmetric)
    return float((q.double() - x.double()).abs().pow(norm).sum())


def _gaussian() -> Tensor:
    return randn(20_000)


def _laplace_with_outliers() -> Tensor:
    x = randn(20_000, seed=1).sign() * -torch.rand(20_000, generator=torch.Generator().manual_seed(2)).log()
    x[:4] = torch.tensor([60.0, -45.0, 80.0, 30.0])
    return x


def _relu() -> Tensor:
    return randn(20_000, seed=3).add(0.3).relu()


def _silu() -> Tensor:
    return nn.functional.silu(2 * randn(20_000, seed=4))


def _one_sided_with_an_outlier_beyond_zero() -> Tensor:
    x = randn(20_000, seed=5).abs() - 0.05
    x[0] = -20.0
    return x


def _its_mirror() -> Tensor:
    return -_one_sided_with_an_outlier_beyond_zero()


DISTRIBUTIONS = (
    _gaussian,
    _laplace_with_outliers,
    _relu,
    _silu,
    _one_sided_with_an_outlier_beyond_zero,
    _its_mirror,
)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("draw", DISTRIBUTIONS)
def test_the_histogram_range_is_near_the_brute_force_optimum(
    draw: Callable[[], Tensor], bits: int, symmetric: bool
) -> None:
    x = draw()
    grid = {"symmetric": symmetric, "bits": bits}
    observer = _observed(HistogramObserver(), x)
    found = _error(x, *observer.range(symmetric, bits), **grid)  # type: ignore[arg-type]
    fractions = torch.linspace(1, 0.002, 300).tolist() if symmetric else [*torch.logspace(0, -2, 45).tolist(), 0.0]
    if symmetric:
        pairs = [(-f * x.abs().max(), f * x.abs().max()) for f in fractions]
    else:
        pairs = [(a * x.min(), b * x.max()) for a in fractions for b in fractions]
        if bits == 8:
            pairs = pairs[::3]
    best = min(_error(x, low, high, **grid) for low, high in pairs)  # type: ignore[arg-type]
    whole = _error(x, x.min(), x.max(), **grid)  # type: ignore[arg-type]
    # Where the error is smooth in the ends, the finer steps around the best must show.
    assert found <= best * (1.001 if draw is _gaussian and bits < 8 else 1.025)
    assert found <= whole * 1.001


@pytest.mark.parametrize("norm", [1.0, 2.0, 2.4])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("draw", DISTRIBUTIONS)
def test_the_mse_range_is_near_the_best_of_its_factors(
    draw: Callable[[], Tensor], bits: int, symmetric: bool, norm: float
) -> None:
    x = draw()
    grid: dict[str, Any] = {"symmetric": symmetric, "bits": bits, "norm": norm}
    observer = _observed(MSEObserver(norm=norm), x)
    found = _error(x, *observer.range(symmetric, bits), **grid)
    factors = [1 - i / 100 * 0.8 for i in range(101)]
    errors = [_error(x, f * x.min(), f * x.max(), **grid) for f in factors]
    assert found <= min(errors) * 1.03
    low, high = observer.range(symmetric, bits)
    shrink = [v for v in ((low / x.min()).item(), (high / x.max()).item()) if not math.isnan(v)]
    assert all(min(abs(v - f) for f in factors) < 1e-5 for v in shrink)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("symmetric", [True, False])
def test_few_values_are_known_exactly_by_the_means_of_their_bins(symmetric: bool, seed: int) -> None:
    x = randn(12, seed=seed).repeat(5)
    errors = [
        _error(x, f * x.min(), f * x.max(), symmetric=symmetric, bits=3)
        for f in (1 - i / 100 * 0.8 for i in range(101))
    ]
    found = _observed(MSEObserver(), x).range(symmetric, 3)
    assert _error(x, *found, symmetric=symmetric, bits=3) <= min(errors) * (1 + 1e-5)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("exponent", [-100, 100])
@pytest.mark.parametrize("build", [PercentileObserver, HistogramObserver, MSEObserver, lambda: MSEObserver(norm=16)])
def test_the_unit_of_the_data_does_not_matter(build: Callable[[], Observer], exponent: int, symmetric: bool) -> None:
    x = _laplace_with_outliers()
    expected = _observed(build(), x).range(symmetric, 4)
    found = _observed(build(), x * 2.0**exponent).range(symmetric, 4)
    assert torch.equal(found[0], expected[0] * 2.0**exponent)
    assert torch.equal(found[1], expected[1] * 2.0**exponent)


def test_clipping_pays_at_four_bits() -> None:
    """So that the two tests above cannot pass by returning the minimum and maximum."""
    x = _laplace_with_outliers()
    whole = _error(x, x.min(), x.max(), symmetric=True, bits=4)
    for observer in (HistogramObserver(), MSEObserver()):
        low, high = _observed(observer, x).range(True, 4)
        assert _error(x, low, high, symmetric=True, bits=4) < whole / 2


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_the_error_estimate_is_that_of_points_spread_over_the_bins(bits: int, symmetric: bool) -> None:
    counts = torch.tensor([[3.0, 0, 1, 7, 2, 0, 0, 5], [0, 1, 1, 0, 9, 4, 2, 2]], dtype=torch.float64)
    width = torch.tensor([1.0, 0.5], dtype=torch.float64)
    edges = torch.linspace(-4, 4, 9, dtype=torch.float64) * width[:, None]
    low, high = torch.tensor([[-4.0, -1.1], [-2.0, 0.0]]), torch.tensor([[4.0, 0.4], [2.0, 1.7]])
    estimate = histogram.uniform_squared_error(counts, edges[:, :-1], width, low, high, symmetric=symmetric, bits=bits)
    # Midpoints of 200,000 pieces of each bin, through the real quantizer.
    spread = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    for row in range(2):
        points = edges[row, :-1, None] + spread * edges[row].diff()[:, None]
        for k in range(2):
            scale, zero = choose_scale_zero_point(low[row, k], high[row, k], bits=bits, symmetric=symmetric)
            q = fake_quantize(points, scale, zero, bits=bits, symmetric=symmetric)
            mean = (q - points).square().mean(1)
            torch.testing.assert_close(estimate[row, k], (mean * counts[row]).sum(), rtol=2e-4, atol=0)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(0, 50), min_size=32, max_size=32).filter(any), min_size=1, max_size=3),
    symmetric=st.booleans(),
    bits=st.sampled_from((2, 4, 8)),
)
def test_the_histogram_range_is_never_worse_than_min_max(rows: list[list[int]], symmetric: bool, bits: int) -> None:
    counts = torch.tensor(rows)
    half_range = torch.full((len(rows),), 4.0, dtype=torch.float64)
    edges = torch.linspace(-4, 4, 33, dtype=torch.float64).repeat(len(rows), 1)
    filled = counts > 0
    low = torch.where(filled, edges[:, :-1], math.inf).amin(1).float()
    high = torch.where(filled, edges[:, 1:], -math.inf).amax(1).float()
    seen = histogram.Histogram(counts, half_range, low, high)
    chosen = histogram.least_squares_range(seen, symmetric=symmetric, bits=bits)

    def estimate(low: Tensor, high: Tensor) -> Tensor:
        ends = low[:, None], high[:, None]
        width = half_range / 16
        return histogram.uniform_squared_error(
            counts.double(), edges[:, :-1], width, *ends, symmetric=symmetric, bits=bits
        )

    assert bool((estimate(*chosen) <= estimate(low, high) * (1 + 1e-9)).all())

"""Observers against numpy, torch.ao and a brute-force search."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.ao.quantization import observer as ao

from lightning_qat.config import OBSERVER_NAMES
from lightning_qat.ops.affine import choose_scale_zero_point
from lightning_qat.ops.fake_quantize import fake_quantize
from lightning_qat.quantizers import histogram
from lightning_qat.quantizers.observers import (
    HistogramObserver,
    MinMaxObserver,
    MovingAverageObserver,
    MSEObserver,
    Observer,
    PercentileObserver,
    make_observer,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HISTOGRAMS = ("percentile", "histogram", "mse")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LARGEST = torch.finfo(torch.float32).max
DENORMAL = 2.0**-149


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    # Thousands of tiny ops: on a busy machine waiting for a second thread took 6 times as long.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def channel_axes(x: Tensor, axis: int) -> tuple[int, ...]:
    return tuple(d for d in range(x.dim()) if d != axis % x.dim())


@st.composite
def batches(draw: st.DrawFn) -> tuple[Tensor, int]:
    """Return a tensor of 1 to 4 dimensions, any dtype, layout and magnitude, and an axis of it."""
    shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    dtype = draw(st.sampled_from(DTYPES))
    x = randn(*shape, seed=draw(st.integers(0, 2**16)))
    if dtype in (torch.float32, torch.float64, torch.bfloat16):
        x = x * 2.0 ** draw(st.integers(-140, 124))
    x = (x * draw(st.sampled_from((1.0, 0.0))) + draw(st.sampled_from((0.0, 1.0, -3.0)))).to(dtype)
    layout = draw(st.sampled_from(("plain", "reversed", "strided")))
    if layout == "reversed":
        x = x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim())))
    if layout == "strided":
        x = torch.stack((x, torch.full_like(x, math.nan)), dim=-1)[..., 0]
    return x, axis


# --- the family ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OBSERVER_NAMES)
def test_make_observer_knows_every_name(name: str) -> None:
    assert isinstance(make_observer(name), Observer)
    built = make_observer(name, num_channels=3, axis=1, layer_name="blocks.0")
    assert (built.num_channels, built.axis, built.name) == (3, 1, "blocks.0")
    assert built.min_val.shape == (3,)


def test_make_observer_passes_the_momentum_on() -> None:
    built = make_observer("moving_average", momentum=0.5)
    assert isinstance(built, MovingAverageObserver)
    assert built.momentum == 0.5


def test_an_unknown_observer_is_answered_with_the_nearest_first() -> None:
    with pytest.raises(ValueError, match=r"observer='minmax' is not known; use one of: 'min_max', "):
        make_observer("minmax")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MinMaxObserver(num_channels=0), "num_channels=0"),
        (lambda: MinMaxObserver(num_channels=2.0), r"num_channels=2\.0"),  # type: ignore[arg-type]
        (lambda: MinMaxObserver(axis=None), "axis=None"),  # type: ignore[arg-type]
        (lambda: MovingAverageObserver(1.0), r"momentum=1\.0 .* \[0, 1\)"),
        (lambda: MovingAverageObserver(-0.1), r"momentum=-0\.1"),
        (lambda: MovingAverageObserver(math.nan), "momentum=nan"),
        (lambda: MovingAverageObserver("0.9"), "momentum='0.9'"),  # type: ignore[arg-type]
        (lambda: PercentileObserver(50), r"percentile=50 .* \(50, 100\]"),
        (lambda: PercentileObserver(100.1), r"percentile=100\.1"),
        (lambda: PercentileObserver(num_bins=8), "num_bins=8"),
        (lambda: HistogramObserver(17), "num_bins=17 .* even"),
        (lambda: MSEObserver(grid=0), "grid=0"),
        (lambda: MSEObserver(max_shrink=1.0), r"max_shrink=1\.0"),
        (lambda: MSEObserver(norm=0), "norm=0"),
    ],
)
def test_wrong_arguments_name_the_field_and_what_is_allowed(build: Callable[[], Observer], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("name", OBSERVER_NAMES)
@settings(max_examples=40, deadline=None)
@given(batch=batches(), symmetric=st.booleans(), bits=st.sampled_from((2, 4, 8, 16)))
def test_every_range_lies_within_the_data_and_gives_a_grid(
    name: str, batch: tuple[Tensor, int], symmetric: bool, bits: int
) -> None:
    x, axis = batch
    before = x.clone()
    for channels in (None, x.shape[axis]):
        observer = make_observer(name, num_channels=channels, axis=axis)
        assert observer(x) is x
        dims = tuple(range(x.dim())) if channels is None else channel_axes(x, axis)
        least = x.float().amin(dims) if dims else x.float()
        most = x.float().amax(dims) if dims else x.float()
        torch.testing.assert_close(observer.min_val, least, rtol=0, atol=0)
        torch.testing.assert_close(observer.max_val, most, rtol=0, atol=0)
        low, high = observer.range(symmetric, bits)
        assert low.dtype == high.dtype == torch.float32
        assert low.shape == high.shape == least.shape
        assert bool(((least <= low) & (low <= high) & (high <= most)).all())
        scale, zero_point = observer.get_quantization_params(symmetric, bits)
        assert scale.shape == zero_point.shape == least.shape
        assert (scale.dtype, zero_point.dtype) == (torch.float32, torch.int32)
        assert bool((scale.isfinite() & (scale > 0)).all())
        assert not symmetric or not bool(zero_point.any())
        expected, offset = choose_scale_zero_point(low, high, bits=bits, symmetric=symmetric)
        assert torch.equal(scale, expected)
        assert offset is None or torch.equal(zero_point, offset)
    assert torch.equal(x, before)


@pytest.mark.parametrize("name", OBSERVER_NAMES)
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_a_channel_is_observed_as_if_it_were_alone(name: str, axis: int) -> None:
    data = [randn(6, 5, 8, seed=s) * 2.0**s for s in range(3)]
    along = [-1 if d == axis % 3 else 1 for d in range(3)]
    data = [x * torch.logspace(-3, 3, x.shape[axis]).reshape(along) for x in data]
    together = make_observer(name, num_channels=data[0].shape[axis], axis=axis)
    for x in data:
        together.update(x)
    for channel in range(data[0].shape[axis]):
        alone = make_observer(name)
        for x in data:
            alone.update(x.select(axis, channel))
        for symmetric, bits in ((True, 8), (False, 4)):
            ours, theirs = together.range(symmetric, bits), alone.range(symmetric, bits)
            torch.testing.assert_close(ours[0][channel], theirs[0], rtol=1e-6, atol=0)
            torch.testing.assert_close(ours[1][channel], theirs[1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", OBSERVER_NAMES)
def test_updates_keep_no_graph_and_work_in_inference_mode(name: str) -> None:
    observer = make_observer(name)
    observer.update(randn(10).requires_grad_() * 2)
    with torch.inference_mode():
        observer.update(randn(10, seed=1))
    observer.update(randn(10, seed=2))
    scale, _ = observer.get_quantization_params(True, 8)
    assert not scale.requires_grad
    assert not any(buffer.requires_grad for buffer in observer.buffers())


@pytest.mark.parametrize("name", OBSERVER_NAMES)
def test_a_range_is_no_view_of_the_state(name: str) -> None:
    observer = make_observer(name)
    observer.update(randn(100))
    low, high = observer.range()
    kept = low.clone(), high.clone()
    observer.update(randn(100, seed=1) * 100)
    assert torch.equal(low, kept[0])
    assert torch.equal(high, kept[1])
    assert not torch.equal(observer.range()[1], high)


def test_only_cheap_observers_follow_the_training() -> None:
    assert {n for n in OBSERVER_NAMES if make_observer(n).follows_training} == {"min_max", "moving_average"}


# --- empty, zero, extreme -----------------------------------------------------------------------


@pytest.mark.parametrize("name", OBSERVER_NAMES)
def test_no_data_is_an_error_that_names_the_layer(name: str) -> None:
    observer = make_observer(name, layer_name="blocks.3.fc")
    observer.update(torch.empty(0, 4))
    assert not observer.observed
    message = r"calibration saw no data for layer 'blocks\.3\.fc'; run calibrate\(\.\.\.\) with at least one batch"
    with pytest.raises(ValueError, match=message):
        observer.get_quantization_params(True, 8)
    with pytest.raises(ValueError, match=message):
        observer.range()
    with pytest.raises(ValueError, match=f"unnamed {type(observer).__name__}"):
        make_observer(name).range()


@pytest.mark.parametrize("name", OBSERVER_NAMES)
def test_an_empty_tensor_changes_nothing(name: str) -> None:
    observer = make_observer(name, num_channels=4, axis=1)
    observer.update(randn(3, 4))
    before = copy.deepcopy(observer.state_dict())
    observer.update(torch.empty(0, 4))
    observer.update(torch.empty(0))
    for key, value in observer.state_dict().items():
        assert torch.equal(value, before[key])


@pytest.mark.parametrize("channels", [None, 3])
@pytest.mark.parametrize("name", OBSERVER_NAMES)
@pytest.mark.parametrize(("bad", "found"), [(math.nan, "NaN"), (math.inf, "inf"), (-math.inf, "inf"), (1e300, "inf")])
def test_nan_and_inf_are_refused_and_leave_no_trace(name: str, bad: float, found: str, channels: int | None) -> None:
    observer = make_observer(name, num_channels=channels, axis=1, layer_name="encoder.proj")
    observer.update(randn(5, 3))
    before = copy.deepcopy(observer.state_dict())
    x = randn(5, 3).double()
    x[2, 1] = bad
    where = "" if channels is None else " in channel 1"
    message = rf"layer 'encoder\.proj' observed {found}( \(in float32\))?{where}, .* LayerRule"
    with pytest.raises(ValueError, match=message):
        observer.update(x)
    for key, value in observer.state_dict().items():
        assert torch.equal(value, before[key])
    observer.update(randn(5, 3))
    observer.check_finite()


def test_a_batch_of_nothing_but_inf_is_not_taken_for_no_data() -> None:
    for value in (math.inf, -math.inf):
        with pytest.raises(ValueError, match="observed inf"):
            MinMaxObserver().update(torch.full((3,), value))


@pytest.mark.parametrize("shape", [(4,), (4, 5), (3, 4, 5)])
def test_another_number_of_channels_is_refused(shape: tuple[int, ...]) -> None:
    observer = MinMaxObserver(num_channels=3, axis=1, name="conv1")
    with pytest.raises(ValueError, match=r"num_channels=3 along axis=1 .* \[.*\] \(layer 'conv1'\)"):
        observer.update(torch.zeros(shape))


@pytest.mark.parametrize("channels", [None, 2])
@pytest.mark.parametrize("name", OBSERVER_NAMES)
def test_zeros_then_data(name: str, channels: int | None) -> None:
    observer = make_observer(name, num_channels=channels, momentum=0.0)
    observer.update(torch.zeros(2, 8))
    assert observer.observed
    for symmetric in (True, False):
        scale, zero_point = observer.get_quantization_params(symmetric, 8)
        assert bool((scale == 1).all())
        assert not bool(zero_point.any())
    for _ in range(3):
        observer.update(torch.linspace(-1, 1, 16).reshape(2, 8))
    assert bool((observer.get_quantization_params(True, 8)[0] < 0.01).all())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("value", [3.0, -0.375, DENORMAL, -DENORMAL, 2.0**-126, 2.0**127, LARGEST, -LARGEST])
@pytest.mark.parametrize("name", OBSERVER_NAMES)
def test_a_constant_is_its_own_range(name: str, value: float, symmetric: bool) -> None:
    observer = make_observer(name)
    for _ in range(5):
        observer.update(torch.full((7,), value))
        observer.range(symmetric)
    low, high = observer.range(symmetric)
    assert (low.item(), high.item()) == (value, value)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", OBSERVER_NAMES)
def test_from_the_least_to_the_greatest_float(name: str, symmetric: bool) -> None:
    observer = make_observer(name, momentum=0.0)
    for magnitude in (DENORMAL, 2.0**-100, 1.0, 2.0**100, LARGEST / 4, LARGEST):
        observer.update(torch.tensor([-magnitude / 2, 0.0, magnitude]))
        for buffer in observer.buffers():
            assert not bool(buffer.isnan().any() | buffer.isinf().any())
        for bits in (4, 8, 16):
            low, high = observer.range(symmetric, bits)
            assert -magnitude / 2 <= low.item() <= 0.0 <= high.item() <= magnitude
            assert math.isfinite(low.item())
    assert observer.max_val.item() == LARGEST


# --- min-max and moving average -----------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(batches(), min_size=1, max_size=4))
def test_min_max_is_that_of_all_batches(data: list[tuple[Tensor, int]]) -> None:
    observer = MinMaxObserver()
    for x, _ in data:
        observer.update(x)
    everything = np.concatenate([x.float().numpy().ravel() for x, _ in data])
    assert (observer.min_val.item(), observer.max_val.item()) == (everything.min(), everything.max())


@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_min_max_equals_torch_ao(axis: int) -> None:
    data = [randn(4, 3, 5, 2, seed=s) * (s + 1) for s in range(4)]
    ours, theirs = MinMaxObserver(), ao.MinMaxObserver()
    ours_channel = MinMaxObserver(num_channels=data[0].shape[axis], axis=axis)
    theirs_channel = ao.PerChannelMinMaxObserver(ch_axis=axis)
    for x in data:
        for observer in (ours, theirs, ours_channel, theirs_channel):
            observer(x)
    for mine, peer in ((ours, theirs), (ours_channel, theirs_channel)):
        assert torch.equal(mine.min_val, peer.min_val)
        assert torch.equal(mine.max_val, peer.max_val)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("channels", [None, 3])
def test_moving_average_equals_torch_ao(momentum: float, channels: int | None) -> None:
    data = [randn(8, 3, seed=s) * (1 + s % 3) for s in range(12)]
    ours = MovingAverageObserver(momentum, num_channels=channels, axis=1)
    kind = ao.MovingAverageMinMaxObserver if channels is None else ao.MovingAveragePerChannelMinMaxObserver
    theirs = kind(averaging_constant=1 - momentum, **({} if channels is None else {"ch_axis": 1}))
    low, high = data[0].double(), data[0].double()
    for step, x in enumerate(data):
        ours(x)
        theirs(x)
        dims = (0, 1) if channels is None else (0,)
        new_low, new_high = x.amin(dims).double(), x.amax(dims).double()
        low = new_low if step == 0 else momentum * low + (1 - momentum) * new_low
        high = new_high if step == 0 else momentum * high + (1 - momentum) * new_high
        # The second half takes the shorter path that a known first batch allows.
        if step == 6:
            ours.get_quantization_params(True, 8)
        torch.testing.assert_close(ours.min_val.double(), low, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(ours.max_val.double(), high, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(ours.min_val, theirs.min_val, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(ours.max_val, theirs.max_val, rtol=1e-6, atol=1e-6)


def test_both_paths_of_the_moving_average_are_one_arithmetic() -> None:
    known, unknown = MovingAverageObserver(0.9), MovingAverageObserver(0.9)
    for step in range(20):
        x = randn(16, seed=step)
        known.update(x)
        unknown.update(x)
        known.range()
    assert torch.equal(known.min_val, unknown.min_val)
    assert torch.equal(known.max_val, unknown.max_val)


@given(st.floats(0.0, 0.999), st.floats(-LARGEST, LARGEST, width=32))
def test_the_average_of_equal_numbers_is_that_number(momentum: float, value: float) -> None:
    observer = MovingAverageObserver(momentum)
    for _ in range(3):
        observer.update(torch.tensor([value]))
    assert observer.max_val.item() == value


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
    assert found <= best * (1.001 if draw is _gaussian else 1.025)
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


# --- state --------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [None, 3])
@pytest.mark.parametrize("name", OBSERVER_NAMES)
def test_state_loads_strictly_between_fresh_and_used(name: str, channels: int | None) -> None:
    used, other = (make_observer(name, num_channels=channels, axis=1) for _ in range(2))
    fresh = make_observer(name, num_channels=channels, axis=1)
    for seed in range(3):
        used.update(randn(9, 3, seed=seed) * 5**seed)
    other.load_state_dict(used.state_dict(), strict=True)
    for symmetric, bits in ((True, 8), (False, 4)):
        for mine, theirs in zip(
            used.get_quantization_params(symmetric, bits), other.get_quantization_params(symmetric, bits), strict=True
        ):
            assert torch.equal(mine, theirs)
    used.update(randn(9, 3, seed=9) * 1000)
    other.update(randn(9, 3, seed=9) * 1000)
    for key, value in used.state_dict().items():
        assert torch.equal(value, other.state_dict()[key])
    other.load_state_dict(fresh.state_dict(), strict=True)
    assert not other.observed
    with pytest.raises(ValueError, match="saw no data"):
        other.get_quantization_params(True, 8)


@pytest.mark.parametrize("name", OBSERVER_NAMES)
def test_a_float_checkpoint_leaves_the_state_and_half_of_it_is_reported(name: str) -> None:
    model = nn.ModuleDict({"fc": nn.Linear(2, 2), "observer": make_observer(name)})
    weights = {key: value for key, value in model.state_dict().items() if key.startswith("fc.")}
    model.load_state_dict(weights, strict=True)
    partial = {key: value for key, value in model.state_dict().items() if key != "observer.max_val"}
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "observer\.max_val"'):
        model.load_state_dict(partial, strict=True)


@pytest.mark.parametrize("name", OBSERVER_NAMES)
def test_reset_is_fresh(name: str) -> None:
    observer, fresh = make_observer(name, num_channels=2), make_observer(name, num_channels=2)
    observer.update(randn(2, 30))
    observer.range()
    observer.reset()
    assert not observer.observed
    for key, value in fresh.state_dict().items():
        assert torch.equal(observer.state_dict()[key], value)
    with pytest.raises(ValueError, match="saw no data"):
        observer.range()
    fresh.update(randn(2, 30, seed=1))
    observer.update(randn(2, 30, seed=1))
    assert torch.equal(observer.range()[0], fresh.range()[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OBSERVER_NAMES)
def test_a_cast_of_the_model_leaves_the_statistics(name: str, dtype: torch.dtype) -> None:
    observer = make_observer(name)
    model = nn.Sequential(nn.Linear(2, 2), observer)
    observer.update(torch.tensor([-1.2345678, 0.1, 7.6543211]))
    before = copy.deepcopy(observer.state_dict())
    for cast in (model.to(dtype), model.to(device="cpu", dtype=dtype), model.type(dtype)):
        assert cast[0].weight.dtype == dtype
        for key, value in observer.state_dict().items():
            assert value.dtype == before[key].dtype
            assert torch.equal(value, before[key])
    observer.update(torch.tensor([9.0], dtype=dtype))
    assert observer.max_val.dtype == torch.float32


@pytest.mark.parametrize("name", OBSERVER_NAMES)
def test_a_default_dtype_or_device_shows_in_the_device_only(name: str) -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        built = make_observer(name, num_channels=3)
    finally:
        torch.set_default_dtype(torch.float32)
    for key, value in make_observer(name, num_channels=3).state_dict().items():
        assert built.state_dict()[key].dtype == value.dtype
    with torch.device("meta"):
        empty = make_observer(name)
    empty.to_empty(device="cpu").reset()
    empty.update(randn(10))
    assert empty.observed


# --- compiled -----------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [None, 3])
@pytest.mark.parametrize("name", OBSERVER_NAMES)
def test_updates_trace_as_one_graph(name: str, channels: int | None) -> None:
    torch._dynamo.reset()
    eager, traced = (make_observer(name, num_channels=channels, axis=1) for _ in range(2))
    step = torch.compile(traced, backend="aot_eager", fullgraph=True)
    for seed in range(4):
        x = randn(6, 3, 4, seed=seed) * 3.0**seed
        eager(x)
        assert torch.equal(step(x), x)
    for key, value in eager.state_dict().items():
        assert torch.equal(traced.state_dict()[key], value)


@pytest.mark.parametrize("name", ["min_max", "moving_average"])
def test_a_step_of_training_traces_as_one_graph(name: str) -> None:
    torch._dynamo.reset()
    eager, traced = make_observer(name), make_observer(name)

    def step(observer: Observer, x: Tensor) -> tuple[Tensor, Tensor]:
        observer.update(x)
        return observer.get_quantization_params(False, 8)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for seed in range(3):
        x = randn(5, 7, seed=seed)
        for ours, theirs in zip(compiled(traced, x), step(eager, x), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("channels", [None, 2])
@pytest.mark.parametrize("name", OBSERVER_NAMES)
def test_what_a_compiled_update_may_not_look_at_is_found_later(name: str, channels: int | None, bad: float) -> None:
    torch._dynamo.reset()
    observer = make_observer(name, num_channels=channels, layer_name="head")
    step = torch.compile(observer, backend="aot_eager", fullgraph=True)
    for batch in (randn(2, 8), torch.full((2, 8), bad), randn(2, 8), randn(2, 8)):
        step(batch)
    for read in (observer.check_finite, observer.range, lambda: observer.get_quantization_params(True, 8)):
        with pytest.raises(ValueError, match=r"layer 'head' observed (NaN|inf)"):
            read()

"""Observers against numpy, torch.ao and a brute-force search."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensors import DENORMAL, LARGEST, batches, channel_axes, randn
from torch import Tensor
from torch.ao.quantization import observer as ao

from lightning_qat.config import OBSERVER_NAMES
from lightning_qat.ops.affine import choose_scale_zero_point
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
    from collections.abc import Callable

HISTOGRAMS = ("percentile", "histogram", "mse")


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

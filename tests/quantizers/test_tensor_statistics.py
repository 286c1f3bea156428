"""QuantizationStats against numpy's float64 and sorted values, which first prove themselves on known numbers."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensors import DTYPES, batches, randn
from torch import Tensor

from lightning_qat.quantizers import tensor_statistics
from lightning_qat.quantizers.tensor_statistics import QuantizationStats

PERCENTILES = {"p0_1": 0.1, "p1": 1, "p50": 50, "p99": 99, "p99_9": 99.9}
MOMENTS = ("mean", "std", "kurtosis", "peak_to_rms_db")


def witness(values: np.ndarray) -> dict[str, float]:
    """Return the statistics by their definitions, in exact fractions but for the roots."""
    exact = [Fraction(v) for v in values.tolist()]
    mean = sum(exact) / len(exact)
    second, fourth = (sum((v - mean) ** p for v in exact) / len(exact) for p in (2, 4))
    squares, peak = sum(v * v for v in exact) / len(exact), max(abs(v) for v in exact)
    return {
        "mean": float(mean),
        "std": root(second),
        "kurtosis": float(fourth / second**2) if second else math.nan,
        "peak_to_rms_db": 10 * math.log10(peak * peak / squares) if peak else math.nan,
        "outlier_fraction": sum((v - mean) ** 2 > 36 * second for v in exact) / len(exact) if second else 0.0,
        **{name: float(np.percentile(values, p)) for name, p in PERCENTILES.items()},
    }


def root(value: Fraction) -> float:
    """Return the square root of what may be no float."""
    return math.isqrt(int(value * 2**4400)) / 2**2200 if value else 0.0


def test_the_witness_knows_what_a_textbook_knows() -> None:
    found = witness(np.array([1.0, 2.0, 3.0, 4.0]))
    assert found["mean"] == 2.5
    assert found["std"] == pytest.approx(math.sqrt(1.25), rel=1e-15)
    assert found["kurtosis"] == pytest.approx(1.64)
    assert found["p50"] == 2.5
    assert found["peak_to_rms_db"] == pytest.approx(10 * math.log10(16 / 7.5))
    assert witness(np.array([1.0] * 99 + [-1e9]))["outlier_fraction"] == 0.01


@settings(max_examples=150, deadline=None)
@given(batches(), st.integers(1, 50), st.data())
def test_any_tensor(batch: tuple[Tensor, int], chunk: int, data: st.DataObject) -> None:
    x, _ = batch
    special = data.draw(st.lists(st.sampled_from([math.nan, math.inf, -math.inf, 0.0, -0.0]), max_size=4))
    if special:
        x = x.clone()
        for value in special:
            x[tuple(data.draw(st.integers(0, size - 1)) for size in x.shape)] = value
    with mock.patch.object(tensor_statistics, "_CHUNK", chunk):
        found = QuantizationStats.from_tensor(x)
    assert (found.shape, found.dtype, found.count) == (tuple(x.shape), str(x.dtype)[6:], x.numel())
    assert found.nan_count == int(x.isnan().sum())
    assert found.inf_count == int(x.isinf().sum())
    values = x.double()[x.isfinite()].numpy()
    if not values.size:
        assert all(math.isnan(getattr(found, name)) for name in (*MOMENTS, *PERCENTILES, "min", "max", "absmax"))
        return
    assert (found.min, found.max, found.absmax) == (values.min(), values.max(), np.abs(values).max())
    assert found.zero_fraction == (values == 0).mean()
    spread = found.max - found.min
    wanted = witness(values)
    for name in PERCENTILES:
        assert getattr(found, name) == pytest.approx(wanted[name], rel=1e-12, abs=1e-12 * spread)
    assert found.mean == pytest.approx(wanted["mean"], rel=1e-12, abs=1e-14 * found.absmax)
    assert found.std == pytest.approx(wanted["std"], rel=1e-9, abs=1e-13 * found.absmax)
    assert found.peak_to_rms_db == pytest.approx(wanted["peak_to_rms_db"], rel=1e-9, abs=1e-9, nan_ok=True)
    assert found.outlier_fraction == wanted["outlier_fraction"]
    if spread > 1e-3 * found.absmax or not spread:
        assert found.kurtosis == pytest.approx(wanted["kurtosis"], rel=1e-6, nan_ok=True)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=60),
    st.sampled_from(DTYPES),
    st.data(),
)
def test_order_statistics_are_the_sorted_values(numbers: list[float], dtype: torch.dtype, data: st.DataObject) -> None:
    x = torch.tensor(numbers, dtype=torch.float64).to(dtype)
    x = x[x.isfinite()]
    ranks = sorted(data.draw(st.sets(st.integers(0, max(0, x.numel() - 1))))) if x.numel() else []
    wanted = [sorted(x.tolist())[rank] for rank in ranks]
    with mock.patch.object(tensor_statistics, "_CHUNK", 7):
        found = tensor_statistics._order_statistics(x, ranks)
    assert found == wanted


def test_percentiles_beyond_what_torch_quantile_takes() -> None:
    x = randn(17_000_000)
    with pytest.raises(RuntimeError, match="too large"):
        torch.quantile(x, 0.5)
    found = QuantizationStats.from_tensor(x)
    ordered = np.sort(x.numpy())
    for name, percent in PERCENTILES.items():
        place = percent / 100 * (x.numel() - 1)
        low, high = (float(ordered[i]) for i in (math.floor(place), math.ceil(place)))
        assert getattr(found, name) == pytest.approx(low * (1 - place % 1) + high * (place % 1), rel=1e-15)
    assert found.kurtosis == pytest.approx(3, abs=0.01)
    assert found.mean == pytest.approx(float(ordered.mean(dtype=np.float64)), abs=1e-12)
    assert found.std == pytest.approx(float(ordered.std(dtype=np.float64)), rel=1e-12)


@pytest.mark.parametrize("magnitude", [1e308, 1e154, 1e-154, 5e-324, 2.0**-1060])
def test_float64_to_its_limits(magnitude: float) -> None:
    x = torch.tensor([magnitude, -magnitude, 0.0, magnitude], dtype=torch.float64)
    found = QuantizationStats.from_tensor(x)
    assert (found.min, found.max, found.p50) == (-magnitude, magnitude, magnitude / 2)
    assert found.kurtosis == pytest.approx(witness(np.array([1.0, -1.0, 0.0, 1.0]))["kurtosis"])
    assert found.std == pytest.approx(math.sqrt(0.6875) * magnitude)


def test_constants_have_no_spread() -> None:
    found = QuantizationStats.from_tensor(torch.full((1000,), 0.1))
    assert (found.std, found.outlier_fraction, found.peak_to_rms_db) == (0, 0, 0)
    assert found.mean == found.p1 == found.absmax == float(torch.tensor(0.1))
    assert math.isnan(found.kurtosis)
    zero = QuantizationStats.from_tensor(torch.zeros(3))
    assert (zero.zero_fraction, zero.mean) == (1, 0)
    assert math.isnan(zero.peak_to_rms_db)


def test_empty_and_scalar() -> None:
    found = QuantizationStats.from_tensor(torch.empty(3, 0), axis=0)
    assert (found.count, found.channels, found.channel_absmax_max) == (0, 3, None)
    assert math.isnan(found.zero_fraction)
    assert QuantizationStats.from_tensor(torch.tensor(2.0)).p99 == 2


def test_known_shapes() -> None:
    uniform = QuantizationStats.from_tensor(torch.linspace(-1, 1, 100_001))
    assert uniform.kurtosis == pytest.approx(1.8, abs=1e-3)
    assert uniform.peak_to_rms_db == pytest.approx(10 * math.log10(3), abs=1e-3)
    spiked = randn(10_000)
    spiked[:5] = 100
    assert QuantizationStats.from_tensor(spiked).outlier_fraction == 5 / 10_000


@pytest.mark.parametrize(("count", "outliers"), [(36, 0), (38, 1)])
def test_an_outlier_is_beyond_six_standard_deviations(count: int, outliers: int) -> None:
    x = torch.zeros(count)
    x[3] = -5.0  # sqrt(count - 1) standard deviations from the mean
    assert QuantizationStats.from_tensor(x).outlier_fraction == outliers / count


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_the_formula_for_the_sqnr_of_a_uniform_grid(bits: int) -> None:
    import lightning_qat as lq

    x = randn(100_000)
    scale = x.abs().max() / (2 ** (bits - 1) - (1 if bits == 8 else 0.5))
    measured = lq.sqnr(x, lq.fake_quantize(x, scale, bits=bits))
    expected = 6.02 * bits + 4.77 - QuantizationStats.from_tensor(x).peak_to_rms_db
    assert float(measured) == pytest.approx(expected, abs=0.6)


@settings(max_examples=60, deadline=None)
@given(batches(), st.integers(1, 20))
def test_channels(batch: tuple[Tensor, int], chunk: int) -> None:
    x, axis = batch
    with mock.patch.object(tensor_statistics, "_CHUNK", chunk):
        found = QuantizationStats.from_tensor(x, axis=axis)
    absmax = np.abs(np.moveaxis(x.double().numpy(), axis, 0)).reshape(x.shape[axis], -1).max(1)
    assert found.channels == x.shape[axis]
    assert found.channel_absmax_min == absmax.min()
    assert found.channel_absmax_median == pytest.approx(np.median(absmax), rel=1e-12)
    assert found.channel_absmax_max == absmax.max()


def test_channels_are_told_over_finite_values() -> None:
    x = torch.tensor([[1.0, math.inf], [math.nan, -3.0], [math.nan, math.nan]])
    found = QuantizationStats.from_tensor(x, axis=0)
    assert (found.channel_absmax_min, found.channel_absmax_median, found.channel_absmax_max) == (0, 1, 3)


def test_nothing_changes_and_values_are_plain() -> None:
    x = randn(6, 4).t().requires_grad_()
    before = x.detach().clone()
    found = QuantizationStats.from_tensor(x, axis=1)
    assert torch.equal(x, before)
    assert {type(value) for value in found.to_dict().values()} == {list, str, int, float, type(None)}
    QuantizationStats.from_tensor(torch.nn.Parameter(before))


def test_as_json_and_as_a_table() -> None:
    found = QuantizationStats.from_tensor(torch.zeros(2, 3), axis=1)
    plain = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert (plain["shape"], plain["dtype"], plain["kurtosis"], plain["channels"]) == ([2, 3], "float32", "nan", 3)
    assert plain["codes_used"] is None
    lines = str(QuantizationStats.from_tensor(randn(10))).splitlines()
    assert lines[0].split() == ["shape", "(10,)"]
    assert len({len(line) - len(line.split(None, 1)[1]) for line in lines}) == 1
    assert not any(line.startswith(("codes", "channel")) for line in lines)
    with pytest.raises(AttributeError):
        found.min = 1.0


class Stored:
    """What a quantized tensor looks like from outside."""

    def __init__(self, codes: Tensor, scale: float) -> None:
        self.codes, self.scale = codes, scale

    def dequantize(self) -> Tensor:
        return self.codes * self.scale


def test_quantized_tensors() -> None:
    found = QuantizationStats.from_tensor(Stored(torch.tensor([[0, 1, 1, 3]], dtype=torch.int8), 0.5))
    assert (found.shape, found.max, found.codes_used, found.code_entropy) == ((1, 4), 1.5, 3, 1.5)
    one = QuantizationStats.from_tensor(Stored(torch.ones(5, dtype=torch.uint8), 1.0))
    assert (one.codes_used, one.code_entropy) == (1, 0)
    empty = QuantizationStats.from_tensor(Stored(torch.ones(0, dtype=torch.uint8), 1.0))
    assert (empty.count, empty.codes_used, empty.code_entropy) == (0, 0, 0)
    every = QuantizationStats.from_tensor(Stored(torch.arange(256).short(), 1.0))
    assert (every.codes_used, every.code_entropy) == (256, 8)


def test_eight_bit_floats() -> None:
    x = torch.tensor([1.0, -2.0, 448.0]).to(torch.float8_e4m3fn)
    found = QuantizationStats.from_tensor(x, axis=0)
    assert (found.dtype, found.min, found.max, found.channel_absmax_median) == ("float8_e4m3fn", -2, 448, 2)


@pytest.mark.parametrize(
    ("tensor", "axis", "error", "message"),
    [
        (torch.arange(3), None, ValueError, "dtype torch.int64; use a floating-point tensor"),
        (torch.ones(2, dtype=torch.bool), None, ValueError, "torch.bool"),
        (torch.ones(2, dtype=torch.complex64), None, ValueError, "torch.complex64"),
        (torch.eye(2).to_sparse(), None, ValueError, "torch.sparse_coo; use tensor.to_dense"),
        ([1.0], None, TypeError, "tensor is a list"),
        (torch.ones(2, 3), 2, ValueError, r"axis=2 is not a dimension of a tensor of shape \(2, 3\)"),
        (torch.ones(2, 3), True, ValueError, "axis=True"),
        (torch.tensor(1.0), 0, ValueError, "axis=0"),
    ],
)
def test_errors(tensor: object, axis: int | None, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        QuantizationStats.from_tensor(tensor, axis=axis)

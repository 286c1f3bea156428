"""SmoothQuant: the published scales, and a search whose expectation is met by quantizing inputs and weights."""

from __future__ import annotations

import pytest
import torch
from tensors import randn
from torch import Tensor

from lightning_qat.ptq.smoothing import SmoothingOptions, _cut, search_smoothing, smoothing_scale
from lightning_qat.ptq.statistics import InputStatistics
from lightning_qat.schemes import TensorFormat

FMT = TensorFormat("int8", 8, True, axis=0)


def problem(size: int = 32) -> tuple[list[Tensor], Tensor, InputStatistics]:
    x = randn(500, size)
    x[:, 3] *= 60  # an outlier, as transformers have them
    magnitude = x.abs()
    statistics = InputStatistics(x.t() @ x, 500, magnitude.mean(0), magnitude.amax(0), float(x.min()), float(x.max()))
    return [randn(20, size, seed=1) * 0.1, randn(10, size, seed=2) * 0.1], x, statistics


def error_of(weights: list[Tensor], x: Tensor, scale: Tensor) -> float:
    """Quantize inputs per tensor and weights per channel, with nothing of the library."""
    scaled = x / scale
    step = scaled.abs().max() * 2 / 255
    inputs, total = (scaled / step).round() * step, 0.0
    for weight in weights:
        w = weight * scale
        s = w.abs().amax(1, keepdim=True) / 127
        total += float(((inputs @ ((w / s).round() * s).t()) - x @ weight.t()).square().sum())
    return total


def test_scales_are_the_published_ones() -> None:
    weights, x, statistics = problem()
    w_max = torch.cat(weights).abs().max(dim=0)[0]
    expected = (x.abs().max(dim=0)[0].pow(0.5) / w_max.pow(0.5)).clamp(min=1e-5)
    assert torch.allclose(smoothing_scale(statistics.max_magnitude, weights, 0.5), expected)
    found = search_smoothing(weights, statistics, [FMT] * 2, SmoothingOptions(alpha=0.5))
    assert torch.allclose(found.scales, expected)
    assert found.alpha == 0.5


def test_the_search_takes_what_is_best_once_quantized() -> None:
    weights, x, statistics = problem()
    found = search_smoothing(weights, statistics, [FMT] * 2)
    plain = error_of(weights, x, torch.ones(32))
    assert found.plain_loss == pytest.approx(plain, rel=0.2)
    assert found.loss == pytest.approx(error_of(weights, x, found.scales), rel=0.2)
    errors = [error_of(weights, x, smoothing_scale(statistics.max_magnitude, weights, i / 20)) for i in range(21)]
    assert error_of(weights, x, found.scales) < 1.2 * min(errors) < 0.2 * plain


def error_of_others(weights: list[Tensor], x: Tensor, others: Tensor, scale: Tensor) -> float:
    """Quantize other inputs with the step that ``x`` has; weights stay as they are."""
    step = (x / scale).abs().max() * 2 / 255
    inputs = (others / scale / step).round().clamp(-127, 127) * step * scale
    return sum(float(((inputs - others) @ weight.t()).square().sum()) for weight in weights) / len(others)


@pytest.mark.parametrize("tokens", [200, 2000])
def test_calibrated_ranges_cut_what_was_not_seen(tokens: int) -> None:
    torch.manual_seed(0)
    sigma = torch.rand(64) + 0.5
    weights, others = [torch.randn(32, 64)], torch.randn(20_000, 64) * sigma
    found: dict[bool, list[float]] = {False: [], True: []}
    ratios, plain = [], []
    for _ in range(10):
        x = torch.randn(tokens, 64) * sigma
        magnitude = x.abs()
        statistics = InputStatistics(x.t() @ x, tokens, magnitude.mean(0), magnitude.amax(0), -9.0, 9.0)
        for calibrated, errors in found.items():
            scale = search_smoothing(weights, statistics, [FMT], calibrated=calibrated).scales
            errors.append(error_of_others(weights, x, others, scale))
        plain.append(error_of_others(weights, x, others, torch.ones(64)))
        even = smoothing_scale(statistics.max_magnitude, weights, 1.0)  # every channel fills the range
        step = float((x / even).abs().max()) * 2 / 255
        expected = (_cut(statistics, even) + step**2 / 12) * (weights[0] * even).square().sum(0)
        ratios.append(error_of_others(weights, x, others, even) / float(expected.sum()))
    assert sum(ratios) == pytest.approx(len(ratios), rel=0.1)
    assert sum(found[True]) < sum(plain)
    assert (sum(found[False]) > sum(plain)) == (tokens == 200)  # what not knowing of it costs


def test_nothing_is_changed_where_that_is_best() -> None:
    x = randn(500, 8).sign()
    weights = [torch.full((4, 8), 0.5)]
    statistics = InputStatistics(x.t() @ x, 500, torch.ones(8), torch.ones(8), -1.0, 1.0)
    found = search_smoothing(weights, statistics, [FMT])
    assert found.loss == found.plain_loss
    assert found.alpha is None
    assert torch.equal(found.scales, torch.ones(8))


def test_tied_and_dead_channels() -> None:
    weights, _, statistics = problem()
    tied = torch.arange(16).repeat(2)
    scale = smoothing_scale(statistics.max_magnitude, weights, 0.5, tied)
    assert torch.equal(scale[:16], scale[16:])
    largest = statistics.max_magnitude.view(2, 16).amax(0)
    assert torch.allclose(scale[:16], (largest / torch.cat(weights).abs().amax(0).view(2, 16).amax(0)).sqrt())
    weights[0][:, 5] = weights[1][:, 5] = 0
    statistics.max_magnitude[6] = 0
    scale = smoothing_scale(statistics.max_magnitude, weights, 0.5)
    assert scale[5] == scale[6] == 1


@pytest.mark.parametrize("options", [{"alpha": 1.5}, {"grid_points": 0}, {"activation_bits": 1}])
def test_options_are_checked(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        SmoothingOptions(**options)

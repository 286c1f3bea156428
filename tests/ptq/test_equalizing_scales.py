"""Scales of channels, and the expected error of layers against the error that they have."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensors import randn
from torch import nn

import lightning_qat as lq
from lightning_qat.ptq.equalizing_scales import (
    ChannelRange,
    EqualizationOptions,
    by_input_channel,
    equalizing_scales,
    expected_loss,
)

values = st.lists(st.floats(0, 2.0**20, width=32), min_size=1, max_size=9)


@given(values, st.floats(0.01, 1.0), st.booleans())
def test_nothing_seen_below_a_ceiling_is_cut(seen: list[float], alpha: float, exact: bool) -> None:
    largest = torch.tensor(seen).clamp(max=6.0)
    scales = equalizing_scales([largest], alpha, 6.0, exact=exact)
    assert bool(((scales > 0) & (scales <= 1)).all())
    assert bool((largest <= 6.00001 * scales).all())
    assert bool((scales[(largest == 6.0) | (largest == 0)] == 1).all())


@given(values, values, st.floats(0.01, 1.0))
def test_without_a_ceiling_the_largest_channel_stays(one: list[float], other: list[float], alpha: float) -> None:
    size = min(len(one), len(other))
    readers = [torch.tensor(one[:size]), torch.tensor(other[:size])]
    scales = equalizing_scales(readers, alpha)
    assert bool(torch.isfinite(scales).all())
    assert float(scales.max()) == 1
    for largest in readers:
        assert bool((largest / scales >= largest).all())
        assert float((largest / scales).max()) <= float(largest.max()) * 2.0 ** (10 * alpha) * 1.001


def test_channels_of_readers_are_those_of_the_one_that_fills_its_range_most() -> None:
    readers = [torch.tensor([1.0, 4.0, 16.0]), torch.tensor([0.25, 1.0, 1.0])]
    assert equalizing_scales(readers, 1.0).tolist() == [0.25, 1.0, 1.0]
    assert equalizing_scales(readers, 0.5).tolist() == [0.5, 1.0, 1.0]
    assert equalizing_scales([torch.tensor([1.0, 3.0, 9.0])], 1.0, exact=True).tolist() == [0.125, 0.5, 1.0]


@pytest.mark.parametrize("alpha", [-1.0, 1.5, math.nan, "most"])
def test_alpha_is_a_share(alpha: object) -> None:
    with pytest.raises(ValueError, match="alpha="):
        EqualizationOptions(alpha=alpha)  # type: ignore[arg-type]


def test_what_is_tried() -> None:
    assert EqualizationOptions(grid_points=4).alphas(math.inf) == [0.25, 0.5, 0.75, 1.0]
    assert EqualizationOptions(grid_points=4).alphas(6.0) == [0.25, 0.5]
    assert EqualizationOptions(alpha=0.8).alphas(6.0) == [0.8]
    with pytest.raises(ValueError, match="grid_points=1 is not allowed"):
        EqualizationOptions(grid_points=1)


def test_columns_of_grouped_convolutions() -> None:
    conv, factor, x = nn.Conv2d(6, 4, 3, groups=2, bias=False), randn(6).exp(), randn(2, 6, 5, 5)
    with torch.no_grad():
        expected = conv(x * factor.view(1, -1, 1, 1))
        conv.weight.copy_(by_input_channel(conv, conv.weight, factor))
        assert torch.allclose(conv(x), expected, rtol=1e-5, atol=1e-6)


LAYERS = {
    "linear": lambda: nn.Linear(24, 16),
    "convolution": lambda: nn.Conv2d(24, 16, 1),
    "depthwise": lambda: nn.Conv2d(24, 24, 3, groups=24),
    "grouped": lambda: nn.Conv2d(24, 16, 3, groups=2),
}


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_the_error_is_what_was_expected(kind: str, per_channel: bool, symmetric: bool) -> None:
    torch.manual_seed(0)
    config = lq.QATConfig(
        "int8", bits=5, per_channel=per_channel, activation_bits=6, activation_symmetric=symmetric,
        activation_observer="min_max",
    )  # fmt: skip
    layer = LAYERS[kind]().requires_grad_(False)
    x = randn(64, 24) if kind == "linear" else randn(16, 24, 8, 8)
    x = x * randn(24, seed=1).exp().view(1, -1, *[1] * (x.dim() - 2)) + 0.2
    exact = layer(x)
    model = lq.calibrate(lq.prepare(nn.Sequential(layer), config).eval(), [x])
    rows = x.transpose(0, 1).flatten(1)
    seen = ChannelRange(rows.amin(1), rows.amax(1), rows.double().square().sum(1), rows.shape[1])
    dims = (0, *range(2, x.dim()))
    error = float((model(x) - exact).double().square().mean(dims).sum())
    assert expected_loss(model[0], model[0].weight, seen) == pytest.approx(error, rel=0.3)

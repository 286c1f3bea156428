"""A bias that is put in place of the trained one: kernels read what it means, and nothing beside it."""

from __future__ import annotations

import pytest
import torch
from tensors import randn
from torch import nn

import lightning_qat as lq
from lightning_qat.ops.integer_conv import conv_is_exact
from lightning_qat.ops.integer_linear import linear_is_exact

pytestmark = pytest.mark.skipif(not (linear_is_exact() and conv_is_exact()), reason="no exact integer kernels here")

IN, OUT = 128, 40
PLANS = ["int8", "int8_dynamic", "int8_dynamic_per_tensor", "int8_weight_only", "llm_int8", "w4a16", "w4a8"]
TOKENS = [3, 40]  # few, and more than our own kernels take


def converted(layer: nn.Module, x: torch.Tensor, plan: str = "int8") -> nn.Module:
    model = lq.prepare(nn.Sequential(layer), plan)
    lq.calibrate(model, [x])
    return lq.convert(model)[0]


def without_bias(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    bias, layer.bias = layer.bias, None
    result = layer(x)
    layer.bias = bias
    return result


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("plan", PLANS)
def test_a_bias_with_gaps_in_memory(plan, tokens):
    """A column of a matrix, or every third element of what several layers share."""
    x = randn(tokens, IN)
    layer = converted(nn.Linear(IN, OUT), x, plan)
    layer.bias = nn.Parameter(randn(OUT, 3)[:, 1], requires_grad=False)
    with torch.no_grad():
        torch.testing.assert_close(layer(x) - layer.bias, without_bias(layer, x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_convolutions_bias_with_gaps_in_memory(channels_last):
    x = randn(2, 3, 9, 9)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    layer = converted(nn.Conv2d(3, 8, 3), x)
    layer.bias = nn.Parameter(randn(8, 3)[:, 1], requires_grad=False)
    with torch.no_grad():
        torch.testing.assert_close(layer(x) - layer.bias.view(-1, 1, 1), without_bias(layer, x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("plan", PLANS)
def test_a_bias_of_another_size_is_no_memory_to_read(plan, tokens):
    """One for all features is what ``F.linear`` makes of it; others are its error."""
    x = randn(tokens, IN)
    layer = converted(nn.Linear(IN, OUT), x, plan)
    with torch.no_grad():
        expected = without_bias(layer, x) + 0.5
        for shape in ((1,), (1, OUT)):
            layer.bias = nn.Parameter(torch.full(shape, 0.5))
            torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
        for size in (OUT - 1, OUT + 1):
            layer.bias = nn.Parameter(torch.zeros(size))
            with pytest.raises(RuntimeError, match="size"):
                layer(x)


def test_training_with_a_bias_of_another_size():
    """As for small layers, whose product is one of floats."""
    model = lq.prepare(nn.Sequential(nn.Linear(256, 256)), "int8")
    x = randn(300, 256, seed=1)
    lq.calibrate(model, [x])
    model[0].bias = nn.Parameter(torch.zeros(1))
    model(x).sum().backward()
    torch.testing.assert_close(model[0].bias.grad, torch.full((1,), 300.0 * 256))
    model[0].bias = nn.Parameter(torch.zeros(257))
    with pytest.raises(RuntimeError, match="size"):
        model(x)

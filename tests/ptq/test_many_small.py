"""Codes of depthwise convolutions against all codes there are, and against the nearest ones."""

from __future__ import annotations

import itertools

import pytest
import torch
from tensors import randn
from torch import nn

import lightning_qat as lq
from lightning_qat.ptq.chosen import output_error
from lightning_qat.ptq.many_small import choose_many_small
from lightning_qat.schemes import get_scheme, weight_format


def problem(groups, rows, k, seed=0):
    inputs = randn(groups, 40, k, seed=seed) + randn(groups, 1, k, seed=seed + 1)
    return randn(groups * rows, k, seed=seed + 2), torch.bmm(inputs.transpose(1, 2), inputs)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("rows", [1, 2])
def test_no_change_of_one_code_is_better(symmetric, rows) -> None:
    weight, grams = problem(5, rows, 4)
    config = lq.QuantizationConfig("int8", bits=3, symmetric=symmetric, per_channel=True)
    fmt = weight_format(config, weight.shape)
    chosen = choose_many_small(weight, grams, fmt)
    values = chosen.values()
    losses = [output_error(weight[i : i + 1], values[i : i + 1], grams[i // rows]) for i in range(len(weight))]
    assert chosen.loss == pytest.approx(sum(losses), rel=1e-5)
    assert chosen.loss < 0.9 * chosen.nearest_loss
    scheme, low = get_scheme("int8"), -4 if symmetric else 0
    for row, k, code in itertools.product(range(len(weight)), range(4), range(low, low + 8)):
        codes = chosen.codes.clone()
        codes[row, k] = code
        zero = chosen.zero_point
        other = scheme.dequantize(codes, chosen.scale, zero, fmt, torch.float32)[row : row + 1]
        assert output_error(weight[row : row + 1], other, grams[row // rows]) >= losses[row] * (1 - 1e-5)


def test_a_given_grid_is_kept_and_dead_inputs_do_no_harm() -> None:
    weight, grams = problem(3, 1, 9)
    grams[1] = 0
    grams[2, 4] = grams[2, :, 4] = 0
    fmt = weight_format(lq.QuantizationConfig("int4", per_channel=True), weight.shape)
    scale = weight.abs().amax(1) / 6
    chosen = choose_many_small(weight, grams, fmt, scale, torch.zeros(3, dtype=torch.int32))
    assert torch.equal(chosen.scale, scale)
    assert chosen.values().isfinite().all()
    nearest = get_scheme("int4").quantize(weight, scale, None, fmt)
    assert torch.equal(chosen.codes[1], nearest[1])


def test_a_depthwise_convolution_in_a_model() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(80, 80, 3, padding=1, groups=80), nn.ReLU(), nn.Conv2d(80, 4, 1))
    batches = [randn(2, 80, 6, 6, seed=i) + 0.5 for i in range(2)]
    config = lq.QATConfig("int8", bits=4, per_channel=True, activation_bits=None)
    made = lq.quantize_model(model, config, batches, "gptq")
    outcome = lq.ptq_report(made).layer("0")
    assert outcome.method == "gptq"
    assert outcome.loss < 0.9 * outcome.nearest_loss
    with torch.no_grad():
        difference = made[0](batches[0]) - model[0](batches[0])
        difference2 = made[0](batches[1]) - model[0](batches[1])
    total = difference.square().sum() + difference2.square().sum()
    assert outcome.loss == pytest.approx(float(total), rel=1e-3)

"""Losses from the Gram matrix are those of the layers' outputs, and the plan made of them is a plan."""

from __future__ import annotations

import pytest
import torch
from ptq_models import Llama, built, tokens
from tensors import randn
from torch import nn

import lightning_qat as lq
from lightning_qat.ptq import allocate_bits, gram_sensitivity, mixed_plan


def test_the_loss_is_that_of_the_outputs() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(96, 5)).eval()
    batches = [randn(4, 4, 6, 6, seed=i) for i in range(3)]
    plan = lq.QATConfig("int8", per_channel=True, activation_bits=None)
    found = {s.name: s for s in gram_sensitivity(model, batches, plan, bits=(3, 8))}
    assert found["0"].weights == model[0].weight.numel()
    for name, layer in (("0", model[0]), ("3", model[3])):
        for bits, loss in found[name].loss.items():
            config = lq.QATConfig("int8", bits=bits, per_channel=True, activation_bits=None)
            options = lq.PTQOptions(order="one_pass")
            made = lq.quantize_model(model, config, batches, "clip", options=options).get_submodule(name)
            error = power = 0.0
            for x in batches:
                x = x if name == "0" else model[:3](x)
                with torch.no_grad():
                    right = layer(x) - layer.bias.view(-1, *[1] * (layer(x).dim() - 2))
                    error += float((made(x) - layer(x)).square().sum())
                    power += float(right.square().sum())
            assert loss == pytest.approx(error / power, rel=2e-2)


def test_one_pass_one_plan() -> None:
    model, batches = built(Llama), tokens()
    plan = lq.QuantizationPlan([lq.LayerRule("layers.*", lq.QuantizationConfig("gptq", group_size=8))])
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    sensitivities = gram_sensitivity(model, batches, plan, bits=(2, 3, 4, 6, 8), method="gptq")
    handle.remove()
    assert len(calls) <= len(batches) + 1
    assert all(s.loss[2] > s.loss[3] > s.loss[4] > s.loss[6] > s.loss[8] for s in sensitivities)
    bits = allocate_bits(sensitivities, 4.5)
    assert set(bits.values()) <= {2, 3, 4, 6, 8}
    assert len(set(bits.values())) > 1
    made = lq.quantize_model(model, mixed_plan(sensitivities, 4.5), batches)
    report = lq.ptq_report(made)
    assert report.method == "gptq"
    assert {layer.name: layer.bits for layer in report.layers} == bits


def test_what_cannot_be_compared_is_told() -> None:
    model, batches = nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 8)), tokens()
    plan = lq.QuantizationPlan([lq.LayerRule("*", lq.QuantizationConfig("int8", per_channel=True))])
    with pytest.raises(ValueError, match="layer '0' has no loss to compare: an embedding"):
        gram_sensitivity(model, batches, plan)
    with pytest.raises(ValueError, match="bits is empty"):
        gram_sensitivity(model, batches, bits=())
    with pytest.raises(ValueError, match="there is no batch"):
        gram_sensitivity(model, [])
    with pytest.raises(ValueError, match="method='awq' is not known"):
        gram_sensitivity(model, batches, method="awq")

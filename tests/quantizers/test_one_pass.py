"""Ranges that are found by the pass that fake-quantizes are those of two passes, bit for bit."""

from __future__ import annotations

from unittest.mock import Mock

import pytest
import torch
from classifier import Classifier, loader, trainer
from tensors import randn
from torch import nn

import lightning_qat as lq
from lightning_qat.ops.fake_quantize import reference_fake_quantize
from lightning_qat.ops.observe import observe_fake_quantize_op, observe_fake_quantize_through
from lightning_qat.quantizers import fake_quantizer
from lightning_qat.transforms import defer_ranges, update_ranges

SAW = fake_quantizer.ActivationQuantizer.saw


@pytest.mark.parametrize("config", ["int8", lq.QATConfig("int8", activation_symmetric=True)])
def test_a_run_is_the_same(tmp_path, monkeypatch, config):
    states, passes = [], []
    for devices in (frozenset(), frozenset({"cpu"})):
        counted = Mock(side_effect=SAW)
        monkeypatch.setattr(fake_quantizer, "ONE_PASS_DEVICES", devices)
        monkeypatch.setattr(fake_quantizer.ActivationQuantizer, "saw", lambda *args: counted(*args))  # noqa: B023
        module = Classifier(seed=2)
        callbacks = [lq.QuantizationAwareTraining(config, start_step=2, freeze_step=6)]
        trainer(tmp_path, callbacks).fit(module, loader())
        states.append({name: t for name, t in module.state_dict().items() if isinstance(t, torch.Tensor)})
        passes.append(counted.call_count)
    assert passes[0] == 0
    assert passes[1] == 4 * 2  # the steps from 2 to 5, two layers
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_batch_seen_without_gradient_counts(monkeypatch):
    monkeypatch.setattr(fake_quantizer, "ONE_PASS_DEVICES", frozenset({"cpu"}))
    ranges = []
    for grad in (True, False):
        model = lq.prepare(nn.Sequential(nn.Linear(3, 3)), "int8")
        defer_ranges(model, True)
        for step in range(3):
            with torch.set_grad_enabled(grad):
                model(torch.full((2, 3), 1.0 + step))
            update_ranges(model)
        observer = model[0].input_quantizer.observer
        ranges.append((observer.min_val.item(), observer.max_val.item()))
    assert ranges[0] == ranges[1]
    assert ranges[0][1] > 1.0


@pytest.mark.parametrize("devices", [frozenset(), frozenset({"cpu"})])
def test_a_batch_is_all_that_a_layer_was_given_in_it(monkeypatch, devices):
    monkeypatch.setattr(fake_quantizer, "ONE_PASS_DEVICES", devices)
    config = lq.QATConfig("int8", activation_observer="min_max")
    model = lq.prepare(nn.Sequential(nn.Linear(3, 3)), config)
    defer_ranges(model, True)
    model(torch.tensor([[0.5, -0.5, 0.0]]))
    update_ranges(model)
    for x in ([4.0, -1.0, 0.0], [1.0, -3.0, 0.0], [2.0, -2.0, 0.0]):
        model(torch.tensor([x]))
    update_ranges(model)
    observer = model[0].input_quantizer.observer
    assert (observer.min_val.item(), observer.max_val.item()) == (-3.0, 4.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_op(dtype):
    x = randn(33, 7).to(dtype).t()
    scale, zero = torch.tensor(0.02), torch.tensor(100, dtype=torch.int32)
    result, low, high = observe_fake_quantize_op(x, scale, zero, 0, 255)
    assert torch.equal(result, reference_fake_quantize(x, scale, zero, 0, 255, -1, 0))
    assert (low, high) == (x.min().float(), x.max().float())
    torch.library.opcheck(observe_fake_quantize_op, (x, scale, zero, 0, 255))


def test_gradient_is_that_of_fake_quantize():
    x = randn(64, 5).requires_grad_()
    scale = torch.tensor(0.01)
    grad = randn(64, 5, seed=3)
    observe_fake_quantize_through(x, scale, None, -127, 127)[0].backward(grad)
    mine, x.grad = x.grad, None
    lq.fake_quantize(x, scale).backward(grad)
    assert torch.equal(mine, x.grad)
    assert 0 < int((mine == 0).sum()) < mine.numel()


def test_between_batches_there_is_nothing_to_save():
    model = lq.prepare(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "int8").train()
    defer_ranges(model, True)
    for _ in range(2):
        model(randn(3, 4))
        assert all(layer.input_quantizer.batch_range.state() is not None for layer in model)
        update_ranges(model)
        assert all(layer.input_quantizer.batch_range.state() is None for layer in model)

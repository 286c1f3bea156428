"""A kept weight gives the numbers that making it anew gives, and is made once while the weight stands still."""

import copy
import pickle

import pytest
import torch
from tensors import randn
from torch import nn

import lightning_qat as lq
from lightning_qat.transforms.phase import keep_quantized_weights


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 3 * 3, 6, bias=False))


def prepared(plan, phase=None):
    model = lq.prepare(network(), plan)
    lq.calibrate(model, [randn(4, 3, 5, 5)])
    if phase is not None:
        lq.apply_phase(model, phase)
    return model.train()


def accumulate(model, keep, optimizer=None, steps=3, micro=4):
    optimizer = optimizer or torch.optim.Adam(model.parameters(), lr=0.05)
    losses = []
    for step in range(steps):
        keep_quantized_weights(model, keep)
        for part in range(micro):
            loss = model(randn(4, 3, 5, 5, seed=10 * step + part)).square().mean()
            loss.backward()
            losses.append(loss.detach())
        keep_quantized_weights(model, False)
        optimizer.step()
        optimizer.zero_grad()
    return losses


PLANS = {
    "int8": ("int8", None),
    "w4a8": ("w4a8", None),
    "groups": (lq.QATConfig("int4", bits=4, group_size=9, activation_bits=None), None),
    "asymmetric": (lq.QATConfig("int8", symmetric=False), None),
    "frozen": ("int8", lq.Phase(frozen=True, observing=False)),
    "float": ("int8", lq.Phase(quantizing=False)),
}


@pytest.mark.parametrize("name", PLANS)
def test_training_with_accumulation_is_bit_identical(name):
    """The witness is the same training that fake-quantizes at every forward."""
    plain, kept = prepared(*PLANS[name]), prepared(*PLANS[name])
    expected, actual = accumulate(plain, False), accumulate(kept, True)
    assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))
    for (key, a), (other, b) in zip(plain.state_dict().items(), kept.state_dict().items(), strict=True):
        assert key == other
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_each_weight_is_made_once_for_an_optimizer_step(made):
    accumulate(prepared("int8"), True, steps=3, micro=4)
    assert len(made) == 3 * 2
    made.clear()
    accumulate(prepared("int8"), False, steps=1, micro=4)
    assert len(made) >= 4 * 2


def test_each_weight_is_made_once_in_an_evaluation(made):
    model = prepared("int8").eval()
    with torch.no_grad():
        expected = [model(randn(4, 3, 5, 5, seed=i)) for i in range(3)]
        made.clear()
        keep_quantized_weights(model, True)
        assert all(torch.equal(model(randn(4, 3, 5, 5, seed=i)), expected[i]) for i in range(3))
    assert len(made) == 2


@pytest.mark.parametrize("change", ["in place", "replaced", "data replaced", "bits", "frozen scale", "phase"])
def test_what_changes_is_made_anew(change):
    phase = lq.Phase(frozen=True, observing=False) if change == "frozen scale" else None
    model, x = prepared("int8", phase).eval(), randn(4, 3, 5, 5)
    keep_quantized_weights(model, True)
    layer = model[3]
    with torch.no_grad():
        before = model(x)
        if change == "in place":
            layer.weight.mul_(1.5)
        elif change == "replaced":
            layer.weight = nn.Parameter(layer.weight * 1.5)
        elif change == "data replaced":
            layer.weight.data = layer.weight.data * 1.5
        elif change == "bits":
            lq.set_bits(model, 3)
        elif change == "frozen scale":
            layer.weight_quantizer.scale.mul_(1.5)
        else:
            lq.apply_phase(model, lq.Phase(quantizing=False))
        after = model(x)
        keep_quantized_weights(model, False)
        assert not torch.equal(before, after)
        assert torch.equal(after, model(x))


def test_computed_weights_are_not_kept():
    model = network()
    torch.nn.utils.parametrizations.weight_norm(model[3])
    lq.calibrate(lq.prepare(model, "int8"), [randn(4, 3, 5, 5)])
    keep_quantized_weights(model.eval(), True)
    x = randn(4, 3, 5, 5)
    with torch.no_grad():
        before = model(x)
        model[3].parametrizations.weight.original1.data.mul_(-1.5)
        after = model(x)
        keep_quantized_weights(model, False)
        assert torch.equal(after, model(x))
    assert not torch.equal(before, after)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_holds_nothing(copied):
    model, x = prepared("int8").eval(), randn(4, 3, 5, 5)
    keep_quantized_weights(model, True)
    with torch.no_grad():
        expected = model(x)
        other = copied(model)
        assert all(layer.weight_quantizer.kept._made is None for layer in (other[0], other[3]))
        assert torch.equal(other(x), expected)


def test_a_second_backward_through_the_same_kept_weight():
    model, x = prepared("int8"), randn(4, 3, 5, 5)
    keep_quantized_weights(model, True)
    loss = model(x).sum()
    loss.backward(retain_graph=True)
    first = [p.grad.clone() for p in model.parameters()]
    loss.backward()
    for parameter, grad in zip(model.parameters(), first, strict=True):
        assert torch.equal(parameter.grad, grad * 2)


def test_kept_in_inference_mode_it_serves_a_training_step():
    model, x = prepared("int8", lq.Phase(observing=False)), randn(4, 3, 5, 5)
    model(x).sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    keep_quantized_weights(model, True)
    with torch.inference_mode():
        model(x)
    model(x).sum().backward()
    assert all(torch.equal(p.grad, e) for p, e in zip(model.parameters(), expected, strict=True))

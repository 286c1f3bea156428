"""The quantization penalty and ``qat_loss``, against the same formulas written out for autograd."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

import lightning_qat as lq
from lightning_qat.transforms.penalty import add_penalty_gradient, matched_layers


def model(dtype=torch.float64, config="w4a8"):
    torch.manual_seed(0)
    made = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 5), nn.Linear(5, 3)).to(dtype)
    return lq.prepare(made, config)


def by_hand(made, match=("0", "2", "3")):
    """Return the penalty as a graph of ordinary operations."""
    errors = []
    for name in match:
        layer = made.get_submodule(name)
        quantized = layer.quantized_weight().detach()
        errors.append((layer.weight - quantized).square().sum() / layer.weight.detach().square().sum())
    return torch.stack(errors)


CONFIGS = ["int8", "w4a8", "nf4", lq.QATConfig("int8", bits=3, symmetric=False, activation_bits=None)]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c if isinstance(c, str) else "asymmetric 3")
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_value_and_gradient_are_those_written_out(config, reduction):
    made = model(config=config)
    expected = by_hand(made).mean() if reduction == "mean" else by_hand(made).sum()
    weights = [layer.weight for layer in matched_layers(made).values()]
    wanted = torch.autograd.grad(expected, weights)
    found = lq.quantization_penalty(made, reduction=reduction)
    assert found.dtype == torch.float64
    assert expected.item() > 1e-6  # the witness is one of something
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    for mine, theirs in zip(torch.autograd.grad(found * 3, weights), wanted, strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(mine, 3 * theirs, rtol=1e-12, atol=1e-18)
    noise = [10 ** (-lq.sqnr(layer.weight, layer.quantized_weight()) / 10) for layer in matched_layers(made).values()]
    torch.testing.assert_close(torch.stack(noise).sum().item(), by_hand(made).sum().item())


@given(
    rows=st.integers(1, 7), columns=st.integers(1, 9), bits=st.sampled_from([2, 3, 4, 8, 16]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]), zeros=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_the_gradient_alone_is_that_of_the_graph(rows, columns, bits, dtype, zeros, seed):
    torch.manual_seed(seed)
    made = nn.Sequential(nn.Linear(columns, rows)).to(dtype)
    if zeros:
        nn.init.zeros_(made[0].weight)
    lq.prepare(made, lq.QATConfig("int8", bits=bits, activation_bits=None))
    (0.37 * lq.quantization_penalty(made, reduction="sum")).backward()
    wanted = made[0].weight.grad
    made.zero_grad()
    found = add_penalty_gradient(matched_layers(made), 0.37)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-6}[dtype]
    torch.testing.assert_close(made[0].weight.grad, wanted, rtol=tolerance, atol=1e-12)
    assert found["0"].isfinite()
    assert made[0].bias.grad is None
    if zeros:
        assert not wanted.any()


def test_it_is_added_to_a_gradient_that_is_there_and_to_the_named_parameters_only():
    made, layers = model(), None
    layers = matched_layers(made)
    made(torch.randn(2, 1, 4, 4, dtype=torch.float64)).sum().backward()
    before = {name: layer.weight.grad.clone() for name, layer in layers.items()}
    wanted = torch.autograd.grad(by_hand(made).sum(), [layer.weight for layer in layers.values()])
    add_penalty_gradient(layers, 2.0, {id(layers["2"].weight)})
    for (name, layer), added in zip(layers.items(), wanted, strict=True):
        expected = before[name] + (2 * added if name == "2" else 0)
        torch.testing.assert_close(layer.weight.grad, expected, rtol=1e-12, atol=1e-16)


def test_a_computed_weight_hands_it_on():
    torch.manual_seed(0)
    made = nn.Sequential(weight_norm(nn.Linear(6, 4))).double()
    lq.prepare(made, lq.QATConfig("int8", bits=3, activation_bits=None))
    holders = list(made[0].parametrizations.weight.parameters())
    wanted = torch.autograd.grad(by_hand(made, ["0"]).sum(), holders)
    for found in (torch.autograd.grad(lq.quantization_penalty(made), holders), None):
        if found is None:
            add_penalty_gradient(matched_layers(made), 1.0)
            found = [holder.grad for holder in holders]
        for mine, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-14)


def test_float_layers_and_frozen_ones():
    made = model()
    lq.apply_phase(made, lq.Phase(quantizing=False))
    assert lq.quantization_penalty(made) == 0
    assert add_penalty_gradient(matched_layers(made), 1.0) == {}
    assert all(parameter.grad is None for parameter in made.parameters())
    lq.apply_phase(made, lq.Phase(frozen=True))
    frozen = by_hand(made).mean()
    torch.testing.assert_close(lq.quantization_penalty(made), frozen, rtol=1e-12, atol=0)
    made[2].weight.requires_grad_(False)
    assert set(add_penalty_gradient(matched_layers(made), 1.0)) == {"0", "3"}
    one = lq.quantization_penalty(made, match="3")
    torch.testing.assert_close(one, by_hand(made, ["3"]).sum(), rtol=1e-12, atol=0)


def test_nothing_but_the_weight_is_kept_for_the_backward_pass():
    made, saved = model(torch.float32), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lq.quantization_penalty(made)
    weights = {layer.weight.data_ptr() for layer in matched_layers(made).values()}
    copies = [t for t in saved if t.numel() > 5 and t.data_ptr() not in weights]
    assert {t.data_ptr() for t in saved} >= weights
    assert not copies
    penalty = lq.quantization_penalty(made)
    with torch.no_grad():
        made[0].weight.add_(1)
    with pytest.raises(RuntimeError, match="inplace"):
        penalty.backward()


def test_a_weight_may_be_learned_by_it_alone():
    made = model(torch.float32, lq.QATConfig("int8", bits=3, activation_bits=None))
    lq.apply_phase(made, lq.Phase(frozen=True))
    optimizer = torch.optim.SGD(made.parameters(), lr=0.5)
    first = lq.quantization_penalty(made).item()
    for _ in range(60):
        optimizer.zero_grad()
        lq.quantization_penalty(made, reduction="sum").backward()
        optimizer.step()
    assert lq.quantization_penalty(made).item() < first / 100


def test_faults_are_told():
    made = model()
    with pytest.raises(ValueError, match=r"match='tail' matches no prepared layer"):
        lq.quantization_penalty(made, match="tail")
    with pytest.raises(ValueError, match="reduction='max'"):
        lq.quantization_penalty(made, reduction="max")
    with pytest.raises(ValueError, match="prepare first"):
        lq.quantization_penalty(nn.Linear(2, 2))
    with torch.no_grad():
        made[2].weight.grad = torch.zeros_like(made[2].weight).to_sparse()
    with pytest.raises(ValueError, match="layer '2' has sparse gradients"):
        add_penalty_gradient(matched_layers(made), 1.0)


def test_the_task_loss_is_chosen_by_the_targets():
    torch.manual_seed(0)
    logits, classes = torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 2, 1, 1])
    values, error = torch.randn(4, 3, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64)
    cross = F.cross_entropy(logits, classes)
    torch.testing.assert_close(lq.qat_loss(logits, classes, error, 0.1), cross + 0.05)
    torch.testing.assert_close(lq.qat_loss(logits, values, error, 0.1), F.mse_loss(logits, values) + 0.05)
    probabilities = values.softmax(1)
    found = lq.qat_loss(logits, probabilities, 0.5, 0.1, task_loss="cross_entropy")
    torch.testing.assert_close(found, F.cross_entropy(logits, probabilities) + 0.05)
    torch.testing.assert_close(lq.qat_loss(cross, None, error, 2), cross + 1)
    torch.testing.assert_close(lq.qat_loss(logits, values, 0.5, 1.0, task_loss=F.l1_loss),
                               F.l1_loss(logits, values) + 0.5)  # fmt: skip
    images, labels = torch.randn(2, 3, 4, 4), torch.randint(3, (2, 4, 4))
    torch.testing.assert_close(lq.qat_loss(images, labels, 0.0, 1.0), F.cross_entropy(images, labels))
    torch.testing.assert_close(lq.qat_loss(logits[0], classes[0], 0.0, 1.0), F.cross_entropy(logits[0], classes[0]))


@pytest.mark.parametrize("errors", [[0.1, 0.4], {"a": torch.tensor(0.1), "b": 0.4}, (torch.tensor([0.5]),), 0.5,
                                    (e for e in (0.25, torch.tensor(0.25)))],
                         ids=["list", "dict", "one", "number", "generator"])  # fmt: skip
def test_errors_of_layers_are_summed(errors):
    assert lq.qat_loss(torch.tensor(1.0), None, errors, 2.0).item() == pytest.approx(2.0)


def test_the_gradient_of_qat_loss_is_that_of_both():
    made = model()
    x, y = torch.randn(4, 1, 4, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    weights = [layer.weight for layer in matched_layers(made).values()]
    logits = made(x)
    wanted = torch.autograd.grad(F.cross_entropy(logits, y) + 0.2 * by_hand(made).mean(), weights, retain_graph=True)
    found = torch.autograd.grad(lq.qat_loss(logits, y, lq.quantization_penalty(made), 0.2), weights)
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-15)


WRONG = {
    "alpha=-1": ((torch.zeros(()), None, 0.0, -1), ValueError),
    "alpha=nan": ((torch.zeros(()), None, 0.0, math.nan), ValueError),
    "alpha=True": ((torch.zeros(()), None, 0.0, True), ValueError),
    "predictions is a list": (([1.0], None, 0.0, 1), TypeError),
    r"a scalar; its shape is \(2,\)": ((torch.zeros(2), None, 0.0, 1), ValueError),
    "targets is a int": ((torch.zeros(2), 1, 0.0, 1), TypeError),
    "targets of dtype torch.bool": ((torch.zeros(2, 2), torch.ones(2, dtype=torch.bool), 0.0, 1), ValueError),
    r"must have the shape \(2,\)": ((torch.zeros(2, 2), torch.zeros(3).long(), 0.0, 1), ValueError),
    r"must have the shape \(2, 1\)": ((torch.zeros(2, 1), torch.zeros(2), 0.0, 1), ValueError),
    r"a tensor of shape \(3,\)": ((torch.zeros(()), None, torch.zeros(3), 1), ValueError),
    "quantization_error is empty": ((torch.zeros(()), None, [], 1), ValueError),
    "quantization_error is a str": ((torch.zeros(()), None, "much", 1), TypeError),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_told(message):
    arguments, error = WRONG[message]
    with pytest.raises(error, match=message):
        lq.qat_loss(*arguments)
    with pytest.raises(ValueError, match="task_loss='hinge'"):
        lq.qat_loss(torch.zeros(2, 2), torch.zeros(2).long(), 0.0, 1, task_loss="hinge")

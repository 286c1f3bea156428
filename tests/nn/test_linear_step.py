"""A Linear's step in one is the general path's to the bit, and that of layers without native kernels."""

from __future__ import annotations

import contextlib
import copy
from unittest.mock import Mock

import pytest
import torch
from tensors import randn
from torch import nn
from torch.utils.checkpoint import checkpoint

import lightning_qat as lq
from lightning_qat.native.fake_quantize import has_kernels
from lightning_qat.native.library import without_native
from lightning_qat.nn import linear, linear_step
from lightning_qat.transforms import (
    Phase,
    apply_phase,
    calibrate,
    defer_ranges,
    prepare,
    update_ranges,
)
from lightning_qat.transforms.phase import keep_quantized_weights

pytestmark = pytest.mark.skipif(not has_kernels(torch.empty(1)), reason="no C++ compiler")

CONFIGS = {
    "int8": "int8",
    "w4a8": "w4a8",
    "dynamic": "int8_dynamic",
    "weight only": "int8_weight_only",
    "one scale": lq.QATConfig("int8"),
    "asymmetric": lq.QATConfig("int8", per_channel=True, symmetric=False),
    "narrow": lq.QATConfig("int4", bits=4, activation_bits=3, activation_symmetric=True),
    "groups": lq.QATConfig("int4", bits=4, group_size=8),
    "learned": lq.QATConfig("int8", per_channel=True, learnable_step_size=True),
    "learned, one scale": lq.QATConfig("int4", bits=4, activation_bits=4, learnable_step_size=True),
    "learned, symmetric": lq.QATConfig(
        "int4", bits=4, per_channel=True, learnable_step_size=True, activation_symmetric=True
    ),
}
PHASES = [Phase(), Phase(observing=False, frozen=True), Phase(quantizing=False)]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16, bias=False), nn.LayerNorm(16), nn.Linear(16, 8)
    )


def train(config, phase, shape=(5, 3, 16)) -> dict[str, torch.Tensor]:
    """Return all numbers after three steps, whose inputs grow out of their ranges, and the last gradients."""
    model = prepare(network(), config)
    calibrate(model, [randn(*shape)])
    apply_phase(model, phase)
    model.train()
    defer_ranges(model, True)
    optimizer = torch.optim.SGD(lq.quantization_param_groups(model, lr=0.05, quantization_lr=1e-4))
    inputs = None
    for step in range(3):
        optimizer.zero_grad()
        inputs = (randn(*shape, seed=step) * (1.0 + 0.4 * step)).requires_grad_()
        model(inputs).square().mean().backward()
        optimizer.step()
        update_ranges(model)
    found = {name: t for name, t in model.state_dict().items() if isinstance(t, torch.Tensor)}
    gradients = {f"{name} gradient": p.grad for name, p in model.named_parameters()}
    return {**found, **gradients, "input gradient": inputs.grad}


def differing(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    assert a.keys() == b.keys()
    return [name for name in a if not (a[name] is b[name] or torch.equal(a[name], b[name]))]


@pytest.mark.parametrize("phase", PHASES, ids=["observing", "frozen", "float inputs"])
@pytest.mark.parametrize("name", CONFIGS)
def test_all_numbers_are_those_of_the_general_path(monkeypatch, name, phase):
    taken = Mock(side_effect=linear_step._Linear.forward)
    monkeypatch.setattr(linear_step._Linear, "forward", lambda *args: taken(*args))
    found = train(CONFIGS[name], phase)
    frozen_learned = "learned" in name and phase.frozen
    assert taken.called == (phase.quantizing and not frozen_learned)
    monkeypatch.setattr(linear, "linear_in_one_step", lambda *args: None)
    assert differing(found, train(CONFIGS[name], phase)) == []


@pytest.mark.parametrize("phase", PHASES[:2], ids=["observing", "frozen"])
@pytest.mark.parametrize("name", [name for name in CONFIGS if "learned" not in name])
def test_all_numbers_are_those_of_pytorch_alone(name, phase):
    found = train(CONFIGS[name], phase)
    with without_native():
        assert differing(found, train(CONFIGS[name], phase)) == []


@pytest.mark.parametrize("name", [name for name in CONFIGS if "learned" in name])
def test_learned_scales_are_those_of_pytorch_alone_up_to_the_order_of_sums(name):
    found = train(CONFIGS[name], Phase())
    with without_native():
        expected = train(CONFIGS[name], Phase())
    for key, value in expected.items():
        if value is not None and "extra" not in key:
            # Sums of rounding errors, of half a step at most, which may cancel; the values are up to 127 steps, so
            # their last bit (2^-24) is 1.5e-5 of such an error, and how a product or a quotient rounds shows.
            atol = max(1e-5, 3e-5 * value.abs().max().item()) if key.endswith("exponent gradient") else 1e-5
            torch.testing.assert_close(found[key], value, rtol=1e-5, atol=atol, msg=lambda m, key=key: f"{key}: {m}")


def test_gradients_are_those_of_float_training_where_nothing_is_rounded():
    """The witness: a float layer whose input and weight lie on the grid."""
    layer = nn.Linear(4, 3)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[127.0, -64, 3, 0], [1, 127, -127, 5], [127, 100, 2, -1]]) / 127)
    model = prepare(nn.Sequential(copy.deepcopy(layer)), lq.QATConfig("int8", per_channel=True, activation_bits=None))
    apply_phase(model, Phase())
    x, y = randn(5, 4).requires_grad_(), randn(5, 4).requires_grad_()
    with torch.no_grad():
        y.copy_(x)
    grad = randn(5, 3, seed=2)
    model.train()(x).backward(grad)
    layer(y).backward(grad)
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-6, atol=1e-6)
    assert torch.equal(model[0].weight.grad, layer.weight.grad)
    assert torch.equal(model[0].bias.grad, layer.bias.grad)


def test_elements_outside_a_frozen_range_get_no_gradient():
    model = prepare(nn.Sequential(nn.Linear(4, 3)), "int8")
    calibrate(model, [torch.linspace(-1, 1, 8).view(2, 4)])
    apply_phase(model, Phase(observing=False, frozen=True))
    x = torch.tensor([[0.5, 1.5, -0.5, -1.5]], requires_grad=True)
    model.train()(x).sum().backward()
    assert (x.grad != 0).tolist() == [[True, False, True, False]]


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_gives_the_same(reentrant):
    found = []
    for around in (lambda f, x: f(x), lambda f, x: checkpoint(f, x, use_reentrant=reentrant)):
        model = prepare(network(), "int8")
        calibrate(model, [randn(5, 16)])
        apply_phase(model, Phase())
        defer_ranges(model.train(), True)
        x = randn(5, 16, seed=3).requires_grad_()
        around(model, x).square().mean().backward()
        update_ranges(model)
        numbers = {name: t for name, t in model.state_dict().items() if isinstance(t, torch.Tensor)}
        found.append({**numbers, "x": x.grad, **{f"{n} gradient": p.grad for n, p in model.named_parameters()}})
    assert differing(*found) == []


def kept_for_backward(model: nn.Module, x: torch.Tensor) -> dict[tuple[int, ...], int]:
    """Return shape -> bytes that a forward pass keeps, each tensor's memory once."""
    found = {}

    def pack(tensor):
        found[tensor.untyped_storage().data_ptr()] = (tuple(tensor.shape), tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(x)
    assert output.requires_grad
    kept = {}
    for shape, size in found.values():
        kept[shape] = kept.get(shape, 0) + size
    return kept


@pytest.mark.parametrize(
    ("before", "share"),
    [(nn.LayerNorm(64), 0.25), (nn.GELU(), 1.25), (nn.ReLU(), 1.0), (nn.Sequential(nn.Tanh(), nn.Flatten()), 1.0)],
    ids=["norm", "gelu", "relu", "view of tanh"],
)
def test_an_input_that_nobody_else_keeps_is_kept_as_codes(before, share):
    """Of float training: the normalization's result, GELU's argument and result, ReLU's and Tanh's results."""
    model = prepare(nn.Sequential(nn.Linear(4, 64), before, nn.Linear(64, 3)), "int8")
    x = randn(50, 4)
    calibrate(model, [x])
    apply_phase(model, Phase())
    kept = kept_for_backward(model.train(), x)[50, 64]
    alone = 50 * 64 * 4
    assert kept == alone * (share + (1.0 if isinstance(before, nn.LayerNorm) else 0.0))


@pytest.mark.parametrize("far", [0, 40, 3000], ids=["inside", "listed", "too many"])
def test_codes_give_the_gradients_of_kept_inputs(monkeypatch, far):
    found = []
    for keeps in (True, False):
        torch.manual_seed(0)
        model = prepare(nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 3)), "int8")
        calibrate(model, [randn(100, 64)])
        apply_phase(model, Phase(observing=False, frozen=True))
        if not keeps:
            monkeypatch.setattr(linear_step.StepInput, "_may_keep_codes", lambda self, x: False)
        with torch.no_grad():
            model[0].bias[: far // 100 + 1].add_(9.0 if far else 0.0)
            if far == 40:
                model[0].bias.zero_()
                model[0].weight.fill_(1.2)
        x = randn(100, 64, seed=4).requires_grad_()
        model.train()(x).square().sum().backward()
        found.append({"x": x.grad, **{name: p.grad for name, p in model.named_parameters()}})
    assert differing(*found) == []


@pytest.mark.parametrize("name", ["int8", "asymmetric", "learned", "groups"])
@pytest.mark.parametrize("phase", PHASES[:2], ids=["observing", "frozen"])
def test_kept_weights_give_the_same(monkeypatch, name, phase):
    taken = Mock(side_effect=linear_step._Linear.forward)
    monkeypatch.setattr(linear_step._Linear, "forward", lambda *args: taken(*args))
    found = []
    for keep in (False, True):
        taken.reset_mock()
        model = prepare(network(), CONFIGS[name])
        calibrate(model, [randn(5, 16)])
        apply_phase(model, phase)
        keep_quantized_weights(model.train(), keep)
        for step in range(2):
            model(randn(5, 16, seed=step)).square().mean().backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
        assert taken.call_count == (0 if "learned" in name and phase.frozen else 6)
    assert differing(*found) == []


def test_nan_is_told_with_the_layer():
    model = prepare(nn.Sequential(nn.Linear(4, 3)), "int8")
    calibrate(model, [randn(2, 4)])
    defer_ranges(model.train(), True)
    with pytest.raises(ValueError, match="layer '0' observed NaN"):
        model(torch.full((2, 4), float("nan")))


@pytest.mark.parametrize("what", ["autocast", "half", "no gradient", "debugged", "parametrized"])
def test_others_take_the_general_path(monkeypatch, what):
    monkeypatch.setattr(linear_step._Linear, "forward", Mock(side_effect=AssertionError))
    layer = nn.Linear(4, 3)
    if what == "parametrized":
        layer = nn.utils.parametrizations.weight_norm(layer)
    model = prepare(nn.Sequential(layer), "int8")
    calibrate(model, [randn(2, 4)])
    apply_phase(model, Phase())
    model.train()
    x = randn(2, 4)
    if what == "half":
        model, x = model.bfloat16(), x.bfloat16()
    if what == "debugged":
        model[0].input_quantizer.debug_callback = lambda *args: None
    context = {"autocast": torch.autocast("cpu", torch.bfloat16), "no gradient": torch.no_grad()}
    with context.get(what, contextlib.nullcontext()):
        assert model(x).shape == (2, 3)


@pytest.mark.parametrize("shape", [(5, 3, 16), (5, 16), (16,)])
@pytest.mark.parametrize("name", ["int8", "weight only", "learned"])
def test_the_output_may_be_changed_in_place(name, shape):
    """PyTorch's product of a sequence is a view, which a step of autograd may not return for that."""
    found = []
    for inplace in (False, True):
        torch.manual_seed(0)
        model = prepare(nn.Sequential(nn.Linear(16, 8), nn.ReLU(inplace)), CONFIGS[name])
        calibrate(model, [randn(*shape)])
        x = randn(*shape, seed=1).requires_grad_()
        model.train()(x).square().sum().backward()
        found.append([x.grad, model[0].weight.grad, model[0].bias.grad])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))

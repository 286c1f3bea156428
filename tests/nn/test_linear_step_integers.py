"""Large layers: a step's output is the product of integers that the converted layer computes."""

from __future__ import annotations

import math
from unittest.mock import Mock

import pytest
import torch
from tensors import randn
from torch import nn
from torch.utils.checkpoint import checkpoint

import lightning_qat as lq
from lightning_qat.native import weight_codes
from lightning_qat.native.fake_quantize import has_kernels
from lightning_qat.nn import linear_step
from lightning_qat.ops.step_product import _takes_plain_weights
from lightning_qat.transforms import Phase, apply_phase, calibrate, defer_ranges, prepare, update_ranges
from lightning_qat.transforms.phase import keep_quantized_weights

pytestmark = pytest.mark.skipif(
    not has_kernels(torch.empty(1)) or not _takes_plain_weights(), reason="no C++ compiler, or no exact kernel"
)

TOKENS, IN, OUT = 300, 256, 224  # more products than the fewest

CONFIGS = {
    "int8": "int8",
    "w4a8": "w4a8",
    "one scale": lq.QATConfig("int8"),
    "narrow": lq.QATConfig("int4", bits=4, per_channel=True, activation_bits=3, activation_symmetric=True),
    "dynamic range": "int8_dynamic_per_tensor",
    "learned": lq.QATConfig("int8", per_channel=True, learnable_step_size=True),
    "learned, one scale": lq.QATConfig("int4", bits=4, activation_bits=4, learnable_step_size=True),
}
OTHERS = {
    "asymmetric weights": lq.QATConfig("int8", per_channel=True, symmetric=False),
    "groups": lq.QATConfig("int4", bits=4, group_size=32),
    "weight only": "int8_weight_only",
    "ranges of tokens": "int8_dynamic",
    "wide inputs": lq.QATConfig("int8", per_channel=True, activation_bits=16),
}
PHASES = [Phase(), Phase(observing=False, frozen=True)]
PHASE_NAMES = ["observing", "frozen"]


@pytest.fixture
def products(monkeypatch):
    """Count the products of integers."""
    counted = Mock(side_effect=linear_step.codes_product)
    monkeypatch.setattr(linear_step, "codes_product", counted)
    return counted


def layer(config, phase, bias=True) -> nn.Module:
    torch.manual_seed(0)
    model = prepare(nn.Sequential(nn.Linear(IN, OUT, bias=bias)), config)
    calibrate(model, [randn(TOKENS, IN)])
    apply_phase(model, phase)
    defer_ranges(model.train(), True)
    return model


def step(model, x, grad) -> dict[str, torch.Tensor]:
    """Return the output, all gradients and the state after a step."""
    x = x.clone().requires_grad_()
    output = model(x)
    output.backward(grad)
    update_ranges(model)
    state = {name: t for name, t in model.state_dict().items() if isinstance(t, torch.Tensor)}
    gradients = {f"{name} gradient": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {**state, **gradients, "input gradient": x.grad, "output": output.detach()}


@pytest.mark.parametrize("shape", [(TOKENS, IN), (3, TOKENS // 3, IN)])
@pytest.mark.parametrize("phase", PHASES, ids=PHASE_NAMES)
@pytest.mark.parametrize("name", CONFIGS)
def test_all_but_the_output_is_the_general_paths_to_the_bit(monkeypatch, products, name, phase, shape):
    """The output, too, up to what float32 sums round; so the gradients, of the same output gradient, are compared."""
    if "learned" in name and phase.frozen:
        pytest.skip("frozen scales that were learned take the general path")
    x, grad = randn(*shape, seed=1) * 1.2, randn(*shape[:-1], OUT, seed=2)
    found = step(layer(CONFIGS[name], phase), x, grad)
    assert products.call_count == 1
    monkeypatch.setattr(linear_step, "product_pays", lambda *args: False)
    expected = step(layer(CONFIGS[name], phase), x, grad)
    assert products.call_count == 1
    torch.testing.assert_close(found.pop("output"), expected.pop("output"), rtol=1e-5, atol=2e-5)
    assert found.keys() == expected.keys()
    assert [key for key in found if not torch.equal(found[key], expected[key])] == []


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ["int8", "w4a8", "one scale", "narrow"])
def test_the_output_is_what_the_converted_layer_computes(products, name, bias):
    model = layer(CONFIGS[name], PHASES[1], bias)
    x = (randn(TOKENS, IN, seed=3) * 1.1).requires_grad_()
    trained = model(x).detach()
    assert products.called
    converted = lq.convert(model.eval())
    with torch.no_grad():
        assert torch.equal(trained, converted(x.detach()))


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", [*CONFIGS, "int8, training"])
def test_validation_computes_what_training_does(products, name, around):
    model = layer(CONFIGS[name.removesuffix(", training")], PHASES[0]).train("training" in name)
    x = randn(TOKENS, IN, seed=8)
    trained = model(x.clone().requires_grad_()).detach()
    with around():
        assert torch.equal(model(x.clone()), trained)
    assert products.call_count == 2


@pytest.mark.parametrize("name", OTHERS)
def test_others_are_products_of_floats(products, name):
    model = layer(OTHERS[name], PHASES[0])
    assert model(randn(TOKENS, IN).requires_grad_()).shape == (TOKENS, OUT)
    assert not products.called


@pytest.mark.parametrize("name", ["int8", "one scale", "learned"])
def test_kept_weights_give_the_same(products, name):
    found = []
    for keep in (False, True):
        model = layer(CONFIGS[name], PHASES[0])
        keep_quantized_weights(model, keep)
        steps = [step(model, randn(TOKENS, IN, seed=i), randn(TOKENS, OUT, seed=i)) for i in range(2)]
        found.append({f"{i} {key}": value for i, each in enumerate(steps) for key, value in each.items()})
    assert products.call_count == 4
    assert [key for key in found[0] if not torch.equal(found[0][key], found[1][key])] == []


@pytest.mark.parametrize("shape", [(TOKENS, IN), (3, TOKENS // 3, IN)])
@pytest.mark.parametrize("name", ["int8", "learned"])
def test_the_output_may_be_changed_in_place(products, name, shape):
    found = []
    for inplace in (False, True):
        model = nn.Sequential(layer(CONFIGS[name], PHASES[0])[0], nn.ReLU(inplace))
        found.append(step(model, randn(*shape, seed=1), randn(*shape[:-1], OUT, seed=2)))
    assert products.call_count == 2
    assert [key for key in found[0] if not torch.equal(found[0][key], found[1][key])] == []


@pytest.mark.parametrize("name", ["int8", "learned"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_gives_the_same(products, reentrant, name):
    ways = (lambda f, x: f(x), lambda f, x: checkpoint(f, x, use_reentrant=reentrant))
    found = [_step_around(layer(CONFIGS[name], PHASES[0]), around) for around in ways]
    assert products.call_count == 3
    assert [key for key in found[0] if not torch.equal(found[0][key], found[1][key])] == []


def _step_around(model, around):
    x = randn(TOKENS, IN, seed=5).requires_grad_()
    output = around(model, x)
    output.backward(randn(TOKENS, OUT, seed=6))
    update_ranges(model)
    state = {name: t for name, t in model.state_dict().items() if isinstance(t, torch.Tensor)}
    return {**state, **{f"{n} gradient": p.grad for n, p in model.named_parameters()}, "x": x.grad, "y": output}


@pytest.mark.parametrize("where", ["input", "weight"])
def test_nan_goes_the_way_of_floats(products, where):
    model = layer("int8", PHASES[1])
    if where == "weight":
        apply_phase(model, PHASES[0])
        with torch.no_grad():
            model[0].weight[5, 7] = math.nan
    x = randn(TOKENS, IN)
    if where == "input":
        x[3, 4] = math.nan
    output = model(x.requires_grad_())
    assert not products.called
    bad = output[3] if where == "input" else output[:, 5]
    assert bad.isnan().all()
    assert int(output.isnan().sum()) == bad.numel()


def test_the_way_is_taken_again_in_a_run_that_goes_on(products):
    """Which product it is depends on shapes and formats: nothing that a checkpoint would have to hold."""
    runs = []
    for interrupted in (False, True):
        model = layer("int8", PHASES[0])
        for i in range(3):
            found = step(model, randn(TOKENS, IN, seed=i), randn(TOKENS, OUT, seed=i))
            if interrupted:
                state = {key: value.clone() if isinstance(value, torch.Tensor) else value
                         for key, value in model.state_dict().items()}  # fmt: skip
                model = layer("int8", PHASES[0])
                model.load_state_dict(state)
            model.zero_grad()
        runs.append(found)
    assert products.call_count == 6
    assert [key for key in runs[0] if not torch.equal(runs[0][key], runs[1][key])] == []


def test_one_family_that_is_not_compiled(monkeypatch, products):
    """As where the disk is full by then: the others are used without it."""
    monkeypatch.setattr(weight_codes._FAMILY, "functions", lambda: None)
    found = step(layer("int8", PHASES[0]), randn(TOKENS, IN), randn(TOKENS, OUT))
    monkeypatch.setattr(linear_step, "product_pays", lambda *args: False)
    expected = step(layer("int8", PHASES[0]), randn(TOKENS, IN), randn(TOKENS, OUT))
    assert not products.called
    assert [key for key in found if not torch.equal(found[key], expected[key])] == []

"""What a Linear's step in one meets besides ordinary training: modes, checkpoints, no kernels any more."""

from __future__ import annotations

import contextlib

import pytest
import torch
from tensors import randn
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import lightning_qat as lq
from lightning_qat.native.fake_quantize import has_kernels
from lightning_qat.native.library import without_native
from lightning_qat.nn import linear
from lightning_qat.transforms import Phase, apply_phase, calibrate, defer_ranges, prepare, update_ranges

pytestmark = pytest.mark.skipif(not has_kernels(torch.empty(1)), reason="no C++ compiler")

CONFIGS = {
    "int8": "int8",
    "dynamic": "int8_dynamic",
    "weight only": "int8_weight_only",
    "asymmetric": lq.QATConfig("int8", per_channel=True, symmetric=False),
    "groups": lq.QATConfig("int4", bits=4, group_size=8),
    "learned": lq.QATConfig("int8", per_channel=True, learnable_step_size=True),
    "learned, one scale": lq.QATConfig("int4", bits=4, activation_bits=4, learnable_step_size=True),
}


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16, bias=False), nn.Linear(16, 8))


def differing(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    assert a.keys() == b.keys()
    return [name for name in a if not (a[name] is b[name] or torch.equal(a[name], b[name]))]


class _Seeing(TorchDispatchMode):
    """Sees every operation and does it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def step(config, phase=None, *, around=contextlib.nullcontext, change=lambda model: None, before=()):
    """Return all gradients of one step, whose backward pass is ``around``."""
    torch.manual_seed(0)
    model = prepare(nn.Sequential(*before, *network()), config)
    calibrate(model, [randn(5, 16)])
    apply_phase(model, phase or Phase(observing=False))
    defer_ranges(model.train(), True)
    change(model)
    x = (randn(5, 16, seed=3) * 1.5).requires_grad_()
    loss = model(x).square().mean()
    with around():
        loss.backward()
    return {"x": x.grad, **{name: p.grad for name, p in model.named_parameters()}}


@pytest.mark.parametrize("around", [without_native, _Seeing], ids=["switched off", "seen by a mode"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_backward_pass_without_kernels_gives_the_same(name, around):
    found, expected = step(CONFIGS[name], around=around), step(CONFIGS[name])
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=2e-5 if "learned" in key else 1e-6)
    kept = step("int8", around=around, before=[nn.LayerNorm(16)]), step("int8", before=[nn.LayerNorm(16)])
    assert differing(*kept) == []


@pytest.mark.parametrize("name", ["int8", "asymmetric", "groups", "dynamic", "weight only"])
def test_a_graph_of_operations_computes_what_the_model_does(name):
    """What kernels wrote to an address was missing in it: it computed with memory as it came."""
    model = prepare(network(), CONFIGS[name])
    calibrate(model, [randn(5, 16)])
    apply_phase(model, Phase(observing=False, frozen=name == "asymmetric"))
    for train in (True, False):
        model.train(train)
        x, y = randn(5, 16, seed=1), randn(5, 16, seed=2)
        assert torch.equal(make_fx(model)(x)(y), model(y))


@pytest.mark.parametrize("how", [lambda t: t.double(), lambda t: t.to(torch.float16)], ids=["float64", "float16"])
def test_scales_of_other_dtypes_are_read_as_they_are(how):
    """As ``load_state_dict(assign=True)`` leaves them."""

    def change(model):
        for quantizer in (model[0].input_quantizer, model[0].weight_quantizer):
            quantizer._buffers["scale"] = how(torch.full_like(quantizer.scale, 0.03125))
            quantizer._buffers["zero_point"] = quantizer.zero_point.long()

    phase = Phase(observing=False, frozen=True)
    expected = step("int8", phase, change=lambda model: [q.scale.fill_(0.03125) for q in (
        model[0].input_quantizer, model[0].weight_quantizer)])  # fmt: skip
    assert differing(step("int8", phase, change=change), expected) == []


def test_a_learned_scale_begins_with_the_weight_that_it_first_quantizes(monkeypatch):
    """Its zero point too: at the end of the grid there is one way for it to go."""
    config = lq.QATConfig("int8", bits=2, per_channel=True, symmetric=False, learnable_step_size=True)

    def change(model):
        with torch.no_grad():
            model[0].weight.abs_().neg_()

    found = step(config, change=change)
    monkeypatch.setattr(linear, "linear_in_one_step", lambda *args: None)
    expected = step(config, change=change)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6)


def test_activation_checkpointing_where_a_range_moves_before_it_is_made_again():
    """Of what lies outside it was too much to list at first."""
    model = prepare(
        nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64)), lq.QATConfig("int8", activation_observer="min_max")
    )
    layer = model[1].input_quantizer
    calibrate(model, [randn(5, 64)])
    for bound in (layer.observer.min_val, layer.observer.max_val):
        bound.mul_(0.01)
    layer.refresh()
    apply_phase(model, Phase())
    defer_ranges(model.train(), True)
    x = randn(200, 64, seed=3).requires_grad_()
    hidden = checkpoint(model, x, use_reentrant=False)
    update_ranges(model)
    hidden.square().mean().backward()
    assert x.grad.isfinite().all()


def test_memory_of_another_sign_is_read_as_its_values():
    model = prepare(nn.Sequential(nn.Linear(1, 1, bias=False)), "int8")
    calibrate(model, [torch.ones(1, 1)])
    x = torch.tensor([[0.25 + 0.5j]]).conj().imag
    assert x.is_neg()
    expected = model.train()(torch.tensor([[-0.5]]))
    assert torch.equal(model(x.requires_grad_()), expected)


@pytest.mark.parametrize("to", [0.0, 1.0])
@pytest.mark.parametrize("per_channel", [False, True])
def test_what_is_learned_may_move_before_the_backward_pass(to, per_channel):
    """As where one model steps between the passes of another; at the grid's ends a zero point has one way to go."""
    config = lq.QATConfig(
        "int4", activation_bits=4, symmetric=False, per_channel=per_channel, group_size=None, learnable_step_size=True
    )
    models = []

    @contextlib.contextmanager
    def moved():
        with torch.no_grad():
            for name, parameter in models[-1].named_parameters():
                if name.endswith(("exponent", "offset")):
                    parameter.fill_(to)
        yield

    assert differing(step(config, change=models.append, around=moved), step(config)) == []

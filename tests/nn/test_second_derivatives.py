"""Gradients of gradients, and torch.func, are those of the straight-through estimator in PyTorch alone."""

from __future__ import annotations

import copy

import pytest
import torch
from tensors import randn
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import lightning_qat as lq
from lightning_qat.native.fake_quantize import has_kernels
from lightning_qat.native.library import without_native
from lightning_qat.nn import QATLayer
from lightning_qat.ops.fake_quantize import EDGE, quant_range
from lightning_qat.schemes import rows_of, rows_to
from lightning_qat.transforms.prepare import qat_layers
from lightning_qat.transforms.ranges import deferred_ranges

GROUPS = lq.QATConfig("int4", bits=4, group_size=8, activation_bits=None)
CONFIGS = {
    "int8": "int8",
    "one scale": lq.QATConfig("int8"),
    "symmetric, 4 bits": lq.QATConfig("int4", bits=4, activation_bits=4, activation_symmetric=True),
    "per token": "int8_dynamic",
    "weight only": "int8_weight_only",
    "groups": GROUPS,
    "nf4": "nf4",
    "llm_int8": "llm_int8",
}


def linears(width: int = 16) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))


def convolutions() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 4, 2), nn.Flatten(), nn.Linear(144, 1))


NETWORKS = {"linears": (linears, (6, 16)), "convolutions": (convolutions, (3, 2, 7, 7))}


def inside(x: Tensor, scale: Tensor, zero_point: Tensor | None, fmt) -> Tensor:
    """Where an element has a code of its own, as the README of the ops says it."""
    if fmt.scheme in ("nf4", "llm_int8"):
        return torch.ones_like(x, dtype=torch.bool)
    low, high = quant_range(fmt.bits, fmt.symmetric)
    zero = 0 if fmt.symmetric or zero_point is None else zero_point.reshape(-1, 1)
    step = scale.reshape(-1, 1)
    if fmt.dynamic and fmt.dynamic_range == "token":  # of convolutions: sample
        rows = x.reshape(scale.numel(), -1)
        return ((rows > (low - EDGE) * step) & (rows < (high + EDGE) * step)).reshape(x.shape)
    rows = rows_of(x, fmt)
    return rows_to((rows > (low - zero - EDGE) * step) & (rows < (high - zero + EDGE) * step), x, fmt)


class Witness(nn.Module):
    """A float layer whose weight and input are replaced by PyTorch's own words for a straight-through estimator."""

    def __init__(self, layer: QATLayer) -> None:
        super().__init__()
        self.quantizers = [layer.weight_quantizer, layer.input_quantizer]
        self.float_layer = copy.deepcopy(layer)
        self.float_layer.__class__ = layer.float_class
        for name in ("weight_quantizer", "input_quantizer"):
            self.float_layer._modules.pop(name)

    def replaced(self, quantizer, x: Tensor) -> Tensor:
        if quantizer is None:
            return x
        with torch.no_grad():
            source = x.detach().clone()
            parameters = quantizer.parameters_now(source)
            values = quantizer(source)
            mask = inside(source, *parameters)
        return values + torch.where(mask, x - x.detach(), torch.zeros_like(x))

    def forward(self, x: Tensor) -> Tensor:
        of_weight, of_input = self.quantizers
        weight = {"weight": self.replaced(of_weight, self.float_layer.weight)}
        return functional_call(self.float_layer, weight, (self.replaced(of_input, x),))


def both(config, network: str, width: int | None = None, *, grows: bool = False) -> tuple[nn.Module, nn.Module, Tensor]:
    make, shape = NETWORKS[network]
    if config == "nf4" or config is GROUPS:
        width = width or 64
    model = make(width) if width and network == "linears" else make()
    shape = (6, width) if width and network == "linears" else shape
    x = randn(*shape, seed=1)
    lq.calibrate(lq.prepare(model, config), [x * 0.7])  # some lies outside
    lq.apply_phase(model, lq.Phase(observing=False, frozen=True))
    if grows:  # some weights lie outside the range that stands still
        with torch.no_grad():
            for _, layer in qat_layers(model):
                layer.weight.mul_(1.3)
    witness = nn.Sequential(*(Witness(m) if isinstance(m, QATLayer) else m for m in model))
    return model, witness, x


def penalty(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Return the squared norm of the input's gradient, and its own gradients."""
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(model(x).sin().sum(), x, create_graph=True)
    loss = first.square().sum() + first.mean()
    model.zero_grad()
    loss.backward()
    names = {name.replace("float_layer.", ""): p.grad for name, p in model.named_parameters()}
    return loss.detach(), names, x.grad


def assert_same(found, expected) -> None:
    loss, gradients, of_input = found
    their_loss, theirs, of_their_input = expected
    torch.testing.assert_close(loss, their_loss, rtol=1e-5, atol=1e-6)
    assert gradients.keys() == theirs.keys()
    assert sum(g is not None and bool(g.any()) for g in theirs.values()) > 2
    for name, value in theirs.items():
        if value is None or not value.any():
            assert gradients[name] is None or not gradients[name].any(), name
        else:
            torch.testing.assert_close(gradients[name], value, rtol=1e-4, atol=1e-6 * value.abs().max().item())
    torch.testing.assert_close(of_input, of_their_input, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("title", CONFIGS)
def test_a_penalty_of_gradients_trains_every_layer(title, network):
    config = CONFIGS[title]
    if network == "convolutions" and config is GROUPS:
        config = lq.QATConfig("int4", bits=4, per_channel=True, activation_bits=None)
    model, witness, x = both(config, network, grows=title not in ("nf4", "llm_int8"))
    with torch.no_grad():  # the witness computes the model
        torch.testing.assert_close(witness(x), model(x), rtol=1e-5, atol=1e-6)
    assert_same(penalty(model, x), penalty(witness, x))


@pytest.mark.parametrize("network", NETWORKS)
def test_while_ranges_are_observed_as_in_a_fit(network):
    model, witness, x = both(CONFIGS["int8"], network)
    lq.apply_phase(model.train(), lq.Phase(observing=True))
    with deferred_ranges(model):
        assert_same(penalty(model, x), penalty(witness, x))


def test_where_the_output_is_a_product_of_codes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 512), nn.GELU(), nn.Linear(512, 512))
    x = randn(64, 512, seed=1)
    lq.calibrate(lq.prepare(model, "int8"), [x])
    lq.apply_phase(model, lq.Phase(observing=False, frozen=True))
    witness = nn.Sequential(*(Witness(m) if isinstance(m, QATLayer) else m for m in model))
    assert_same(penalty(model, x), penalty(witness, x))


def test_after_a_converted_layer_too():
    for title in ("int8", "per token", "nf4", "llm_int8"):
        model, witness, x = both(CONFIGS[title], "linears", 64)
        converted = lq.convert(model.eval())
        for each in (converted, witness):
            each.requires_grad_(False)
        y, z = x.clone().requires_grad_(), x.clone().requires_grad_()
        for net, leaf in ((converted, y), (witness, z)):
            (first,) = torch.autograd.grad(net(leaf).sin().sum(), leaf, create_graph=True)
            first.square().sum().backward()
        torch.testing.assert_close(y.grad, z.grad, rtol=1e-4, atol=1e-6)


def test_the_gradient_of_a_weight_is_differentiated_or_raises():
    """As meta-learning does: a step along the weights' gradient is part of the graph."""

    def after_a_step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
        model.zero_grad()
        names, weights = zip(*model.named_parameters(), strict=True)
        gradients = torch.autograd.grad(model(x).square().sum(), weights, create_graph=True)
        sum(g.square().sum() for g in gradients).backward()
        return {n.replace("float_layer.", ""): p.grad for n, p in zip(names, weights, strict=True)}

    def assert_right(title: str) -> None:
        model, witness, x = both(CONFIGS[title], "linears", 64, grows=title != "nf4")
        found, expected = after_a_step(model, x), after_a_step(witness, x)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)

    for title in ("weight only", "nf4"):
        assert_right(title)
    with without_native():  # which keeps inputs, not their codes
        assert_right("int8")
    if has_kernels(torch.empty(1)):
        model, _, x = both("int8", "linears")
        with pytest.raises(RuntimeError, match=r"differentiate twice.*Phase\(quantizing=False\)"):
            after_a_step(nn.Sequential(nn.Linear(16, 16), nn.GELU(), *model), x.repeat(40, 1))


@pytest.mark.parametrize("layer", ["linears", "convolutions"])
def test_learned_scales_raise_and_are_not_taken_for_constants(layer):
    model, _, x = both(lq.QATConfig("int8", per_channel=True, learnable_step_size=True), layer)
    lq.apply_phase(model, lq.Phase())
    with pytest.raises(RuntimeError, match=r"learned scales.*differentiate twice.*Phase\(quantizing=False\)"):
        penalty(model, x)
    with pytest.raises(
        NotImplementedError, match=r"scales of fake quantization have no derivative under torch.func.*Phase\(observing"
    ):
        grad(lambda given: functional_call(model, given, (x,)).sum())(dict(model.named_parameters()))


# --- torch.func -----------------------------------------------------------------------------------


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("title", CONFIGS)
def test_functional_gradients_are_those_of_backward(title, network):
    config = CONFIGS[title]
    if network == "convolutions" and config is GROUPS:
        config = lq.QATConfig("int4", bits=4, per_channel=True, activation_bits=None)
    model, _, x = both(config, network)
    model.zero_grad()
    model(x).square().sum().backward()

    def loss(given, x):
        return functional_call(model, given, (x,)).square().sum()

    found = grad(loss)(weights_of(model), x)
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-4, atol=1e-5, msg=name)
    one = vmap(grad(loss), (None, 0))(weights_of(model), x[:, None])
    for name, value in one.items():
        assert value.shape == (len(x), *found[name].shape)
        if title != "llm_int8" or network == "convolutions":  # outlier columns are of all samples
            torch.testing.assert_close(value.sum(0), found[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("title", CONFIGS)
def test_jacobians_of_prepared_and_converted_models(title):
    model, witness, x = both(CONFIGS[title], "linears", 64)
    x = x[:2]
    converted = lq.convert(model.eval())
    expected = torch.autograd.functional.jacobian(witness, x)
    direction = randn(*x.shape, seed=5)
    for net in (model, converted):
        with torch.no_grad():
            value = net(x)
        for way in (jacrev, jacfwd):
            torch.testing.assert_close(way(net)(x), expected, rtol=1e-4, atol=1e-5)
        out, pull = vjp(net, x)
        torch.testing.assert_close(out, value, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(pull(torch.ones_like(out))[0], expected.sum((0, 1)), rtol=1e-4, atol=1e-5)
        out, tangent = jvp(net, (x,), (direction,))
        torch.testing.assert_close(out, value, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(tangent, (expected * direction).sum((2, 3)), rtol=1e-4, atol=1e-5)


def test_hessians():
    model, witness, x = both("int8", "linears")
    expected = torch.autograd.functional.hessian(lambda v: witness(v).sin().sum(), x[:2])
    assert expected.any()
    for net in (model, lq.convert(model.eval())):
        found = hessian(lambda v, net=net: net(v).sin().sum())(x[:2])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_jacobians_of_samples_side_by_side_through_attention():
    """As a controller linearises a model around many states: vmap of jacrev is jacrev sample by sample."""
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model, x = nn.Sequential(nn.Linear(8, 16), block, nn.Linear(16, 2)), randn(3, 5, 8)
    lq.calibrate(lq.prepare(model, "int8"), [x])
    for net in (model.eval(), lq.convert(model)):
        found = vmap(jacrev(lambda sample, net=net: net(sample[None])[0]))(x)
        expected = torch.stack([torch.autograd.functional.jacobian(lambda s, net=net: net(s[None])[0], s) for s in x])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert expected.any()


def test_every_layer_of_a_witness_is_of_a_prepared_model():
    model, witness, _ = both("int8", "convolutions")
    assert len(list(qat_layers(model))) == sum(isinstance(m, Witness) for m in witness) == 3

"""Gradients through packed weights: those of the float weight, which is not kept for them; writing to it raises."""

from __future__ import annotations

import copy
import itertools
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tensors import randn
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import lightning_qat as lq

FORMATS = ("int8_weight_only", "w4a16", "nf4", "fp4", "dynamic_tree", "llm_int8", "int8", "int8_dynamic", "w4a8")
LAYERS = {
    "linear": (lambda: nn.Linear(128, 96), (3, 5, 128)),
    "conv1d": (lambda: nn.Conv1d(32, 8, 4), (2, 32, 9)),
    "conv2d": (lambda: nn.Conv2d(32, 8, 2, padding=1, padding_mode="reflect", groups=2, bias=False), (2, 32, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(8, 4, 2, stride=2), (2, 8, 4, 4, 4)),
    "transposed": (lambda: nn.ConvTranspose2d(8, 32, 2, stride=2), (2, 8, 3, 3)),
}


class Scaled(nn.Linear):
    """Reads its weight in a forward of its own."""

    def forward(self, x):
        return F.linear(x, self.weight * 2.0, self.bias) + F.linear(x, self.weight)


LAYERS["own forward"] = (lambda: Scaled(128, 96), (3, 128))


def converted(layer: nn.Module, shape: tuple[int, ...], config="nf4") -> nn.Module:
    model = lq.prepare(nn.Sequential(layer), config)
    if any("input_scale" in name or "input_quantizer" in name for name, _ in model.named_modules()):
        lq.calibrate(model, [randn(*shape, seed=9)])
    return lq.convert(model)[0]


def built(name: str, config) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    if config == "w4a16" and name != "linear":  # 128 divides no row of these
        groups = {"per_channel": True} if name == "transposed" else {"group_size": 16}
        config = lq.QATConfig("int4", bits=4, activation_bits=None, **groups)
    return converted(make(), shape, config), randn(*shape).requires_grad_()


def kept_bytes(function, *args) -> tuple[torch.Tensor, int]:
    """Return the result and the bytes of what autograd is given to keep, each piece of memory once."""
    pieces = {}

    def pack(t):
        pieces[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = function(*args)
    return result, sum(pieces.values())


def with_kept_weight(layer: nn.Module) -> nn.Module:
    """The witness: the float layer with the weight that the codes stand for, by PyTorch alone."""
    float_layer = copy.copy(layer)
    float_layer.__dict__ = {**layer.__dict__, "_parameters": dict(layer._parameters), "_buffers": {}}
    float_layer.__class__ = next(t for t in type(layer).__mro__ if t.__module__.startswith(("torch", __name__)))
    float_layer._parameters["weight"] = nn.Parameter(layer.weight.clone(), requires_grad=False)
    return float_layer


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("config", FORMATS)
def test_gradients_are_those_of_the_float_weight_and_it_is_not_kept(name, config):
    layer, x = built(name, config)
    witness, y = with_kept_weight(layer), x.detach().clone().requires_grad_()
    on_grid = layer.quantized_input(y)
    expected, kept_there = kept_bytes(witness, on_grid)
    weight = layer.weight_shape.numel() * 4
    assert kept_there >= weight  # the witness sees what there is to see
    found, kept = kept_bytes(layer, x)
    assert torch.equal(found, expected)
    grad = randn(*found.shape, seed=3)
    found.backward(grad)
    expected.backward(grad)
    assert torch.equal(x.grad, y.grad)
    # Of convolutions PyTorch keeps the input too. Quantizing it keeps it for its own backward, and scales.
    of_input = 0 if layer.input_format is None else x.nbytes + 4 * x.numel() // x.shape[-1] + 16
    assert kept <= kept_there - weight + of_input


def test_of_a_forward_of_its_own_only_what_it_makes_is_kept():
    layer, x = built("own forward", "nf4")
    weight = layer.weight_shape.numel() * 4
    _, kept = kept_bytes(with_kept_weight(layer), x)
    assert kept == 2 * weight
    assert kept_bytes(layer, x)[1] == weight  # the doubled one


class Positive(nn.Linear):
    """Writes into its weight, as layers of monotonic networks do."""

    def forward(self, x):
        self.weight.data.clamp_(min=0.0)
        return super().forward(x)


class Bounded(nn.Linear):
    def forward(self, x):  # as EEGNet's layers do
        self.weight.data = torch.renorm(self.weight.data, 2, 0, 0.1)
        return super().forward(x)


@pytest.mark.parametrize("kind", [Positive, Bounded])
def test_a_forward_that_changes_its_weight_has_the_gradient_of_what_it_computed(kind):
    layer, x = converted(kind(128, 96), (3, 128)), randn(3, 128).requires_grad_()
    layer(x).backward(randn(3, 96, seed=3))
    weight = layer.weight_in(torch.float32)
    weight = weight.clamp(min=0.0) if kind is Positive else torch.renorm(weight, 2, 0, 0.1)
    torch.testing.assert_close(x.grad, randn(3, 96, seed=3) @ weight)


def test_two_threads_in_a_forward_of_its_own():
    turn, second_came, first_left = itertools.count(), threading.Event(), threading.Event()

    class Waits(Scaled):
        def forward(self, x):
            first = next(turn) == 0
            if not first:
                second_came.set()
            assert (second_came if first else first_left).wait(10)
            return super().forward(x)

    layer, xs = converted(Waits(128, 96), (3, 128)), [randn(3, 128, seed=seed) for seed in range(2)]
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(layer, x) for x in xs]
        for call in calls:
            call.add_done_callback(lambda _: first_left.set())
    for x, call in zip(xs, calls, strict=True):
        assert torch.equal(call.result(), Scaled.forward(with_kept_weight(layer), x))
    assert "weight" not in layer.__dict__


@pytest.mark.parametrize("reentrant", [True, False])
def test_under_activation_checkpointing(reentrant):
    model = nn.Sequential(*(built("linear", "nf4")[0] for _ in range(2)))
    model[1].weight_packed = model[1].weight_packed[: 96 * 96 // 2]
    model[1].weight_scale, model[1].weight_shape = model[1].weight_scale[:144], torch.Size((96, 96))
    x = randn(4, 128).requires_grad_()
    wanted = torch.autograd.grad(model(x).square().sum(), x)[0]
    y, kept = kept_bytes(lambda: checkpoint(model, x, use_reentrant=reentrant))
    assert kept <= x.nbytes
    y.square().sum().backward()
    assert torch.equal(x.grad, wanted)


def test_hooks_of_others_get_everything_else():
    layer, x = built("linear", "int8")
    seen = []
    with torch.autograd.graph.save_on_cpu():
        y, _ = kept_bytes(layer, x)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t.shape) or t.neg(), lambda t: t.neg()):
        y = layer(x)
    assert x.shape in seen  # of the input's fake quantization
    assert layer.weight_shape not in seen
    y.backward(torch.ones_like(y))
    wanted = torch.autograd.grad(layer(x), x, torch.ones_like(y))[0]
    assert torch.equal(x.grad, wanted)


@pytest.mark.parametrize("config", FORMATS)
@pytest.mark.parametrize("name", ["linear", "conv2d"])
def test_autocast_computes_with_the_same_values_and_keeps_no_copy(name, config):
    layer, x = built(name, config)
    witness, y = with_kept_weight(layer), x.detach().clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        expected, _ = kept_bytes(witness, layer.quantized_input(y))
        found, kept = kept_bytes(layer, x)
    assert found.dtype == expected.dtype == torch.bfloat16
    assert torch.equal(found, expected)
    found.backward(torch.ones_like(found))
    expected.backward(torch.ones_like(expected))
    assert torch.equal(x.grad, y.grad)
    if layer.input_format is None and name == "linear":
        assert kept == 0


@pytest.mark.parametrize("name", LAYERS)
def test_shapes_are_worked_out_without_numbers(name):
    layer, x = built(name, "nf4")
    with torch.autocast("cpu", torch.bfloat16):  # of another device than theirs
        found = layer.to("meta")(x.detach().to("meta"))
    assert found.shape == built(name, "nf4")[0](x).shape
    assert found.is_meta


def test_gradients_of_gradients_and_a_graph_that_is_used_twice():
    layer, x = built("linear", "nf4")
    witness = with_kept_weight(layer)

    def penalty(module):
        y = x.detach().clone().requires_grad_()
        (first,) = torch.autograd.grad(module(y).sin().sum(), y, create_graph=True)
        loss = first.square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
        return y.grad

    assert torch.equal(penalty(layer), penalty(witness))


@pytest.mark.parametrize("change", ["in place", "moved"])
def test_codes_that_change_before_the_backward_pass(change):
    layer, x = built("linear", "nf4")
    y = layer(x).sum()
    if change == "in place":
        layer.weight_scale.mul_(2.0)
    else:
        layer.weight_packed = layer.weight_packed.clone()
    with pytest.raises(
        RuntimeError, match=r"a converted layer \(QuantizedLinear \(96, 128\), nf4\) were moved or changed"
    ):
        y.backward()


def test_the_weight_is_gone_when_the_forward_pass_is_over():
    layer, x = built("linear", "nf4")
    made = []
    weight_in = layer.weight_in
    layer.weight_in = lambda dtype: made.append(weight_in(dtype)) or made[-1]
    y = layer(x)
    alive = weakref.ref(made.pop())
    assert alive() is None
    y.sum().backward()
    assert len(made) == 1  # made again


@pytest.mark.parametrize("config", ["nf4", "int8_dynamic"])
def test_compiled_with_gradients(config):
    layer, x = built("linear", config)
    wanted = torch.autograd.grad(layer(x).square().sum(), x)[0]
    y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    y.square().sum().backward()
    torch.testing.assert_close(x.grad, wanted, rtol=1e-5, atol=1e-5)

"""No derivative of fake quantization in forward mode is zero without a word; what needs none is right."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tensors import randn
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, hessian, jacfwd, jvp, vmap

import lightning_qat as lq
from lightning_qat.ops.codebook import fake_quantize_codebook
from lightning_qat.ops.fake_quantize import fake_quantize
from lightning_qat.ops.vectorwise import fake_quantize_vectorwise
from lightning_qat.ops.w4a16_matmul import w4a16_matmul
from lightning_qat.transforms.ranges import defer_ranges

SCALE = torch.tensor(0.1)
OPS: dict[str, Callable[[Tensor], Tensor]] = {
    "fake_quantize": lambda x: fake_quantize(x, SCALE),
    "codebook": lambda x: fake_quantize_codebook(x, torch.ones(1), codebook="nf4", block_size=64),
    "vectorwise": lambda x: fake_quantize_vectorwise(x),
    "w4a16_matmul": lambda x: w4a16_matmul(
        x, torch.zeros(8, dtype=torch.uint8), torch.ones(4), out_features=4, group_size=4
    ),
}


def by_dual(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor | None:
    with forward_ad.dual_level():
        made: Tensor | None = forward_ad.unpack_dual(function(forward_ad.make_dual(x, torch.ones_like(x)))).tangent
        return made


WAYS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], object]] = {
    "jvp": lambda function, x: jvp(function, (x,), (torch.ones_like(x),)),
    "jacfwd": lambda function, x: jacfwd(function)(x),
    "hessian": lambda function, x: hessian(lambda v: function(v).square().sum())(x),
    "vmap in jvp": lambda function, x: jvp(vmap(lambda row: function(row[None])), (x,), (torch.ones_like(x),)),
    "dual": by_dual,
}


def refused() -> object:
    return pytest.raises(NotImplementedError, match=r"no forward-mode derivative.*use backward\(\) or torch.autograd")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("op", OPS)
def test_ops_refuse_tangents(op: str, way: str) -> None:
    with refused():  # type: ignore[attr-defined]
        WAYS[way](OPS[op], randn(3, 4))


def test_a_scale_with_a_tangent_is_refused() -> None:
    x = randn(3, 4)
    for function in (lambda s: fake_quantize(x, s), lambda s: fake_quantize(x, SCALE, s, symmetric=False)):
        with refused():  # type: ignore[attr-defined]
            jvp(function, (torch.tensor(0.5),), (torch.tensor(1.0),))


@pytest.mark.parametrize("op", OPS)
def test_what_has_no_tangent_is_as_ever(op: str) -> None:
    x, constant = randn(3, 4), randn(3, 4, seed=1)
    expected = OPS[op](constant)
    value, tangent = jvp(lambda v: v * OPS[op](constant), (x,), (torch.ones_like(x),))
    assert torch.equal(tangent, expected)
    assert torch.equal(value, x * expected)
    with forward_ad.dual_level():
        assert torch.equal(OPS[op](constant), expected)


def prepared(config: object) -> nn.Module:
    torch.manual_seed(0)
    model = lq.prepare(
        nn.Sequential(nn.Conv2d(1, 2, 2), nn.Flatten(), nn.Linear(18, 4), nn.ReLU(), nn.Linear(4, 3)), config
    )
    return lq.calibrate(model, [randn(5, 1, 4, 4)])


LEARNED = lq.QATConfig("int8", per_channel=True, learnable_step_size=True)


@pytest.mark.parametrize("config", ["int8", "int8_dynamic", "llm_int8", LEARNED], ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("deferred", [True, False])
def test_no_prepared_layer_loses_a_tangent(config: object, training: bool, grad: bool, deferred: bool) -> None:
    """Where PyTorch refuses first, its own words are kept: a function without ``jvp``, an observer's buffer."""
    model, x = prepared(config).train(training), randn(5, 1, 4, 4)
    defer_ranges(model, deferred)
    for way in ("jvp", "dual"):
        with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match="forward|jvp"):
            WAYS[way](model, x)


@pytest.mark.parametrize("config", ["nf4", "int8_weight_only", "w4a16"])
def test_no_weight_loses_a_tangent(config: str) -> None:
    torch.manual_seed(0)
    model, x = lq.prepare(nn.Linear(128, 4), config), randn(2, 128)
    weight = {"weight": model.weight.detach()}
    with refused():  # type: ignore[attr-defined]
        jvp(lambda given: functional_call(model, given, (x,)), (weight,), (weight,))


@pytest.mark.parametrize("config", ["nf4", "int8_weight_only", "w4a16"])
def test_the_input_of_a_fake_quantized_weight_has_a_derivative(config: str) -> None:
    torch.manual_seed(0)
    model, x, direction = lq.prepare(nn.Linear(128, 4), config), randn(2, 128), randn(2, 128, seed=1)
    for layer in (model, lq.convert(model)):
        _, tangent = jvp(layer, (x,), (direction,))
        torch.testing.assert_close(tangent, direction @ model.quantized_weight().t())


@pytest.mark.parametrize("config", ["int8", "int8_dynamic", "llm_int8"])
def test_no_converted_layer_loses_a_tangent(config: str) -> None:
    model, x = lq.convert(prepared(config)), randn(5, 1, 4, 4)
    for way in ("jvp", "dual"):
        with torch.no_grad(), refused():  # type: ignore[attr-defined]
            WAYS[way](model, x)

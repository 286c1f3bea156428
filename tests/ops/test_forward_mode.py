"""Fake quantization in forward mode: the straight-through derivative, or an error where there is none."""

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
from lightning_qat.ops.vectorwise import fake_quantize_beside, fake_quantize_vectorwise
from lightning_qat.ops.w4a16_matmul import w4a16_matmul
from lightning_qat.transforms.ranges import defer_ranges

SCALE = torch.tensor(0.1)
OPS: dict[str, Callable[[Tensor], Tensor]] = {
    "fake_quantize": lambda x: fake_quantize(x, SCALE),
    "codebook": lambda x: fake_quantize_codebook(x, torch.ones(1), codebook="nf4", block_size=64),
    "vectorwise": lambda x: fake_quantize_vectorwise(x),
    "beside": lambda x: fake_quantize_beside(x, torch.tensor([True, False, False, False])),
    "w4a16_matmul": lambda x: w4a16_matmul(
        x, torch.zeros(8, dtype=torch.uint8), torch.ones(4), out_features=4, group_size=4
    ),
}


#: Those that have a derivative, and whether it is 1 there.
INSIDE: dict[str, Callable[[Tensor], Tensor]] = {
    "fake_quantize": lambda x: x.abs() < 12.75,
    "codebook": lambda x: x.abs() <= 1.0,
    "vectorwise": lambda x: torch.ones_like(x, dtype=torch.bool),
    "beside": lambda x: torch.ones_like(x, dtype=torch.bool),
}


def by_dual(function: Callable[[Tensor], Tensor], x: Tensor, direction: Tensor) -> tuple[Tensor, Tensor | None]:
    with forward_ad.dual_level():
        made = forward_ad.unpack_dual(function(forward_ad.make_dual(x, direction)))
        return made.primal.clone(), made.tangent


def by_rows(function: Callable[[Tensor], Tensor], x: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    return jvp(vmap(lambda row: function(row[None])[0]), (x,), (direction,))


def by_jacobian(function: Callable[[Tensor], Tensor], x: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    return function(x), (jacfwd(function)(x) * direction).sum((-2, -1))


WAYS: dict[str, Callable[..., tuple[Tensor, Tensor | None]]] = {
    "jvp": lambda function, x, direction: jvp(function, (x,), (direction,)),
    "jacfwd": by_jacobian,
    "vmap in jvp": by_rows,
    "dual": by_dual,
}


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("op", INSIDE)
def test_the_derivative_of_an_op_is_one_inside_and_zero_outside(op: str, way: str, grad: bool) -> None:
    x, direction = randn(3, 4), randn(3, 4, seed=1)
    x[0, 0], x[1, 1], x[2, 2] = 13.0, -1.5, float("nan") if op == "fake_quantize" else 0.0
    with torch.set_grad_enabled(grad):
        value, tangent = WAYS[way](OPS[op], x, direction)
    plain = torch.cat([OPS[op](row[None]) for row in x]) if way == "vmap in jvp" else OPS[op](x)
    assert torch.equal(value.nan_to_num(9.0), plain.nan_to_num(9.0))
    inside = INSIDE[op](x)
    assert int(inside.sum()) >= 8
    # A NaN passes an integer grid's gradient, as the definition says.
    torch.testing.assert_close(tangent, torch.where(inside | x.isnan(), direction, 0.0), rtol=1e-6, atol=0.0)


def test_second_derivatives_of_a_grid_are_zero_and_of_what_follows_right() -> None:
    x = randn(4)
    assert not hessian(lambda v: fake_quantize(v, SCALE).sum())(x).any()
    found = hessian(lambda v: fake_quantize(v, SCALE).pow(3).sum())(x)
    torch.testing.assert_close(found, torch.diag(6 * fake_quantize(x, SCALE)))


def refused() -> object:
    return pytest.raises(
        NotImplementedError, match=r"no derivative under torch.func.*use backward\(\) or torch.autograd"
    )


@pytest.mark.parametrize("way", WAYS)
def test_a_product_that_has_none_refuses_tangents(way: str) -> None:
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        WAYS[way](OPS["w4a16_matmul"], randn(3, 4), randn(3, 4))


def test_a_scale_with_a_tangent_is_refused() -> None:
    x = randn(3, 4)
    for function in (lambda s: fake_quantize(x, s), lambda s: fake_quantize(x, SCALE, s, symmetric=False)):
        with refused():  # type: ignore[attr-defined]
            jvp(function, (torch.tensor(0.5),), (torch.tensor(1.0),))
        with refused():  # type: ignore[attr-defined]
            torch.func.grad(lambda s, function=function: function(s).sum())(torch.tensor(0.5))


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


def differences(model: nn.Module, x: Tensor, direction: Tensor) -> Tensor:
    """Return the derivative along ``direction`` by reverse mode, which other tests hold against plain PyTorch."""
    jacobian = torch.autograd.functional.jacobian(model, x)
    return (jacobian * direction).flatten(2).sum(2)


@pytest.mark.parametrize("config", ["int8", "int8_dynamic", "llm_int8"])
@pytest.mark.parametrize("way", ["jvp", "dual"])
@pytest.mark.parametrize("grad", [True, False])
def test_prepared_and_converted_models_have_tangents(config: str, way: str, grad: bool) -> None:
    model = prepared(config).eval()
    x, direction = randn(5, 1, 4, 4), randn(5, 1, 4, 4, seed=1)
    for net in (model, lq.convert(model)):
        expected = differences(net, x, direction)
        with torch.set_grad_enabled(grad):
            _, tangent = WAYS[way](net, x, direction)
        torch.testing.assert_close(tangent, expected, rtol=1e-4, atol=1e-6)
        assert tangent.any()


@pytest.mark.parametrize("way", ["jvp", "dual"])
@pytest.mark.parametrize("deferred", [True, False])
def test_ranges_are_not_observed_from_inside(way: str, deferred: bool) -> None:
    model, x = prepared("int8").train(), randn(5, 1, 4, 4)
    defer_ranges(model, deferred)
    before = {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    with pytest.raises(RuntimeError, match=r"layer '0' observes the range.*Phase\(observing=False\)"):
        WAYS[way](model, x, x)
    for name, value in before.items():
        assert torch.equal(model.state_dict()[name], value), name
    lq.apply_phase(model, lq.Phase(observing=False))
    WAYS[way](model, x, x)


@pytest.mark.parametrize("way", ["jvp", "dual"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_learned_scales_lose_no_tangent(way: str, training: bool, grad: bool) -> None:
    model, x = prepared(LEARNED).train(training), randn(5, 1, 4, 4)
    model(x)  # where scales begin
    if grad:
        with refused():  # type: ignore[attr-defined]
            WAYS[way](model, x, x)
        lq.apply_phase(model, lq.Phase(observing=False, frozen=True))
    with torch.set_grad_enabled(grad):
        _, tangent = WAYS[way](model, x, x)
    torch.testing.assert_close(tangent, differences(model, x, x), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("config", ["nf4", "int8_weight_only", "w4a16"])
def test_a_weight_has_a_tangent(config: str) -> None:
    torch.manual_seed(0)
    model, x = lq.prepare(nn.Linear(128, 4), config), randn(2, 128)
    weight = {"weight": model.weight.detach()}
    along = {"weight": randn(4, 128, seed=2)}
    _, tangent = jvp(lambda given: functional_call(model, given, (x,)), (weight,), (along,))
    torch.testing.assert_close(tangent, x @ along["weight"].t())


@pytest.mark.parametrize("config", ["nf4", "int8_weight_only", "w4a16"])
def test_the_input_of_a_fake_quantized_weight_has_a_derivative(config: str) -> None:
    torch.manual_seed(0)
    model, x, direction = lq.prepare(nn.Linear(128, 4), config), randn(2, 128), randn(2, 128, seed=1)
    for layer in (model, lq.convert(model)):
        _, tangent = jvp(layer, (x,), (direction,))
        torch.testing.assert_close(tangent, direction @ model.quantized_weight().t())

"""Weight-only Linears of few tokens read their weight as it is stored; the witness is float64."""

from __future__ import annotations

import copy
import math
import multiprocessing
import os
from typing import Any

import pytest
import torch
from tensors import randn
from torch import nn
from torch.nn import functional as F

import lightning_qat as lq
from lightning_qat.native.library import without_native
from lightning_qat.native.linear_float import has_linear_float
from lightning_qat.nn import linear as linear_module
from lightning_qat.nn.native_linear import FewTokens

pytestmark = pytest.mark.skipif(not has_linear_float(), reason="no compiler here, or no wide vectors")

NESTED = lq.QuantizationConfig("nf4", bnb=lq.BitsAndBytesConfig(bits=4, block_size=64, nested_quantization=True))


def weight_only(scheme: str = "int4", **settings: Any) -> lq.QATConfig:
    return lq.QATConfig(scheme, activation_bits=None, **settings)


#: Plan -> what is said of it, and whether the stored bytes are read.
KINDS = {
    "w4a16": ("w4a16", "int4", True),
    "groups of 8": (weight_only(bits=4, group_size=8), "int4", True),
    "groups of 32, asymmetric": (weight_only(bits=4, group_size=32, symmetric=False), "int4", True),
    "groups of 128, asymmetric": (weight_only(bits=4, group_size=128, symmetric=False), "int4", True),
    "per channel": (weight_only(bits=4, per_channel=True), "int4", True),
    "per tensor": (weight_only(bits=4), "int4", True),
    "per tensor, asymmetric": (weight_only(bits=4, symmetric=False), "int4", True),
    "nf4": ("nf4", "nf4", True),
    "nf4, nested": (NESTED, "nf4", True),
    "fp4": ("fp4", "fp4", True),
    "int8 per channel": ("int8_weight_only", "int8", True),
    "int8 in groups": (weight_only("int8", group_size=64), "int8", True),
    "3 bits": (weight_only("int8", bits=3, per_channel=True), "int8", False),
    "6 bits, asymmetric": (weight_only("int8", bits=6, symmetric=False, group_size=32), "int8", False),
    "llm_int8": (lq.QuantizationConfig("llm_int8"), "int8", True),
}


def converted(plan: Any, rows: int = 200, columns: int = 384, *, bias: bool = True) -> Any:
    torch.manual_seed(0)
    return lq.convert(lq.prepare(nn.Sequential(nn.Linear(columns, rows, bias=bias)), plan))[0]


def built(layer: Any) -> Any:
    return layer.kernel_cache._built[2]


@pytest.mark.parametrize("kind", KINDS)
def test_few_tokens(kind: str) -> None:
    plan, word, as_stored = KINDS[kind]
    layer = converted(plan)
    assert layer.execution == f"native {word}, weight-only"
    for shape in [(1, 384), (384,), (2, 3, 384), (33, 384)]:
        x = randn(*shape)
        got = layer(x)
        exact = F.linear(x.double(), layer.weight.double(), layer.bias.double())
        with without_native():
            by_float = F.linear(x, layer.weight, layer.bias)
        assert got.shape == exact.shape
        assert got.dtype is torch.float32
        assert (got - exact).square().mean() <= 4 * (by_float - exact).square().mean()
    assert (built(layer)._weight.codes.data_ptr() == layer.weight_packed.data_ptr()) == as_stored
    assert layer(x[:0]).shape == (0, 200)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["w4a16", "nf4", "int8 per channel", "groups of 32, asymmetric"])
def test_half_precision_is_nearer_to_exact_than_the_reference(kind: str, dtype: torch.dtype) -> None:
    layer, x = converted(KINDS[kind][0]).to(dtype), randn(4, 384).to(dtype)
    # The weight itself, not what it is in 16 bits.
    wide = copy.deepcopy(layer).float()
    exact = F.linear(x.double(), wide.weight.double(), layer.bias.double())
    got, by_float = layer(x), F.linear(x, layer.weight, layer.bias)
    assert layer.execution == f"native {KINDS[kind][1]}, weight-only"
    assert got.dtype is dtype
    assert (got - exact).square().sum() <= (by_float - exact).square().sum()


@pytest.mark.parametrize(("kind", "most"), [("w4a16", 128), ("per channel", 64), ("nf4", 64)])
def test_more_tokens_take_what_there_was(kind: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = converted(KINDS[kind][0]), randn(most + 1, 384)
    made: list[int] = []
    pack = linear_module.pack_digits
    monkeypatch.setattr(linear_module, "pack_digits", lambda *a: made.append(1) or pack(*a))
    few = layer(x[:most])
    assert type(built(layer)) is FewTokens
    assert not made
    many = layer(x)
    with without_native():
        assert torch.equal(many, layer(x))
    torch.testing.assert_close(few, many[:most], rtol=1e-4, atol=1e-5)


def test_digits_are_packed_once_for_more_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    pack = linear_module.pack_digits
    monkeypatch.setattr(linear_module, "pack_digits", lambda *a: made.append(1) or pack(*a))
    monkeypatch.setattr(linear_module, "digits_pay", lambda *_: True)
    layer, x = converted("int8_weight_only"), randn(65, 384)
    few = layer(x[1:])
    assert not made
    many, again = layer(x), layer(x)
    assert torch.equal(many, again)
    torch.testing.assert_close(few, many[1:], rtol=1e-4, atol=1e-5)
    assert len(made) == 1


def test_a_token_has_one_output_however_many_there_are() -> None:
    for kind in ("w4a16", "nf4", "int8 per channel"):
        layer, x = converted(KINDS[kind][0]), randn(20, 384)
        together = layer(x)
        assert all(torch.equal(layer(row), out) for row, out in zip(x, together, strict=True))


def test_what_cannot_be_read_as_it_is_stored() -> None:
    for plan, columns in [("nf4", 96), (weight_only(bits=4, group_size=4), 384), (weight_only("int8", bits=12), 384)]:
        assert not converted(plan, columns=columns).execution.startswith("native")
    assert converted(weight_only(bits=4), columns=383).execution == "native int8, weight-only"  # an odd number of codes
    layer = converted("w4a16")
    with without_native():
        assert not layer.execution.startswith("native")
    assert layer.train().execution == "reference: training mode"
    assert layer.eval().double().execution.startswith("reference")


def test_changes_in_place_are_seen() -> None:
    layer, x = converted("w4a16"), randn(3, 384)
    before = layer(x)
    layer.weight_scale.mul_(2.0)
    torch.testing.assert_close(layer(x) - layer.bias, 2 * (before - layer.bias))
    layer.weight_packed.bitwise_not_()
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias), rtol=1e-4, atol=1e-5)
    assert set(copy.deepcopy(layer).state_dict()) == set(layer.state_dict())


def test_nan_and_infinity_spare_other_tokens() -> None:
    layer, x = converted("w4a16"), randn(4, 384)
    x[1, 3], x[2, 0] = math.nan, math.inf
    got = layer(x)
    torch.testing.assert_close(got, F.linear(x, layer.weight, layer.bias), rtol=1e-4, atol=1e-5, equal_nan=True)
    assert got[[0, 3]].isfinite().all()


def test_gradients_take_the_reference() -> None:
    layer, x = converted("w4a16"), randn(2, 384).requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(2, 384))


def _answer(layer: Any, queue: Any) -> None:
    queue.put(layer(torch.ones(1, 1024)).tolist())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize("plan", ["w4a16", "int8_dynamic"])
def test_a_forked_process_does_not_wait_for_the_threads_of_the_other(plan: str) -> None:
    torch.set_num_threads(2)
    layer = converted(plan, 1024, 1024)
    mine = layer(torch.ones(1, 1024))
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_answer, args=(layer, queue))
    child.start()
    answer = queue.get(timeout=60)
    child.join(60)
    assert child.exitcode == 0
    assert torch.equal(torch.tensor(answer), mine)

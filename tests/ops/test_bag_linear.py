"""One or two tokens and packed 4-bit weights: as near to exact as float32, on as many threads as there are."""

from __future__ import annotations

import multiprocessing
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.test_int4_linear import weight
from tensors import randn
from torch import nn
from torch.nn import functional as F

import lightning_qat as lq
from lightning_qat.native.library import without_native
from lightning_qat.nn import linear as linear_module
from lightning_qat.ops import bag_linear as bags
from lightning_qat.ops.bag_linear import bag_linear, bags_are_exact, bags_fit, pack_bags

pytestmark = pytest.mark.skipif(not bags_are_exact(), reason="no vectorized 4-bit embedding bags here")


@pytest.fixture(autouse=True)
def _without_native():
    with without_native():  # what computes where there is no compiler, and more tokens
        yield


@settings(max_examples=40, deadline=None)
@given(
    st.integers(32, 255),
    st.integers(1, 5),
    st.integers(1, 40),
    st.integers(1, 3),
    st.booleans(),
    st.integers(1, 4),
    st.integers(0, 999),
)
def test_the_error_is_that_of_float32_sums(size, groups, half_rows, tokens, symmetric, parts, seed):
    """The witness is float64. The bound is that of recursive summation over what the kernel adds, codes 0 to 15."""
    codes, scale, zero, values = weight(2 * half_rows, groups, size, symmetric, seed)
    x = randn(tokens, groups * size, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bags, "_LEAST_ROWS", 1)
        patch.setattr(torch, "get_num_threads", lambda: parts)
        packed = pack_bags(codes, scale, zero)
        assert len(packed.tables) <= parts
        result = bag_linear(x, packed, None)
    exact = x.double() @ values.t()
    largest = (31 * scale.double()).repeat_interleave(size, 1)
    bound = (x.double().abs() @ largest.t()) * (size + groups + 4) * 2.0**-24
    assert ((result.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_it_is_as_near_to_exact_as_a_float32_product(symmetric):
    codes, scale, zero, values = weight(256, 8, 128, symmetric)
    x, bias = randn(2, 1024), randn(256, seed=5)
    exact = x.double() @ values.t() + bias.double()
    ours = bag_linear(x, pack_bags(codes, scale, zero), bias).double() - exact
    by_float = F.linear(x, values.float(), bias).double() - exact
    assert ours.square().mean() <= 4 * by_float.square().mean()


def test_what_fits():
    assert bags_fit(1024, 1024, 4, 128)
    for rows, columns, bits, size in [
        (1023, 1024, 4, 128),
        (1024, 1024, 3, 128),
        (1024, 1024, 4, None),
        (1024, 1024, 4, 16),
        (1024, 1024, 4, 256),
        (1024, 1000, 4, 128),
        (512, 512, 4, 128),
    ]:
        assert not bags_fit(rows, columns, bits, size)


def converted(symmetric=True):
    torch.manual_seed(0)
    config = lq.QATConfig("int4", group_size=128, symmetric=symmetric, activation_bits=None)
    return lq.convert(lq.prepare(nn.Sequential(nn.Linear(1024, 2048)), config))[0]


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_layer_takes_it_for_few_tokens(monkeypatch, symmetric):
    layer = converted(symmetric)
    assert layer.execution == "fbgemm int4, weight-only"
    called = []
    for name in ("bag_linear", "digit_linear"):
        compute = getattr(linear_module, name)
        monkeypatch.setattr(linear_module, name, lambda *a, n=name, f=compute: called.append(n) or f(*a))
    for shape in [(1, 1024), (1024,), (1, 2, 1024), (3, 1024)]:
        x = randn(*shape)
        got = layer(x)
        exact = F.linear(x.double(), layer.weight.double(), layer.bias.double())
        assert got.shape == exact.shape
        assert (got - exact).abs().max() <= 1e-5 * exact.abs().max()
    assert called == ["bag_linear"] * 3 + ["digit_linear"]
    x = randn(1, 1024)
    x[0, 3] = float("inf")
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias), rtol=0, atol=0, equal_nan=True)
    assert len(called) == 4


def test_an_int8_copy_is_made_for_more_tokens_only(monkeypatch):
    made, pack = [], linear_module.pack_digits
    monkeypatch.setattr(linear_module, "pack_digits", lambda *a: made.append(1) or pack(*a))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    layer = converted()
    with torch.inference_mode():
        few = layer(randn(2, 1024))
        assert not made
        many = layer(torch.cat((randn(2, 1024), randn(2, 1024))))
        layer(randn(4, 1024))
    assert len(made) == 1
    torch.testing.assert_close(many[:2], few, rtol=1e-4, atol=1e-5)


def _answer(layer, queue):
    queue.put(layer(torch.ones(1, 1024)).tolist())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_process_has_threads_of_its_own(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    layer = converted()
    mine = layer(torch.ones(1, 1024))
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_answer, args=(layer, queue))
    child.start()
    answer = queue.get(timeout=60)
    child.join(60)
    assert child.exitcode == 0
    assert torch.equal(torch.tensor(answer), mine)

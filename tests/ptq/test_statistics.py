"""Statistics of inputs against sums written out and against ``torch.nn.functional.unfold``."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensors import randn
from torch import nn
from torch.nn import functional as F

import lightning_qat as lq
from lightning_qat.ptq import statistics as module
from lightning_qat.ptq.statistics import StatisticsSum, input_geometry, input_rows
from lightning_qat.ptq.watch import find_shared_inputs, gather_statistics


def of(layer, *inputs):
    total = StatisticsSum(layer, "layer")
    for x in inputs:
        total.update(x)
    return total.result()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_linear(dtype) -> None:
    batches = [(randn(2, 5, 7, seed=i) * 10**i).to(dtype) for i in range(3)]
    found = of(nn.Linear(7, 3), *batches, torch.empty(0, 7, dtype=dtype))
    rows = torch.cat([x.double().reshape(-1, 7) for x in batches])
    torch.testing.assert_close(found.gram.double(), rows.T @ rows, rtol=1e-6, atol=1e-4)
    torch.testing.assert_close(found.mean_magnitude.double(), rows.abs().mean(0), rtol=1e-6, atol=0)
    assert torch.equal(found.max_magnitude, rows.abs().amax(0).float())
    assert (found.count, found.low, found.high) == (30, rows.min().item(), rows.max().item())
    assert found.gram.dtype == torch.float32


def test_sums_lie_where_the_weight_does() -> None:
    attention = lq.prepare(nn.MultiheadAttention(8, 2, device="meta"), "int8_weight_only")
    for layer in (nn.Linear(3, 2, device="meta"), nn.Conv1d(3, 2, 1, device="meta"), attention.q_proj):
        total = StatisticsSum(layer, "layer")
        kept = (total._gram, total._magnitude, total._largest, total._bounds)
        assert {tensor.device.type for tensor in kept} == {"meta"}


def test_many_tokens_do_not_wear_the_sum_out() -> None:
    # 2**24 + 1 is no float32: adding ones to a float32 sum would stop there.
    total = StatisticsSum(nn.Linear(1, 1), "layer")
    total.update(torch.full((1, 1), 4096.0))
    for _ in range(64):
        total.update(torch.ones(1, 1))
    assert total.result().gram.item() == 2**24 + 64


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([1, 2, 4]),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(1, 3), st.integers(1, 2)),
    st.tuples(st.integers(0, 2), st.integers(0, 1)),
    st.tuples(st.integers(1, 2), st.integers(1, 2)),
    st.booleans(),
)
def test_a_convolution_is_unfolded(groups, kernel, stride, padding, dilation, whole) -> None:
    conv = nn.Conv2d(4, 8, kernel, stride, padding, dilation, groups)
    x = randn(2, 4, 9, 8)
    if not whole:
        x = x.transpose(2, 3).contiguous().transpose(2, 3)
    unfolded = F.unfold(x, kernel, dilation, padding, stride)  # [N, 4 * area, positions]
    rows = unfolded.unflatten(1, (groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)
    made = torch.cat(list(input_rows(conv, x)), 1)
    assert torch.equal(made, rows)
    # The witness is right: the rows times the weight are the convolution.
    weight = conv.weight.detach().flatten(1).unflatten(0, (groups, -1))
    output = torch.bmm(rows, weight.transpose(1, 2))  # [groups, N * positions, out / groups]
    expected = F.conv2d(x, conv.weight, None, stride, padding, dilation, groups).detach()
    torch.testing.assert_close(
        output.unflatten(1, (2, -1)).permute(1, 0, 3, 2).reshape(expected.shape), expected, rtol=1e-4, atol=1e-5
    )
    gram = of(conv, x).gram
    expected = torch.bmm(rows.transpose(1, 2), rows)
    torch.testing.assert_close(gram, expected if groups > 1 else expected[0], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "circular"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_rows_times_the_weight_are_the_output(dims, mode, monkeypatch) -> None:
    monkeypatch.setattr(module, "_PIECE", 40)  # several pieces
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    mode = "zeros" if dims == 3 and mode == "reflect" else mode
    conv = kind(6, 4, 3, stride=2, padding=1, groups=2, padding_mode=mode, bias=False)
    x = randn(2, 6, *(7, 6, 5)[:dims])
    rows = list(input_rows(conv, x))
    assert len(rows) > 2
    output = torch.cat(rows, 1) @ conv.weight.detach().flatten(1).unflatten(0, (2, -1)).transpose(1, 2)
    expected = conv(x).detach()
    found = output.unflatten(1, (2, -1)).permute(1, 0, 3, 2).reshape(expected.shape)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    same = nn.Conv2d(3, 3, (2, 3), padding="same", bias=False)
    image = randn(1, 3, 5, 6)
    rows = torch.cat(list(input_rows(same, image)), 1)[0] @ same.weight.detach().flatten(1).T
    torch.testing.assert_close(rows.T.reshape(1, 3, 5, 6), same(image).detach(), rtol=1e-4, atol=1e-5)


def test_what_has_no_gram_matrix() -> None:
    assert input_geometry(nn.Embedding(3, 4)) is None
    assert input_geometry(nn.ConvTranspose2d(3, 4, 2)) is None
    assert input_geometry(nn.Conv2d(6, 4, (2, 3), groups=2)) == (2, 18)
    with pytest.raises(ValueError, match="layer 'e', a Embedding, has no Gram matrix"):
        StatisticsSum(nn.Embedding(3, 4), "e")


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_are_named(wrong) -> None:
    x = randn(3, 4)
    x[1, 2] = wrong
    with pytest.raises(ValueError, match="input of layer 'blocks.1.fc' holds NaN or inf"):
        StatisticsSum(nn.Linear(4, 2), "blocks.1.fc").update(x)
    with pytest.raises(ValueError, match="squares add up beyond float32"):
        of(nn.Linear(2, 2), torch.full((4, 2), 2.0**63, dtype=torch.float64))


def test_divided_by_a_scale() -> None:
    x, scale = randn(9, 5), randn(5, seed=1).abs() + 0.1
    divided, expected = of(nn.Linear(5, 2), x).divided_by(scale), of(nn.Linear(5, 2), x / scale)
    torch.testing.assert_close(divided.gram, expected.gram)
    torch.testing.assert_close(divided.mean_magnitude, expected.mean_magnitude)
    torch.testing.assert_close(divided.max_magnitude, expected.max_magnitude)
    assert divided.low <= expected.low
    assert divided.high >= expected.high


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(4, 4) for _ in range(4))
        self.apart = self.in_place = False

    def forward(self, x):
        q = self.q(x)
        if self.in_place:
            x.add_(1)
        k = self.k(x + 0 if self.apart else x)
        return self.o(q + k + self.v(x))


def test_layers_with_the_same_input_share_one_object() -> None:
    model, x = Attention(), randn(5, 4)
    layers = dict(model.named_children())
    shared = find_shared_inputs(layers, lambda: model(x))
    assert [each.layers for each in shared] == [("q", "k", "v"), ("o",)]
    found = gather_statistics(layers, shared, lambda: [lambda: model(x)] * 3)
    assert found["q"] is found["k"] is found["v"]
    torch.testing.assert_close(found["q"].gram, 3 * x.T @ x)
    model.in_place = True
    assert [each.layers for each in find_shared_inputs(layers, lambda: model(x.clone()))] == [
        ("q",),
        ("k", "v"),
        ("o",),
    ]


def test_sharing_is_confirmed_on_every_batch() -> None:
    model, x = Attention(), randn(5, 4)
    layers = dict(model.named_children())
    shared = find_shared_inputs(layers, lambda: model(x))

    def second():
        model.apart = True
        model(x)
        model.apart = False

    found = gather_statistics(layers, shared, lambda: [lambda: model(x), second])
    assert found["q"] is found["v"]
    assert found["k"] is not found["q"]
    torch.testing.assert_close(found["k"].gram, 2 * x.T @ x)
    torch.testing.assert_close(found["q"].gram, 2 * x.T @ x)


def test_further_batches_are_run_while_layers_are_missing() -> None:
    model, x, runs = Attention(), randn(5, 4), []
    layers = dict(model.named_children())

    def run(*called):
        runs.append(called)
        for name in called:
            layers[name](x)

    batches = [("o",), ("q", "k", "o"), ("v", "k"), ("q",)]
    first, *others = (partial(run, *called) for called in batches)
    shared = find_shared_inputs(layers, first, others)
    assert len(runs) == 3
    assert sorted(name for each in shared for name in each.layers) == ["k", "o", "q", "v"]
    found = gather_statistics(layers, shared, lambda: [partial(run, *called) for called in batches])
    for name, count in (("o", 2), ("q", 2), ("k", 2), ("v", 1)):
        torch.testing.assert_close(found[name].gram, count * x.T @ x)

    def chain(*called):
        for name in called:
            layers[name](randn(2, 4))

    shared = find_shared_inputs(layers, partial(chain, "k", "o"), [partial(chain, "q", "k", "v", "o")])
    assert [each.layers for each in shared] == [("q",), ("k",), ("v",), ("o",)]


def test_a_forward_ends_where_all_is_seen() -> None:
    model, x, calls = Attention(), randn(5, 4), []
    model.o.register_forward_hook(lambda *_: calls.append(1))
    layers = dict(model.named_children())
    shared = find_shared_inputs(layers, lambda: model(x))
    calls.clear()
    found = gather_statistics(layers, shared[:1], lambda: [lambda: model(x)] * 2, stop=True)
    assert set(found) == {"q", "k", "v"}
    assert not calls
    gather_statistics(layers, shared[:1], lambda: [lambda: model(x)] * 2)
    assert len(calls) == 2


def test_a_layer_called_twice_sees_both_inputs() -> None:
    layer, other, x, y = nn.Linear(3, 3), nn.Linear(3, 3), randn(2, 3), randn(4, 3, seed=1)
    layers = {"twice": layer, "once": other}

    def run():
        layer(x)
        other(x)
        layer(y)

    shared = find_shared_inputs(layers, run)
    assert [(each.layers, each.calls) for each in shared] == [(("twice",), 2), (("once",), 1)]
    found = gather_statistics(layers, shared, lambda: [run], stop=True)
    torch.testing.assert_close(found["twice"].gram, x.T @ x + y.T @ y)
    torch.testing.assert_close(found["once"].gram, x.T @ x)


class ChannelsLast(nn.Conv1d):
    """As the head of Parakeet."""

    def forward(self, x):
        return super().forward(x.mT).mT


@pytest.mark.parametrize("method", ["gptq", "awq", "smoothquant"])
@pytest.mark.parametrize("length", [5, 16])
def test_a_convolution_with_a_forward_of_its_own_gets_nearest_codes(length, method):
    torch.manual_seed(0)
    model, batches = nn.Sequential(nn.Linear(16, 16), ChannelsLast(16, 8, 1)), [randn(2, length, 16)]
    config = lq.QATConfig("int8", per_channel=True)
    quantized = lq.quantize_model(model, config, batches, method=method, verify=True)
    outcome = lq.ptq_report(quantized).layer("1")
    assert outcome.loss is None
    assert any("a forward of its own" in note for note in outcome.notes), outcome.notes

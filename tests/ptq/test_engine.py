"""The engine against the same steps written out by hand, on models of several kinds."""

from __future__ import annotations

import pytest
import torch
from ptq_models import (
    MODELS,
    EncoderDecoder,
    Experts,
    Llama,
    Mixture,
    MobileNet,
    built,
    images,
    pairs,
    some_rows,
    tokens,
)
from tensors import randn
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import lightning_qat as lq
from lightning_qat.nn import QuantizedLayer
from lightning_qat.ptq.gptq import choose_gptq
from lightning_qat.ptq.methods import ORDERS, PTQOptions
from lightning_qat.schemes import weight_format
from lightning_qat.transforms.calibrate import _call

W4 = lq.QuantizationConfig("int4", group_size=8)


def gram_of(model, layer, batches, run=_call):
    rows = []
    handle = layer.register_forward_pre_hook(lambda _m, args: rows.append(args[0].reshape(-1, args[0].shape[-1])))
    with torch.no_grad():
        for batch in batches:
            run(model, batch)
    handle.remove()
    return sum(x.T @ x for x in rows)


def by_hand(order, batches):
    """GPTQ of all layers of the blocks, in an order, by whole forwards of the whole model."""
    model = built(Llama)
    layers = {name: layer for name, layer in model.named_modules() if name.endswith("_proj")}
    one, block = [list(layers)], lambda i: [n for n in layers if n.startswith(f"layers.{i}.")]
    inner = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
    parts = {
        "one_pass": one,
        "blocks": [block(i) for i in range(3)],
        "sublayers": [[f"layers.{i}.{end}" for end in part] for i in range(3) for part in inner],
    }[order]
    for part in parts:
        grams = {name: gram_of(model, layers[name], batches) for name in part}
        for name in part:
            weight = layers[name].weight.data
            layers[name].weight.data = choose_gptq(weight, grams[name], weight_format(W4, weight.shape)).values()
    return {name: layer.weight.data for name, layer in layers.items()}


@pytest.mark.parametrize("order", ORDERS)
def test_every_order_is_that_by_hand(order) -> None:
    model, batches = built(Llama), tokens()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plan = lq.QuantizationPlan([lq.LayerRule("layers.*", W4)])
    made = lq.quantize_model(model, plan, batches, "gptq", options=PTQOptions(order=order))
    for name, expected in by_hand(order, batches).items():
        layer = made.get_submodule(name)
        assert isinstance(layer, QuantizedLayer)
        torch.testing.assert_close(layer.weight, expected, rtol=1e-4, atol=1e-5, msg=name)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert made.embed.weight is not model.embed.weight
    assert torch.equal(made.embed.weight, model.embed.weight)
    assert lq.ptq_report(made).order == order


@pytest.mark.parametrize("kind", MODELS)
def test_models_of_all_kinds(kind, tmp_path) -> None:
    made, batches = MODELS[kind]
    model, batches = built(made), batches()
    config = lq.QATConfig("int8", bits=4, per_channel=True, activation_bits=None)
    quantized = lq.quantize_model(model, config, batches, "gptq")
    report = lq.ptq_report(quantized)
    expected = {name for name, m in quantized.named_modules() if isinstance(m, QuantizedLayer)}
    assert {layer.name for layer in report.layers} == expected
    looked_at = [layer for layer in report.layers if layer.loss is not None]
    assert len(looked_at) > 3
    assert all(layer.loss <= layer.nearest_loss for layer in looked_at)
    nearest = lq.quantize_model(model, config, batches)
    with torch.no_grad():
        right, ours, theirs = (_call(m, batches[0]) for m in (model, quantized, nearest))
    assert lq.sqnr(right, ours) > lq.sqnr(right, theirs)
    lq.save_quantized(quantized, tmp_path / "model")
    again = lq.load_quantized(tmp_path / "model", built(made))
    assert torch.equal(_call(again, batches[0]), ours)


def test_the_ways_to_the_result_are_one() -> None:
    # BatchNorm is folded and activations have ranges.
    model, batches = built(MobileNet), images()
    made = lq.quantize_model(model, "int8", batches, "gptq")
    prepared = lq.quantize_model(model, "int8", batches, "gptq", convert=False)
    verified = lq.quantize_model(model, "int8", batches, "gptq", verify=True)
    assert lq.parity_report(verified).passed
    x = images(1)[0]
    right, by_hand = made(x), lq.convert(prepared)(x)
    assert torch.equal(right, by_hand)
    assert torch.equal(right, verified(x))
    assert made.features[0][1].__class__.__name__ == "FoldedBatchNorm"
    weight_only = lq.QATConfig("int8", bits=6, per_channel=True, activation_bits=None)
    packed = lq.quantize_model(model, weight_only, batches, "gptq")  # layers packed block by block
    late = lq.quantize_model(model, weight_only, batches, "gptq", verify=True)
    # What follows a packed block reads sums that the fold into its scales has rounded otherwise.
    torch.testing.assert_close(packed(x), late(x), rtol=1e-5, atol=1e-6)
    assert packed.features[0][1].__class__.__name__ == "FoldedBatchNorm"
    model, batches = built(Llama), tokens()  # and where nothing is folded
    packed = lq.quantize_model(model, weight_only, batches, "gptq")
    late = lq.quantize_model(model, weight_only, batches, "gptq", verify=True)
    assert torch.equal(_call(packed, batches[0]), _call(late, batches[0]))


def test_rules_mix_bits_and_leave_layers_in_float() -> None:
    rules = [
        lq.LayerRule("layers.*", W4),
        lq.LayerRule("layers.1.*", lq.QuantizationConfig("gptq", bits=3, group_size=4)),
        lq.LayerRule("*.down_proj"),
        lq.LayerRule("embed", "int8_weight_only"),
    ]
    made = lq.quantize_model(built(Llama), lq.QuantizationPlan(rules), tokens(), "gptq")
    bits = {layer.name: layer.bits for layer in lq.ptq_report(made).layers}
    assert (bits["layers.0.q_proj"], bits["layers.1.q_proj"], bits["embed"]) == (4, 3, 8)
    assert type(made.layers[0].down_proj) is nn.Linear
    embedding = lq.ptq_report(made).layer("embed")
    assert (embedding.method, embedding.loss) == ("rtn", None)
    assert "embedding" in embedding.notes[0]


def test_what_no_batch_reaches_is_rounded_to_nearest() -> None:
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x, other=False):
            return self.unused(x) if other else self.used(x)

    torch.manual_seed(0)
    model = Experts()
    made = lq.quantize_model(model, W4, [randn(4, 8)], "gptq")
    outcome = lq.ptq_report(made).layer("unused")
    assert (outcome.method, outcome.notes) == ("rtn", ("no calibration batch reached it",))
    assert torch.equal(made.unused.weight, lq.quantize_model(model, W4).unused.weight)
    plan = lq.QuantizationPlan([lq.LayerRule("*coder.*", W4)])
    made = lq.quantize_model(built(EncoderDecoder), plan, pairs(), "gptq")
    assert lq.ptq_report(made).layer("encoder.0.b").notes == ("no calibration batch reached it",)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", [Experts, Mixture])
def test_an_expert_that_only_a_later_batch_reaches_is_not_left_out(kind, order) -> None:
    model, batches = built(kind), some_rows([1, 0, 0, 3])
    made = lq.quantize_model(model, W4, batches, "gptq", options=PTQOptions(order=order))
    report = lq.ptq_report(made)
    assert {layer.name for layer in report.layers} == {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    for layer in report.layers:
        reached = "experts.2." not in layer.name
        assert layer.method == ("gptq" if reached else "rtn"), layer
        assert reached or layer.notes == ("no calibration batch reached it",)
    first = report.layer("experts.3.0" if kind is Experts else "layers.0.experts.3.0")
    weight = model.get_submodule(first.name).weight.detach()
    gram = batches[3].T @ batches[3]
    assert first.loss == pytest.approx(choose_gptq(weight, gram, weight_format(W4, weight.shape)).loss, rel=1e-3)


class Tasks(nn.Module):
    """What a batch is decides which of two heads reads the norm."""

    def __init__(self):
        super().__init__()
        self.norm, self.first, self.second = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm.weight.data[:2] = torch.tensor([30.0, 0.1])

    def forward(self, x, other=False):
        x = self.norm(x)
        return self.second(x) if other else self.first(x)


@pytest.mark.parametrize("method", ["awq", "awq+gptq"])
def test_a_reader_that_only_a_later_batch_calls_is_not_scaled_behind_its_back(method) -> None:
    torch.manual_seed(0)
    model, x = Tasks(), randn(40, 8)
    batches = [{"x": x}, {"x": x}, {"x": x, "other": True}]
    made = lq.quantize_model(model, lq.QuantizationConfig("int8", group_size=4), batches, method)
    for other in (False, True):
        assert lq.sqnr(model(x, other), made(x, other)) > 35
    assert "'norm', in another batch, is read by others too" in lq.ptq_report(made).layer("first").notes[0]
    alone = lq.quantize_model(model, lq.QuantizationConfig("int8", group_size=4), batches[:1], method)
    assert lq.ptq_report(alone).layer("first").notes[0].startswith("scale in 'norm'")


def test_nan_is_named_with_its_layer() -> None:
    model = built(Llama)
    model.layers[1].input_layernorm.weight.data[3] = float("nan")
    with pytest.raises(ValueError, match="input of layer 'layers.1.q_proj' holds NaN"):
        lq.quantize_model(model, lq.QuantizationPlan([lq.LayerRule("layers.*", W4)]), tokens(), "gptq")


def test_any_dtype_and_any_training_mode() -> None:
    model = built(Llama).to(torch.bfloat16).train()

    class Cached(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model
            self.config = type("Config", (), {"use_cache": True})()

        def forward(self, ids):
            assert not self.config.use_cache
            assert not self.training
            return self.inner(ids)

    # Activations of float32 positions: the blocks compute in both.
    whole = Cached()
    whole.inner.float()
    made = lq.quantize_model(whole, lq.QuantizationPlan([lq.LayerRule("*.layers.*", W4)]), tokens(), "gptq")
    assert whole.config.use_cache
    assert made.config.use_cache
    assert whole.training
    assert not made.training
    half = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)).to(torch.bfloat16)
    made = lq.quantize_model(half, W4, [randn(9, 8).to(torch.bfloat16)], "gptq")
    assert made(randn(2, 8).to(torch.bfloat16)).dtype == torch.bfloat16


# --- hand-over from and to quantization-aware training -------------------------------------------


def test_scales_of_qat_are_the_grid() -> None:
    torch.manual_seed(0)
    model, batches = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), [randn(32, 8, seed=i) for i in (1, 2)]
    config = lq.QATConfig("int8", bits=3, per_channel=True, activation_bits=None, learnable_step_size=True)
    prepared = lq.prepare(model, config)
    optimizer = torch.optim.Adam(prepared.parameters(), 1e-2)
    for x in batches * 5:
        loss = (prepared(x) - x[:, :4]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    learned = [layer.weight_quantizer.scale.clone() for layer in (prepared[0], prepared[2])]
    weight = prepared[0].weight.detach().clone()
    made = lq.quantize_model(prepared, None, batches, "gptq")
    for layer, scale in zip((made[0], made[2]), learned, strict=True):
        torch.testing.assert_close(layer.scale, scale, rtol=1e-6, atol=0)
    assert torch.equal(prepared[0].weight, weight)  # trains on
    assert torch.equal(prepared[0].weight_quantizer.scale, learned[0])
    report = lq.ptq_report(made)
    plain = lq.convert(prepared)
    for layer, other, outcome in zip((made[0],), (plain[0],), report.layers, strict=False):
        gram = sum(x.T @ x for x in batches)
        errors = [((m.weight - weight) @ gram * (m.weight - weight)).sum() for m in (layer, other)]
        assert errors[0] < errors[1]
        assert outcome.loss == pytest.approx(float(errors[0]), rel=1e-3)
    with pytest.raises(ValueError, match="is prepared"):
        lq.quantize_model(prepared, None, batches)


@pytest.mark.parametrize("learnable", [False, True])
def test_qat_begins_where_gptq_ended(learnable) -> None:
    model, batches = built(Llama), tokens()
    config = lq.QuantizationConfig("int4", group_size=8, learnable=learnable)
    plan = lq.QuantizationPlan([lq.LayerRule("layers.*", config)])
    prepared = lq.quantize_model(model, plan, batches, "gptq", convert=False)
    made = lq.quantize_model(model, plan, batches, "gptq")
    x = tokens(1)[0]
    torch.testing.assert_close(prepared.eval()(x), made(x), rtol=1e-4, atol=1e-5)
    layer = prepared.layers[0].q_proj
    assert torch.equal(layer.quantized_weight(), layer.weight)  # the weights stand on their grid
    loss = prepared.train()(x).square().mean()
    loss.backward()
    assert layer.weight.grad is not None
    if learnable:
        exponent = layer.weight_quantizer.learned.exponent
        # A weight on its grid pulls at no scale but for the rounding of weight / scale; after a step it does.
        on_grid, exponent.grad = exponent.grad.abs().max(), None
        torch.optim.SGD(prepared.parameters(), 0.5).step()
        prepared(x).square().mean().backward()
        assert exponent.grad.abs().max() > 0
        assert on_grid <= 1e-4 * exponent.grad.abs().max(), (on_grid, exponent.grad.abs().max())
        return
    again = lq.quantize_model(prepared, None, batches, "gptq")
    assert torch.equal(again.layers[0].q_proj.codes, made.layers[0].q_proj.codes)


def test_the_observer_is_told_in_order() -> None:
    told = []

    class Recorder(lq.PTQObserver):
        def started(self, tasks):
            told.append(("started", len(tasks)))

        def stage_started(self, name, index, stages):
            told.append((name, index, stages))

        def layer_done(self, outcome):
            told.append(outcome.name)

        def finished(self, report):
            told.append(("finished", len(report.layers)))

    rules = [lq.LayerRule("layers.*", W4), lq.LayerRule("lm_head", W4)]
    lq.quantize_model(built(Llama), lq.QuantizationPlan(rules), tokens(), "gptq", observer=Recorder())
    assert told[0] == ("started", 23)
    assert told[1:3] == [("layers.0", 1, 4), "layers.0.q_proj"]
    assert told[-3:] == [("after the blocks", 4, 4), "lm_head", ("finished", 22)]


def test_what_is_missing_is_told() -> None:
    model = nn.Linear(8, 8)
    with pytest.raises(ValueError, match="method='gptq' needs calibration batches to look at"):
        lq.quantize_model(model, W4, method="gptq")
    with pytest.raises(ValueError, match="method='gptq' got no calibration batch"):
        lq.quantize_model(model, W4, [], method="gptq")
    for batch in (randn(4, 8), {"input": randn(4, 8)}):
        for method in ("rtn", "gptq"):
            with pytest.raises(TypeError, match="calibration is one .* give the batches"):
                lq.quantize_model(model, W4, batch, method)
    with pytest.raises(TypeError, match=r"use PTQOptions, such as PTQOptions\(gptq=GPTQOptions"):
        lq.quantize_model(model, W4, [randn(4, 8)], "gptq", options=lq.GPTQOptions())
    with pytest.raises(ValueError, match="is converted already"):
        lq.quantize_model(lq.quantize_model(model, W4), W4)
    with pytest.raises(ValueError, match="order='turn' is not known"):
        PTQOptions(order="turn")


def test_a_loader_of_unknown_length() -> None:
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(randn(6, 8))

    made = lq.quantize_model(nn.Sequential(nn.Linear(8, 8)), W4, DataLoader(Stream(), batch_size=3), "gptq")
    assert lq.ptq_report(made).layers[0].method == "gptq"


def test_the_method_follows_from_the_config() -> None:
    config = lq.QuantizationConfig("gptq", group_size=8)
    made = lq.quantize_model(nn.Sequential(nn.Linear(8, 8)), config, [randn(30, 8)])
    assert lq.ptq_report(made).layers[0].method == "gptq"
    plan = lq.QuantizationPlan([lq.LayerRule("0", config), lq.LayerRule("1", lq.QuantizationConfig("awq"))])
    with pytest.raises(ValueError, match="names several algorithms, gptq, awq"):
        lq.quantize_model(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), plan, [randn(3, 8)])

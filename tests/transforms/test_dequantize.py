"""The way back: a float model of the classes it had, with the values that the codes stand for."""

from __future__ import annotations

import copy

import pytest
import torch
from tensors import randn
from torch import nn
from torch.nn import functional as F

import lightning_qat as lq


class Scaled(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight * 2.0, self.bias)


class Tokens(nn.Module):
    """An embedding, attention of both kinds, recurrence, convolutions of three kinds, a shared layer, a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.other = nn.MultiheadAttention(16, 2, kdim=8, vdim=8, bias=False, batch_first=True)
        self.lstm = nn.LSTM(16, 16, 2, bidirectional=True, batch_first=True)
        self.cell = nn.GRUCell(32, 16)
        self.conv, self.up = nn.Conv1d(16, 16, 3, padding=1), nn.ConvTranspose2d(1, 2, 2)
        self.shared, self.own = nn.Linear(16, 16), Scaled(16, 8, bias=False)

    def forward(self, ids):
        x = self.embedding(ids)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = x + self.other(x, x[..., :8], x[..., 8:], need_weights=False)[0]
        x = self.shared(F.relu(self.shared(x)))
        x = self.conv(x.transpose(1, 2)).transpose(1, 2)
        x = self.cell(self.lstm(x)[0][:, -1])
        return self.own(x), self.up(x[:, None, :, None])


def tokens() -> Tokens:
    torch.manual_seed(0)
    return Tokens().eval()


def with_everything(config) -> lq.QuantizationPlan:
    rules = [lq.LayerRule(kind, config) for kind in (nn.Embedding, nn.LSTM, nn.GRUCell)]
    if config == "fp4":  # its blocks do not end with rows of 16
        rules[0] = lq.LayerRule(nn.Embedding, "int8_weight_only")
    if isinstance(config, lq.QuantizationConfig):  # groups lie along rows
        rules.append(lq.LayerRule("up"))
    return lq.QuantizationPlan(rules, base=config)


@pytest.mark.parametrize("config", ["int8_weight_only", "fp4", lq.QuantizationConfig("int4", group_size=4)])
def test_every_kind_of_layer_becomes_what_it_was_with_the_values_of_its_codes(config):
    ids = torch.arange(10).view(2, 5)
    quantized = lq.convert(lq.prepare(tokens(), with_everything(config)))
    before = copy.deepcopy(quantized.state_dict())
    made = lq.dequantize_model(quantized)
    plain = tokens()
    assert [type(m) for m in made.modules()] == [type(m) for m in plain.modules()]
    assert list(made.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in made.named_parameters()] == [n for n, _ in plain.named_parameters()]
    plain.load_state_dict(made.state_dict())  # strictly
    plain.requires_grad_(False)  # as the other: attention has another path for weights that train
    found, expected = made(ids), quantized(ids)
    for ours, theirs, there in zip(found, plain(ids), expected, strict=True):
        assert torch.equal(ours, theirs)
        torch.testing.assert_close(ours, there, rtol=1e-5, atol=1e-5)
    for name in ("embedding", "conv", "shared", "own"):
        assert torch.equal(made.get_submodule(name).weight, quantized.get_submodule(name).weight), name
    assert str(made) == str(plain)
    for name, value in quantized.state_dict().items():
        assert not isinstance(value, torch.Tensor) or torch.equal(value, before[name]), name


class Centred(nn.Linear):
    """Has buffers named much as those of packed integers."""

    def __init__(self) -> None:
        super().__init__(16, 8)
        self.register_buffer("input_mean", randn(16))
        self.register_buffer("weight_scale_seen", torch.ones(1))

    def forward(self, x):
        return F.linear(x - self.input_mean, self.weight, self.bias) * self.weight_scale_seen


@pytest.mark.parametrize("nested", [False, True])
def test_buffers_of_the_users_layer_stay(nested):
    bnb = lq.BitsAndBytesConfig(bits=4, block_size=64, nested_quantization=nested)
    quantized = lq.convert(lq.prepare(nn.Sequential(Centred()), lq.QuantizationConfig("nf4", bnb=bnb)))
    made = lq.dequantize_model(quantized)
    assert set(made.state_dict()) == set(nn.Sequential(Centred()).state_dict())
    torch.testing.assert_close(made(randn(4, 16, seed=2)), quantized(randn(4, 16, seed=2)))


def test_layers_that_stayed_in_float_are_left_and_copied():
    plan = lq.QuantizationPlan([lq.LayerRule("own"), lq.LayerRule("attention.k_proj")], base="int8_weight_only")
    quantized = lq.convert(lq.prepare(tokens(), plan))
    made, plain = lq.dequantize_model(quantized), tokens()
    assert torch.equal(made.own.weight, plain.own.weight)
    assert made.own.weight is not quantized.own.weight
    q, k, v = made.attention.in_proj_weight.chunk(3)
    assert torch.equal(k, plain.attention.in_proj_weight.chunk(3)[1])
    assert torch.equal(q, quantized.attention.q_proj.weight)
    assert torch.equal(v, quantized.attention.v_proj.weight)


def test_activations_are_in_float_and_batchnorm_stays_folded():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 1))
    model(randn(8, 3, 6, 6))
    lq.prepare(model.eval(), "int8")
    x = randn(2, 3, 6, 6, seed=1)
    lq.calibrate(model, [x])
    quantized = lq.convert(model, verify=[x])
    made = lq.dequantize_model(quantized)
    assert [type(m).__name__ for m in made] == ["Conv2d", "FoldedBatchNorm", "ReLU", "Conv2d"]
    assert lq.parity_report(made) is None
    assert not made._forward_hooks
    assert not made._forward_pre_hooks
    expected = F.conv2d(F.relu(F.conv2d(x, quantized[0].weight, quantized[0].bias)), quantized[3].weight, model[3].bias)
    assert torch.equal(made(x), expected)
    assert lq.sqnr(expected, quantized(x)) > 25  # what quantizing activations costs


@pytest.mark.parametrize(
    ("method", "options"),
    [("awq", None), ("gptq", lq.PTQOptions(gptq=lq.GPTQOptions(static_groups=False)))],
)
def test_an_input_that_is_arranged_is_so_in_the_weight(method, options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 8))
    batches = [randn(64, 32, seed=i) * torch.logspace(-2, 1, 32) for i in range(3)]
    config = lq.QuantizationConfig("int4", group_size=16)
    quantized = lq.quantize_model(model, config, batches, method, options=options)
    arranges = [m.input_factor is not None or m.input_order is not None for m in (quantized[0], quantized[2])]
    assert any(arranges)
    made = lq.dequantize_model(quantized)
    torch.testing.assert_close(made(batches[0]), quantized(batches[0]), rtol=1e-4, atol=1e-4)


def test_what_comes_back_trains_and_is_quantized_again():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4))
    quantized = lq.quantize_model(model, "nf4")
    made = lq.dequantize_model(quantized)
    assert not any(p.requires_grad for p in made.parameters())  # as conversion left them
    again = lq.quantize_model(made, "nf4")
    for name, buffer in quantized.named_buffers():
        assert torch.equal(again.get_buffer(name), buffer), name  # values of codes are their own nearest
    made.requires_grad_()
    optimizer = torch.optim.SGD(made.parameters(), lr=0.1)
    made(randn(4, 64)).square().mean().backward()
    before = made[0].weight.clone()
    optimizer.step()
    assert not torch.equal(made[0].weight, before)


def test_a_model_of_half_precision_and_one_that_was_loaded(tmp_path):
    model = lq.quantize_model(nn.Sequential(nn.Linear(64, 16)), "nf4").bfloat16()
    made = lq.dequantize_model(model)
    assert made[0].weight.dtype == torch.bfloat16
    assert torch.equal(made[0].weight, model[0].weight)
    lq.save_quantized(model, tmp_path / "model")
    loaded = lq.load_quantized(tmp_path / "model", nn.Sequential(nn.Linear(64, 16)).bfloat16())
    assert torch.equal(lq.dequantize_model(loaded)[0].weight, made[0].weight)


def test_nothing_to_dequantize_is_an_error():
    with pytest.raises(ValueError, match=r"Linear has no converted layer; give what convert\(model\) returned"):
        lq.dequantize_model(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="has no converted layer"):
        lq.dequantize_model(lq.prepare(nn.Sequential(nn.Linear(2, 2)), "int8"))


def test_transformers_writes_and_reads_what_comes_back(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    plan = lq.QuantizationPlan([lq.LayerRule("*lm_head")], base=lq.QuantizationConfig("int4", group_size=16))
    quantized = lq.quantize_model(transformers.LlamaForCausalLM(config).eval(), plan)
    made = lq.dequantize_model(quantized)
    made.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = torch.arange(12).view(2, 6)
    assert torch.equal(loaded(ids).logits, made(ids).logits)
    torch.testing.assert_close(made(ids).logits, quantized(ids).logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="save_pretrained would write"):
        quantized.save_pretrained(tmp_path)

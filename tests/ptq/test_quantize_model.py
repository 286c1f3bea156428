"""Post-training quantization in one call is the three acts one after the other."""

from __future__ import annotations

from types import MethodType

import pytest
import torch
from tensors import randn
from torch import nn

import lightning_qat as lq


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)]
    model = nn.Sequential(*layers)
    model(randn(16, 3, 8, 8))  # statistics of BatchNorm
    return model


@pytest.mark.parametrize("config", [*lq.PRESETS, lq.QuantizationConfig("nf4", group_size=8)], ids=str)
def test_it_is_prepare_calibrate_convert(config) -> None:
    if config == "w4a16":
        config = lq.QATConfig("int4", group_size=9, activation_bits=None)
    model, batches = network(), [randn(4, 3, 8, 8, seed=i) for i in range(3)]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    made = lq.quantize_model(model, config, calibration=batches, verify=True)
    by_hand = network().eval()
    expected = lq.convert(lq.calibrate(lq.prepare(by_hand, config), batches) or by_hand)
    x = randn(4, 3, 8, 8, seed=9)
    assert torch.equal(made(x), expected(x))
    assert lq.parity_report(made).passed
    assert model.training
    assert type(model[0]) is nn.Conv2d
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not made.training


@pytest.mark.parametrize("config", ["int8_dynamic", "int8_weight_only", "nf4", "llm_int8"])
def test_without_calibration(config: str) -> None:
    made = lq.quantize_model(network(), config)
    assert lq.sqnr(network().eval()(randn(4, 3, 8, 8)), made(randn(4, 3, 8, 8))) > 10


def test_what_is_missing_is_told() -> None:
    with pytest.raises(ValueError, match="inputs of 2 layers, such as '0', need calibrated ranges"):
        lq.quantize_model(network(), "int8")
    with pytest.raises(ValueError, match="method='rnt' is not known; use one of: 'rtn'"):
        lq.quantize_model(network(), "int8", method="rnt")
    with pytest.raises(ValueError, match="verify=True needs calibration"):
        lq.quantize_model(network(), "nf4", verify=True)
    with pytest.raises(ValueError, match="is prepared"):
        lq.quantize_model(lq.prepare(network(), "int8"))


class Tied(nn.Module):
    """Blocks, norms and a head whose weight is the embedding's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(50, 32)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)) for _ in range(2)
        )
        self.head = nn.Linear(32, 50, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


@pytest.mark.parametrize("convert", [True, False])
@pytest.mark.parametrize("method", ["rtn", "clip", "gptq", "awq"])
@pytest.mark.parametrize("head", [True, False])
def test_the_model_stays_as_it_is_and_shares_nothing(method: str, convert: bool, head: bool) -> None:
    model, batches = Tied().train(), [torch.randint(0, 50, (2, 8)) for _ in range(3)]
    model.layers[0][1].weight.requires_grad_(False)
    asked = [p.requires_grad for p in model.parameters()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rules = [] if head else [lq.LayerRule("head")]
    plan = lq.QuantizationPlan(rules, base=lq.QATConfig("int4", group_size=16, activation_bits=None))
    made = lq.quantize_model(model, plan, batches, method, convert=convert).eval()
    assert [p.requires_grad for p in model.parameters()] == asked
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    if not head:
        assert made.head.weight is made.embedding.weight
    expected = made(batches[0])
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.zero_()
    assert torch.equal(made(batches[0]), expected)
    assert expected.abs().max() > 0


def test_a_weight_that_is_not_finite_is_named() -> None:
    model = Tied()
    model.layers[1][3].weight.data[2, 3] = torch.nan
    config = lq.QuantizationConfig("gptq", group_size=16)
    with pytest.raises(ValueError, match=r"weight of layer 'layers\.1\.3' holds NaN or inf"):
        lq.quantize_model(model, config, [torch.randint(0, 50, (2, 8))])


def test_any_forward() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, a, *, b):
            return self.layer(a + b)

    x = randn(3, 4)
    made = lq.quantize_model(Two(), "int8", [{"x": x}], forward=lambda m, batch: m(batch["x"], b=batch["x"]))
    assert made(x, b=x).shape == (3, 2)
    assert lq.quantize_model(Two(), "int8", [{"a": x, "b": x}])(x, b=x).shape == (3, 2)


class Transposed(nn.Module):
    """A Linear as GPT-2 in transformers has it: of a class that nobody but its library knows."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(randn(32, 32)), nn.Parameter(randn(32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight + self.bias


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_weights_that_no_known_layer_holds_are_told(method: str, caplog: pytest.LogCaptureFixture) -> None:
    model, config = nn.Sequential(Transposed(), nn.ReLU(), nn.Linear(32, 8)), lq.QuantizationConfig("int4")
    made = lq.quantize_model(model, config, [randn(9, 32)], method)
    (note,) = lq.ptq_report(made).notes
    assert note.startswith("80% of the weights stay in float")
    assert "'0.weight' of a Transposed" in note
    assert note in caplog.text
    caplog.clear()
    parts = [nn.Embedding(9, 16), nn.MultiheadAttention(16, 2), nn.LSTM(16, 16), nn.GRUCell(16, 16), nn.Linear(16, 4)]
    known = nn.ModuleList([*parts, nn.Conv2d(3, 4, 3), nn.utils.parametrizations.weight_norm(nn.Linear(16, 16))])
    rules = [lq.LayerRule("1.*"), lq.LayerRule("5")]
    left = lq.quantize_model(known, lq.QuantizationPlan(rules, base="int8_weight_only"))
    assert lq.ptq_report(left).notes == ()
    assert not caplog.text


def test_a_forward_that_names_the_model_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(16, 4))
    monkeypatch.setitem(globals(), "as_it_was", model.forward)  # as in a notebook
    model.forward = lambda inputs: as_it_was(inputs) * 2  # type: ignore[name-defined]  # noqa: F821
    with pytest.raises(ValueError, match="the forward of 'Sequential' is a function that was set on the module"):
        lq.quantize_model(model, lq.QuantizationConfig("int4"))


@pytest.mark.parametrize("where", ["", "2"])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_forward_that_holds_the_model_is_told(where: str, method: str) -> None:
    x, config = randn(9, 16), lq.QuantizationConfig("int4", group_size=8)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    module = model.get_submodule(where)
    before, right = module.forward, model(x)
    module.forward = lambda inputs: before(inputs) * 2  # a copy of the model would compute with this one's layers
    named = "'2'" if where else "'Sequential'"
    with pytest.raises(ValueError, match=f"the forward of {named} is a function that was set on the module"):
        lq.quantize_model(model, config, [x], method)
    twice = type(module).forward
    module.forward = MethodType(lambda self, inputs: twice(self, inputs) * 2, module)
    made = lq.quantize_model(model, config, [x], method)
    assert 10 < lq.sqnr(2 * right, made(x)) < 60


class Branches(nn.Module):
    """Blocks, a layer that only wide batches reach, and some that none does."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(2))
        self.wide, self.heads = nn.Linear(8, 8), nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.heads[0](self.wide(x) if len(x) > 4 else x)


@pytest.mark.parametrize("method", ["gptq", "smoothquant"])
def test_layers_that_no_batch_reaches_are_told_before_the_work(method):
    class Told(lq.PTQObserver):
        done = 0

        def layer_done(self, outcome):
            self.done += 1

    torch.manual_seed(0)
    model, batches, told = Branches(), [torch.randn(4, 8), torch.randn(6, 8)], Told()
    with pytest.raises(ValueError, match=r"'heads.1' \(and of 1 more\) was never.*LayerRule\('heads.1'\), ") as caught:
        lq.quantize_model(model, "int8", batches, method=method, observer=told)
    assert told.done == 0
    rules = [lq.LayerRule(name) for name in ("heads.1", "heads.2")]
    assert str(caught.value).endswith("LayerRule('heads.2')")  # and no glob, which heads.0 would match too
    quantized = lq.quantize_model(model, lq.QuantizationPlan(rules, base="int8"), batches, method=method, observer=told)
    assert told.done == 4
    assert isinstance(quantized.wide, lq.QuantizedLinear)

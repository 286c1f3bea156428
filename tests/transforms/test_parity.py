"""The parity gate: witnesses computed by hand with plain float layers, and conversions spoiled on purpose."""

import importlib
import math
import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lightning_qat as lq
from lightning_qat.tasks import SmallResNet
from lightning_qat.transforms import attach_report

ASYMMETRIC = lq.QATConfig("int8", symmetric=False, per_channel=True)


class Backwards(nn.Module):
    """Its layers are registered in another order than they are called in."""

    def __init__(self):
        super().__init__()
        self.third, self.second, self.first = nn.Linear(8, 4), nn.Linear(8, 8), nn.Linear(6, 8)
        self.never = nn.Linear(8, 8)

    def forward(self, x):
        return self.third(F.relu(self.second(F.relu(self.second(self.first(x))))))


def trained(model, x, plan="int8"):
    torch.manual_seed(0)
    lq.prepare(model, plan)
    lq.calibrate(model, [x])
    return model


def backwards(plan="int8"):
    torch.manual_seed(0)
    model, x = Backwards(), torch.randn(16, 6)
    lq.prepare(model, plan)
    lq.calibrate(model, [x])
    if model.never.input_quantizer is not None:
        model.never.input_quantizer.calibrated = True  # as if an earlier batch had reached it
    return model, x


def by_name(report):
    return {layer.name: layer for layer in report.layers}


def test_a_faithful_conversion_passes_in_forward_order():
    model, x = backwards()
    report = lq.check_parity(model, lq.convert(model), [x, (x,), {"x": x}])
    assert [layer.name for layer in report.layers] == ["first", "second", "third", "never"]
    assert [layer.calls for layer in report.layers] == [3, 6, 3, 0]
    assert report.unchecked == ("never",)
    assert report.worst_layer.sqnr_db > 120
    assert report.agreement == 1
    assert report.output_sqnr_db > 60
    assert report.batches == 3
    assert report.passed
    report.raise_if_failed()


def test_the_ratio_is_the_one_computed_by_hand():
    torch.manual_seed(0)
    model, batches = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)), [torch.randn(7, 6), torch.randn(2, 6)]
    trained(model, batches[0], "int8_weight_only")
    converted = lq.convert(model)
    codes, scale = converted[2].codes.double(), converted[2].weight_scale.double()
    converted[2].weight_scale *= 1.01
    spoiled = converted[2].weight_scale.double()
    first = nn.Linear(6, 5)
    first.weight.data = converted[0].codes * converted[0].weight_scale.unsqueeze(1)
    first.bias.data = converted[0].bias.data
    with torch.no_grad():
        h = torch.cat([F.relu(first(x)) for x in batches]).double()
    right = F.linear(h, codes * scale.unsqueeze(1), converted[2].bias.double())
    wrong = F.linear(h, codes * spoiled.unsqueeze(1), converted[2].bias.double())
    by_hand = 10 * math.log10(right.square().sum() / (right - wrong).square().sum())
    report = lq.check_parity(model, converted, batches)
    assert by_name(report)["2"].sqnr_db == pytest.approx(by_hand, abs=1e-3)
    assert report.output_sqnr_db == pytest.approx(by_hand, abs=1e-3)
    assert by_name(report)["0"].passed


def one_code(layer):
    layer.weight_packed.view(-1)[3] ^= 1


SPOILS = {
    "weight scale": lambda layer: layer.weight_scale.view(-1)[0].mul_(1.05),
    "one code": one_code,
    "weight zero point": lambda layer: layer.weight_zero_point.view(-1)[0].add_(1),
    "input scale": lambda layer: layer.input_scale.mul_(1.05),
    "input zero point": lambda layer: layer.input_zero_point.add_(1),
    "bias": lambda layer: layer.bias.data.add_(0.1),
    "NaN": lambda layer: layer.bias.data.fill_(math.nan),
}


@pytest.mark.parametrize("spoil", SPOILS.values(), ids=SPOILS)
@pytest.mark.parametrize("name", ["first", "third"])
def test_a_spoiled_layer_is_named(name, spoil):
    model, x = backwards(ASYMMETRIC)
    converted = lq.convert(model)
    spoil(getattr(converted, name))
    report = lq.check_parity(model, converted, [x])
    assert report.first_divergence.name == name
    assert [layer.name for layer in report.layers if not layer.passed] == [name]
    with pytest.raises(
        lq.ParityError, match=f"layer '{name}' is the first that diverges.*dB.*; (convert|leave)"
    ) as error:
        report.raise_if_failed()
    assert error.value.report is report


@pytest.mark.parametrize("pair", [("first", "third"), ("second", "third"), ("third", "never")])
def test_of_two_spoiled_layers_the_first_in_forward_order_is_named(pair):
    model, x = backwards()
    converted = lq.convert(model)
    for name in pair:
        one_code(getattr(converted, name))
    assert lq.check_parity(model, converted, [x]).first_divergence.name == pair[0]


def test_one_code_of_a_million_is_found_where_outputs_hardly_show_it():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(1000, 1000)), torch.randn(4, 1000)
    converted = lq.convert(trained(model, x))
    one_code(converted[0])
    (layer,) = lq.check_parity(model, converted, [x]).layers
    assert layer.sqnr_db > layer.threshold_db
    assert layer.changed == 1
    assert not layer.passed


def resnet(plan="int8"):
    torch.manual_seed(0)
    model, x = SmallResNet(widths=(4, 8)), torch.randn(8, 1, 8, 8)
    for _ in range(3):
        model(x + torch.randn_like(x))
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.weight.data.normal_()
    return trained(model, x, plan), x


@pytest.mark.parametrize("plan", ["int8", "w4a8", "int8_dynamic", "int8_weight_only"])
def test_residuals_and_folded_batchnorm(plan):
    model, x = resnet(plan)
    converted = lq.convert(model)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in converted.modules())
    report = lq.check_parity(model, converted, [x])
    assert report.passed, report.failure()
    assert report.worst_layer.sqnr_db > 100
    assert report.unchecked == ()
    name = report.layers[1].name
    converted.get_submodule(name).bias.data.add_(0.5)  # it came from the BatchNorm
    assert lq.check_parity(model, converted, [x]).first_divergence.name == name


class SkipsItsNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x, norm=True):
        x = self.conv(x)
        return self.bn(x) if norm else x


def test_a_forward_that_leaves_out_the_folded_norm_is_not_what_ships():
    model, x = SkipsItsNorm(), torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        model.bn.running_mean += 1
    converted = lq.convert(trained(model, x))
    assert lq.check_parity(model, converted, [x]).passed
    report = lq.check_parity(model, converted, [x, (x, False)])
    assert report.first_divergence.name == "conv"
    assert report.layers[0].calls == 2


class Doubling(nn.Linear):
    def forward(self, input, factor=2.0):
        return super().forward(input) * factor


class Odd(nn.Module):
    """Embedding, own forward with a keyword, a layer of two names, buffers, random numbers, a tree as output."""

    def __init__(self):
        super().__init__()
        self.table, self.own = nn.Embedding(10, 8), Doubling(8, 8)
        self.a = nn.Linear(8, 8)
        self.b = self.a
        self.dropout, self.head = nn.Dropout(0.5), nn.Linear(8, 3)
        self.register_buffer("offset", torch.ones(8))

    def forward(self, tokens):
        x = self.own(self.table(tokens), factor=3.0) + self.offset
        x = x + 0.1 * torch.rand_like(x) + random.random()
        x = self.dropout(self.b(self.a(x)))
        return {"logits": self.head(x), "loss": x.sum(), "kept": (tokens, "text")}


@pytest.mark.parametrize("plan", ["int8", "int8_dynamic", "w4a16", "int8_weight_only"])
def test_unusual_layers_outputs_and_random_numbers(plan):
    torch.manual_seed(0)
    plans = {"w4a16": lq.QATConfig("int4", group_size=4, activation_bits=None)}
    rules = [lq.LayerRule("table", "int8_weight_only")]
    model = Odd()
    tokens = torch.randint(10, (4, 5))
    trained(model, tokens, lq.QuantizationPlan(rules, base=plans.get(plan, plan)))
    report = lq.check_parity(model, lq.convert(model), [tokens, tokens])
    assert report.passed, report.failure()
    assert {layer.name: layer.calls for layer in report.layers} == {"table": 2, "own": 2, "a": 4, "head": 2}
    assert report.output_sqnr_db > 60
    assert report.agreement == 1


def test_outputs_that_cannot_be_compared_are_none():
    class Nothing(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x):
            return str(self.fc(x).shape)

    model, x = Nothing(), torch.randn(2, 3)
    report = lq.check_parity(trained(model, x), lq.convert(model), [x])
    assert (report.output_sqnr_db, report.agreement) == (None, None)
    assert report.passed


@pytest.mark.parametrize(("dtype", "threshold"), [(torch.float64, 60), (torch.float16, 40), (torch.bfloat16, 25)])
def test_half_precision_has_its_own_threshold(dtype, threshold):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)).to(dtype)
    model[1].running_mean += 1
    x = torch.randn(8, 1, 4, 4, dtype=dtype)
    converted = lq.convert(trained(model, x))
    report = lq.check_parity(model, converted, [x])
    assert report.passed, report.failure()
    assert {layer.threshold_db for layer in report.layers} == {threshold}
    one_code(converted[4])
    assert lq.check_parity(model, converted, [x]).first_divergence.name == "4"


def test_nothing_is_changed_by_looking():
    model, x = resnet()
    model.train()
    model.stem[0].eval()
    converted = lq.convert(model)
    converted.train()
    modes = {module: module.training for module in [*model.modules(), *converted.modules()]}
    before = [
        {k: v.clone() for k, v in m.state_dict().items() if isinstance(v, torch.Tensor)} for m in (model, converted)
    ]
    hooks = [len(module._forward_hooks) for module in model.modules()]
    extra = [q.get_extra_state() for _, q in model.named_modules() if hasattr(q, "quantizing")]
    torch.manual_seed(3)
    random.seed(3)
    draws = torch.rand(3), random.random()
    torch.manual_seed(3)
    random.seed(3)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=4, shuffle=True)
    report = lq.check_parity(model, converted, data)
    assert report.batches == 2
    assert torch.equal(torch.rand(3), draws[0])
    assert random.random() == draws[1]
    assert all(module.training is mode for module, mode in modes.items())
    for m, kept in zip((model, converted), before, strict=True):
        assert all(torch.equal(kept[k], v) for k, v in m.state_dict().items() if k in kept)
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert [q.get_extra_state() for _, q in model.named_modules() if hasattr(q, "quantizing")] == extra
    assert all(p.grad is None for p in model.parameters())


def test_what_stays_in_float_must_be_the_same_too():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    x = torch.randn(3, 4)
    converted = lq.convert(trained(model, x))
    converted[1].weight.data[0] = 2
    with pytest.raises(lq.ParityError, match=r"float tensor '1.weight' is not the trained model's own"):
        lq.check_parity(model, converted, [x]).raise_if_failed()


def test_thresholds_of_the_user():
    model, x = backwards()
    converted = lq.convert(model)
    with pytest.raises(
        lq.ParityError, match=r"layer 'first'.*threshold 1000 dB; leave the layer in float with LayerRule"
    ):
        lq.check_parity(model, converted, [x], layer_threshold=1000).raise_if_failed()
    with pytest.raises(lq.ParityError, match=r"every layer is what trained, but the outputs are at .* dB"):
        lq.check_parity(model, converted, [x], output_threshold=1000).raise_if_failed()
    report = lq.check_parity(model, converted, [x]).with_metrics({"acc": 0.9, "loss": 1.0}, {"acc": 0.8}, {"acc": 0.05})
    assert [(m.name, round(m.difference, 6)) for m in report.metrics] == [("acc", -0.1)]
    with pytest.raises(lq.ParityError, match="acc is 0.8 and was 0.9"):
        report.raise_if_failed()
    assert report.with_metrics({"acc": 0.9}, {"acc": 0.8}).passed


def test_questions_that_make_no_sense_are_told():
    model, x = backwards()
    converted = lq.convert(model)
    with pytest.raises(ValueError, match="none was given"):
        lq.check_parity(model, converted, [])
    with pytest.raises(ValueError, match="none of them reached a prepared layer"):
        lq.check_parity(model, converted, [x], lambda model, batch: None)
    with pytest.raises(ValueError, match="'third' is not quantized in converted"):
        lq.check_parity(model, model, [x])
    with pytest.raises(ValueError, match="no prepared layer"):
        lq.check_parity(converted, converted, [x])
    lq.apply_phase(model, lq.Phase(quantizing=False))
    with pytest.raises(ValueError, match="'third' still computes in float.*start_step"):
        lq.check_parity(model, converted, [x])


def test_convert_verifies_on_request(monkeypatch):
    module = importlib.import_module("lightning_qat.transforms.convert")  # the package's ``convert`` is the function
    model, x = backwards()
    assert lq.parity_report(lq.convert(model)) is None
    assert lq.parity_report(lq.convert(model, verify=[x])).passed
    compiled = torch.compile(model, backend="eager")
    assert lq.parity_report(lq.convert(compiled, [(x, 1)], forward=lambda m, batch: m(batch[0]))).batches == 1

    def spoiled(layer, *args, **kwargs):
        make_quantized(layer, *args)
        layer.weight_scale *= 1.1

    make_quantized = module.make_quantized
    monkeypatch.setattr(module, "make_quantized", spoiled)
    with pytest.raises(lq.ParityError, match="layer 'first' is the first that diverges"):
        lq.convert(model, verify=[x])
    lq.convert(model)


def test_parts_of_a_prepared_module_are_verified():
    whole = nn.ModuleDict({"net": nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))})
    x = torch.randn(4, 1, 8, 8)
    lq.prepare(whole, "int8")
    lq.calibrate(whole, [x], forward=lambda model, batch: model["net"](batch))
    assert whole["net"][0].weight_quantizer.folded_norm == "net.1"
    assert lq.parity_report(lq.convert(whole["net"], verify=[x])).worst_layer.sqnr_db > 100


def test_reports_survive_json():
    model, x = backwards("int8_weight_only")
    report = lq.check_parity(model, lq.convert(model), [x]).with_metrics({"a": math.inf}, {"a": math.nan})
    assert report.layers[0].sqnr_db == math.inf
    again = lq.ParityReport.from_dict(report.to_dict())
    assert repr(again) == repr(report)  # NaN is not equal to itself
    assert "worst 'first' inf dB" in report.summary()
    attach_report(model, report)

"""prepare: in place, idempotent, by plan; phases and bits from outside."""

import copy
import logging

import pytest
import torch
from torch import nn

import lightning_qat as lq
from lightning_qat.nn import QATLayer
from lightning_qat.transforms.calibrate import static_quantizers
from lightning_qat.transforms.prepare import qat_layers


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.blocks = nn.ModuleList([nn.Conv2d(4, 4, 3, padding=1) for _ in range(3)])
        self.table = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 5)

    def forward(self, x, index=None):
        x = self.stem(x)
        for block in self.blocks:
            x = torch.relu(block(x))
        x = x.mean((2, 3))
        return self.head(x if index is None else x + self.table(index))


def bits_of(model):
    return {
        name: (m.weight_quantizer.bits, None if m.input_quantizer is None else m.input_quantizer.bits)
        for name, m in model.named_modules()
        if hasattr(m, "weight_quantizer")
    }


def test_first_and_last_layer_in_other_bits():
    plan = lq.QuantizationPlan(
        rules=[
            lq.LayerRule(nn.Conv2d, "w4a8", "w4a8"),
            lq.LayerRule("stem", "int8", "int8"),
            lq.LayerRule("blocks.1"),
            lq.LayerRule("head", lq.QuantizationConfig("int8", bits=6, per_channel=True)),
        ]
    )
    model = lq.prepare(Net(), plan)
    assert bits_of(model) == {"stem": (8, 8), "blocks.0": (4, 8), "blocks.2": (4, 8), "head": (6, None)}
    assert type(model.blocks[1]) is nn.Conv2d


def test_a_base_covers_linear_and_convolutions_and_rules_win():
    model = lq.prepare(Net(), lq.QuantizationPlan([lq.LayerRule("head")], base="w4a8"))
    assert set(bits_of(model)) == {"stem", "blocks.0", "blocks.1", "blocks.2"}
    model = lq.prepare(
        Net(), lq.QuantizationPlan([lq.LayerRule("table", lq.QuantizationConfig("int4", per_channel=True))])
    )
    assert bits_of(model) == {"table": (4, None)}


def test_identity_names_and_references_stay():
    model = Net()
    before = dict(model.named_parameters())
    modules = list(model.modules())
    held = [model.stem, model.head]
    assert lq.prepare(model, "int8") is model
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(before[k] is after[k] for k in before)
    assert [m for m in model.modules() if m in modules] == modules
    assert held[0] is model.stem
    assert isinstance(held[1], lq.QATLinear)


def test_preparing_again():
    model = lq.prepare(Net(), "int8")
    state = copy.deepcopy(model.state_dict())
    assert lq.prepare(model, lq.PRESETS["int8"]) is model
    assert state.keys() == model.state_dict().keys()
    with pytest.raises(ValueError, match="already prepared with another plan"):
        lq.prepare(model, "w4a8")
    with pytest.raises(ValueError, match="'net.stem' of Sequential is already prepared|already prepared"):
        lq.prepare(nn.Sequential(model), "int8")


def test_a_layer_of_two_parents_is_prepared_once():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.Sequential(shared, nn.ReLU())})
    lq.prepare(model, "int8")
    assert model["a"][0] is model["b"][0] is shared
    assert isinstance(shared, lq.QATLinear)


def test_layers_are_found_in_the_order_of_named_modules():
    shared, deep = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 4)))
    model = nn.Sequential(nn.ModuleDict({"a": deep, "b": shared}), nn.ModuleList([shared, nn.Linear(4, 4), deep[1]]))
    model.missing = None
    lq.prepare(model, lq.QATConfig("int8", learnable_step_size=True))
    expected = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, QATLayer)]
    assert len(expected) == 4
    assert list(qat_layers(model)) == expected


def test_the_model_itself_may_be_a_layer():
    model = lq.prepare(nn.Linear(3, 2), "int8_weight_only")
    assert isinstance(model, lq.QATLinear)
    assert type(lq.convert(model)) is lq.QuantizedLinear


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (lq.QuantizationPlan([lq.LayerRule("block.*", "int8")]), r"match='block.\*' matches no layer.*'blocks\.\d'"),
        (lq.QuantizationPlan([lq.LayerRule(nn.Conv1d, "int8")]), "match=Conv1d matches no layer.*Conv2d"),
        (lq.QATConfig("int4", group_size=3), r"4 % 3 != 0 \(layer 'head'\)|9 % 3|group_size"),
        (
            lq.QuantizationPlan([lq.LayerRule("head", "int8", lq.QuantizationConfig("gptq"))]),
            r"'gptq' is for weights \(input of layer 'head'\)",
        ),
        ("in8", "preset='in8' is not known; use one of: 'int8'"),
    ],
)
def test_errors_leave_the_model_in_float(plan, message):
    model = Net()
    with pytest.raises(ValueError, match=message):
        lq.prepare(model, plan)
    assert not any("quantizer" in key for key in model.state_dict())
    assert type(model.stem) is nn.Conv2d


def test_nothing_to_quantize_is_an_error():
    with pytest.raises(ValueError, match="quantizes no layer of Sequential, which has: ReLU, Sequential"):
        lq.prepare(nn.Sequential(nn.ReLU()), "int8")


def test_a_transformer_layer_is_prepared_with_its_attention():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    parameters = dict(layer.named_parameters())
    held = layer.self_attn
    lq.prepare(layer, "int8")
    projections = {f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
    assert set(bits_of(layer)) == projections | {"linear1", "linear2"}
    assert isinstance(held, lq.QATMultiheadAttention)
    assert all(parameters[name] is parameter for name, parameter in layer.named_parameters())


def test_an_attention_of_its_own_stays_in_float_and_says_so(caplog):
    class Own(nn.MultiheadAttention):
        pass

    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    layer.self_attn = Own(16, 2, batch_first=True)
    with caplog.at_level(logging.INFO, logger="lightning_qat"):
        lq.prepare(layer, "int8")
    assert "self_attn.out_proj" in caplog.text
    assert set(bits_of(layer)) == {"linear1", "linear2"}


def test_transformer_evaluation_does_not_take_the_float_fast_path():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    x = torch.randn(2, 5, 16)
    in_float = copy.deepcopy(layer).eval()(x)
    lq.prepare(layer, lq.QATConfig("int4", activation_bits=None))
    layer.eval()
    with torch.no_grad():
        fast = layer(x)
    slow = layer(x)  # with gradients there is no fast path
    assert (slow - in_float).abs().max() > 0.01
    torch.testing.assert_close(fast, slow.detach(), rtol=1e-5, atol=1e-5)  # attention has a fast path of its own
    converted = lq.convert(layer)
    with torch.no_grad():
        torch.testing.assert_close(converted(x), fast, rtol=1e-5, atol=1e-5)


def test_float_checkpoint_loads_into_a_prepared_model_and_back():
    float_model = Net()
    prepared = lq.prepare(Net(), "int8")
    prepared.load_state_dict(float_model.state_dict(), strict=True)
    assert torch.equal(prepared.stem.weight, float_model.stem.weight)
    Net().load_state_dict(lq.float_state_dict(prepared.state_dict()), strict=True)
    state = prepared.state_dict()
    del state["stem.input_quantizer.scale"]
    with pytest.raises(RuntimeError, match=r"stem\.input_quantizer\.scale"):
        lq.prepare(Net(), "int8").load_state_dict(state)


def test_a_prepared_checkpoint_restores_ranges_phase_and_bits():
    model = lq.prepare(Net(), "int8")
    lq.calibrate(model, [torch.randn(2, 1, 8, 8)])
    lq.set_bits(model, 4, "blocks.*")
    lq.apply_phase(model, lq.Phase(observing=False, frozen=True))
    twin = lq.prepare(Net(), "int8")
    twin.load_state_dict(model.state_dict(), strict=True)
    x = torch.randn(3, 1, 8, 8)
    assert bits_of(twin) == bits_of(model)
    assert torch.equal(twin.eval()(x), model.eval()(x))
    assert twin.stem.weight_quantizer.frozen


def test_changing_bits_derives_scales_again():
    model = lq.prepare(Net(), "int8")
    lq.calibrate(model, [torch.randn(2, 1, 8, 8)])
    before = model.stem.input_quantizer.scale.clone()
    lq.set_bits(model, 4)
    lq.set_bits(model, 4, activations=True)
    scale = model.stem.weight.detach().abs().amax((1, 2, 3)) / 7.5
    assert torch.equal(model.stem.weight_quantizer.parameters_for(model.stem.weight)[0], scale)
    torch.testing.assert_close(model.stem.input_quantizer.scale, before * 255 / 15)
    with pytest.raises(ValueError, match="bits=1 is not allowed"):
        lq.set_bits(model, 1)
    with pytest.raises(ValueError, match="'stm' matches no prepared layer; nearest names: 'stem'"):
        lq.set_bits(model, 4, "stm")


def test_frozen_scales_stand_still_while_weights_move():
    model = lq.prepare(Net(), "int8")
    lq.calibrate(model, [torch.randn(2, 1, 8, 8)])
    lq.apply_phase(model, lq.Phase(frozen=True, observing=False))
    scale = model.head.weight_quantizer.scale.clone()
    activation = model.head.input_quantizer.scale.clone()
    with torch.no_grad():
        model.head.weight.mul_(3)
    model.train()(torch.randn(2, 1, 8, 8) * 5)
    lq.apply_phase(model, lq.Phase(frozen=True, observing=False))
    assert torch.equal(model.head.weight_quantizer.parameters_for(model.head.weight)[0], scale)
    assert torch.equal(model.head.input_quantizer.scale, activation)
    assert model.head.weight_codes().abs().max() == 127


def test_not_quantizing_is_the_float_model_bit_for_bit():
    torch.manual_seed(0)
    float_model = Net()
    model = lq.prepare(copy.deepcopy(float_model), "int8")
    lq.apply_phase(model, lq.Phase(quantizing=False))
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(model(x), float_model(x))


def test_calibrate_takes_tensors_tuples_dicts_and_a_forward():
    batches = [torch.randn(2, 1, 8, 8) for _ in range(3)]
    index = torch.tensor([1, 2])
    ways = [
        (batches, None),
        ([(b, None) for b in batches], None),
        ([{"x": b} for b in batches], None),
        ([{"image": b} for b in batches], lambda model, batch: model(batch["image"])),
    ]
    scales = []
    torch.manual_seed(3)
    start = Net()
    for data, forward in ways:
        model = lq.prepare(copy.deepcopy(start), "int8")
        lq.calibrate(model, data, forward)
        scales.append(torch.stack([q.scale for q in static_quantizers(model)]))
    assert all(torch.equal(scales[0], other) for other in scales[1:])
    lq.calibrate(model, [(batches[0], index)])


def test_calibrate_changes_nothing_but_ranges():
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Dropout(0.5), nn.ReLU(), nn.Conv2d(3, 2, 3))
    model[1].eval()
    lq.prepare(model, "int8")
    state = {k: v.clone() for k, v in model.state_dict().items() if "quantizer" not in k}
    lq.calibrate(model, [torch.randn(2, 1, 8, 8)])
    assert model.training
    assert not model[1].training
    assert all(torch.equal(state[k], model.state_dict()[k]) for k in state)
    assert all(p.grad is None for p in model.parameters())


def test_calibrate_on_nothing_is_an_error_and_keeps_the_ranges():
    model = lq.prepare(Net(), "int8")
    with pytest.raises(ValueError, match="no batch"):
        lq.calibrate(model, [])
    lq.calibrate(model, [torch.randn(2, 1, 8, 8)])
    scale = model.stem.input_quantizer.scale.clone()
    with pytest.raises(ValueError, match="no batch"):
        lq.calibrate(model, iter(()))
    assert torch.equal(model.stem.input_quantizer.scale, scale)
    with pytest.raises(ValueError, match="call prepare"):
        lq.calibrate(Net(), [torch.randn(2, 1, 8, 8)])
    with pytest.raises(ValueError, match=r"layer 'stem'.*NaN|NaN.*'stem'"):
        lq.calibrate(model, [torch.full((1, 1, 8, 8), float("nan"))])
    with pytest.raises(ValueError, match="calibration batch of type str"):
        lq.calibrate(model, ["text"])


def test_layers_that_calibration_missed_are_named(caplog):
    model = nn.ModuleDict({"used": nn.Linear(3, 3), "unused": nn.Linear(3, 3)})
    lq.prepare(model, "int8")
    with caplog.at_level(logging.WARNING, logger="lightning_qat"):
        lq.calibrate(model, [torch.randn(2, 3)], lambda m, b: m["used"](b))
    assert "unused" in caplog.text
    with pytest.raises(ValueError, match="layer 'unused' was never observed"):
        lq.convert(model)


def test_rules_for_all_layers_that_calibration_missed_are_named_at_once():
    parts = {f"blocks{i}": nn.ModuleDict({"used": nn.Linear(3, 3), "text": nn.Linear(3, 3)}) for i in range(2)}
    model = nn.ModuleDict({"blocks": nn.ModuleList(parts.values()), "head": nn.Linear(3, 3)})
    lq.prepare(model, "int8")
    lq.calibrate(model, [torch.randn(2, 3)], lambda m, b: m["blocks"][1]["used"](m["blocks"][0]["used"](b)))
    with pytest.raises(ValueError, match=r"'blocks.0.text' \(and of 2 more\)") as caught:
        lq.convert(model)
    assert str(caught.value).endswith("leave them in float with LayerRule('blocks.*.text'), LayerRule('head')")

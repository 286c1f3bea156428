"""Statistics of prepared and converted layers, against values computed by hand."""

import json
import math

import pytest
import torch
from torch import nn

import lightning_qat as lq


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))


def prepared(plan="int8"):
    model, x = network(), torch.randn(8, 3, 8, 8)
    model(x)  # BatchNorm learns statistics that are not 0 and 1
    lq.calibrate(lq.prepare(model, plan), [x])
    return model.eval()


def db(expected, actual):
    expected = expected.detach()
    signal, noise = expected.double().square().sum(), (expected.double() - actual.double()).square().sum()
    return 10 * math.log10(signal / noise)


def test_a_prepared_layer():
    model = prepared()
    found = lq.quantization_statistics(model)
    assert list(found) == ["0", "4"]
    layer, weight = found["4"], model[4].weight.detach()
    assert (layer.name, layer.kind, layer.scheme, layer.bits, layer.granularity) == (
        "4",
        "Linear",
        "int8",
        8,
        "channel",
    )
    torch.testing.assert_close(layer.scale, weight.abs().amax(1) / 127, rtol=1e-6, atol=0)
    assert layer.zero_point is None
    widest = float(weight.abs().max())
    assert layer.range == pytest.approx((-widest, widest), rel=1e-6)
    assert layer.sqnr_db == pytest.approx(db(weight, model[4].quantized_weight()), abs=1e-6)
    quantizer = model[4].input_quantizer
    assert layer.input_bits == 8
    assert torch.equal(layer.input_scale, quantizer.scale)
    assert torch.equal(layer.input_zero_point, quantizer.zero_point)
    scale, zero = float(quantizer.scale), int(quantizer.zero_point)
    assert layer.input_range == pytest.approx((-zero * scale, (255 - zero) * scale))
    assert layer.execution is None


def test_a_converted_layer_says_how_it_computes_and_has_no_float_weight():
    model = prepared()
    before, after = lq.quantization_statistics(model), lq.quantization_statistics(lq.convert(model))
    assert after["4"].execution == lq.convert(model)[4].execution
    assert after["4"].sqnr_db is None
    for name in ("scale", "input_scale", "input_zero_point"):
        assert torch.equal(getattr(before["4"], name), getattr(after["4"], name))
    assert before["4"].range == after["4"].range
    assert after["0"].range != before["0"].range  # BatchNorm is folded into its scale


@pytest.mark.parametrize("reference_is_prepared", [True, False])
def test_a_converted_layer_is_compared_with_a_reference(reference_is_prepared):
    model = prepared()
    reference = model
    if not reference_is_prepared:
        reference = network().eval()
        reference.load_state_dict(lq.float_state_dict(model.state_dict()))
    before, after = lq.quantization_statistics(model), lq.quantization_statistics(lq.convert(model), reference)
    assert after["4"].sqnr_db == pytest.approx(before["4"].sqnr_db, abs=1e-3)
    # The folded weight by PyTorch's own folding, against what the codes stand for.
    folded = torch.nn.utils.fuse_conv_bn_eval(network()[0].eval(), model[1]).weight
    assert after["0"].sqnr_db == pytest.approx(db(folded.detach(), lq.convert(model)[0].weight), abs=1e-3)


def test_a_reference_that_does_not_tell_what_was_folded_gives_no_ratio():
    class Untraceable(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()

        def forward(self, x):
            return self.net(x) if x.sum() < 1e9 else x

    torch.manual_seed(0)
    model, x = Untraceable().eval(), torch.randn(8, 3, 8, 8)
    lq.calibrate(lq.prepare(model), [x])
    converted = lq.convert(model)
    assert isinstance(converted.net[1], lq.nn.FoldedBatchNorm)
    assert lq.quantization_statistics(converted, Untraceable())["net.0"].sqnr_db is None
    assert lq.quantization_statistics(converted, model)["net.0"].sqnr_db > 30


@pytest.mark.parametrize(
    ("plan", "bits", "granularity", "input_bits"),
    [
        ("int8_weight_only", 8, "channel", None),
        ("int8_dynamic", 8, "channel", 8),
        (lq.QATConfig("int4", group_size=9, activation_bits=None), 4, "group of 9", None),
        (lq.QATConfig("int8", symmetric=False), 8, "tensor", 8),
    ],
)
def test_plans(plan, bits, granularity, input_bits):
    model = prepared(plan)
    for stage in (model, lq.convert(model)):
        layer = lq.quantization_statistics(stage)["4"]
        assert (layer.bits, layer.granularity, layer.input_bits) == (bits, granularity, input_bits)
        if not getattr(plan, "symmetric", True):
            low = -int(layer.zero_point) * float(layer.scale)
            assert layer.range == pytest.approx((low, low + 255 * float(layer.scale)))
        if plan == "int8_dynamic":
            assert layer.input_scale is layer.input_range is None


def test_a_layer_that_saw_no_data_has_no_input_range():
    layer = lq.quantization_statistics(lq.prepare(network()))["4"]
    assert layer.input_bits == 8
    assert layer.input_scale is layer.input_zero_point is layer.input_range is None


def test_plain_values_are_json():
    model = prepared(lq.QATConfig("int8", symmetric=False))
    with torch.no_grad():
        model[4].weight.zero_()  # nothing is lost: the ratio is infinite
    for stage in (model, lq.convert(model)):
        row = lq.quantization_statistics(stage, model)["4"].to_dict()
        again = json.loads(json.dumps(row, allow_nan=False))
        assert again == row
        assert row["sqnr_db"] == "inf"
        assert row["scale"] == {"min": 1.0, "max": 1.0, "count": 1}
        assert row["zero_point"]["count"] == 1


def test_statistics_are_copies():
    model = prepared()
    found = lq.quantization_statistics(model)["4"]
    before = found.input_scale.clone()
    model[4].input_quantizer.scale.mul_(2)
    assert torch.equal(found.input_scale, before)


def test_mistakes_name_the_way_out():
    with pytest.raises(ValueError, match=r"Sequential has no quantized layer; call prepare\(model, plan\)"):
        lq.quantization_statistics(network())
    converted = lq.convert(prepared())
    with pytest.raises(ValueError, match="reference has no layer '0'; give the float model of the same class"):
        lq.quantization_statistics(converted, nn.Linear(2, 2))
    other = network()
    other[4] = nn.Linear(144, 6)
    with pytest.raises(ValueError, match=r"layer '4' has another shape in reference: \(6, 144\) and \(5, 144\)"):
        lq.quantization_statistics(converted, other)

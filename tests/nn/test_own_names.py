"""Layers whose attributes have names that prepared and converted layers use: StyleGAN's equalized ones, NFNets'."""

import pytest
import torch
from tensors import randn
from torch import nn
from torch.nn import functional as F

import lightning_qat as lq


class Equalized(nn.Linear):
    """With a learning rate per layer, as StyleGAN has it."""

    def __init__(self, features, kind):
        super().__init__(features, features)
        scale = torch.tensor(0.5)
        if kind == "parameter":
            self.scale = nn.Parameter(scale)
        elif kind == "buffer":
            self.register_buffer("scale", scale)
        else:
            self.scale = 0.5

    def forward(self, x):
        return F.linear(x, self.weight * self.scale, self.bias)


@pytest.mark.parametrize("kind", ["number", "buffer", "parameter"])
@pytest.mark.parametrize("config", ["int8", "w4a16", "nf4"])
def test_a_scale_of_its_own_is_what_a_converted_layer_reads(config, kind, tmp_path):
    def build():
        torch.manual_seed(0)
        return nn.Sequential(Equalized(128, kind))

    x, model = randn(4, 128), lq.prepare(build(), config)
    lq.calibrate(model, [x])
    converted = lq.convert(model.eval(), verify=[x])
    assert torch.as_tensor(converted[0].scale) == 0.5
    assert converted[0].held_scale().numel() > 1
    assert torch.equal(converted(x), model(x))
    lq.save_quantized(converted, tmp_path / "model")
    assert torch.equal(lq.load_quantized(tmp_path / "model", build())(x), model(x))


def test_a_scale_of_a_plain_layer_is_not_in_the_way_of_its_kernels():
    torch.manual_seed(0)
    x, model = randn(4, 128), nn.Sequential(nn.Linear(128, 64))
    converted = lq.convert(lq.prepare(model, "int8_dynamic"))
    expected = converted(x)
    model[0].scale = 7.0
    named = lq.convert(model)
    assert named[0].scale == 7.0
    assert torch.equal(named(x), expected)


class Computes(nn.Linear):
    def compute(self, x):
        return super().forward(x)

    def forward(self, x):
        return self.compute(x)


def test_other_names_are_refused_before_anything_is_hidden():
    model = nn.Sequential(nn.Linear(4, 4), Computes(4, 4))
    with pytest.raises(ValueError, match=r"layer '1' \(Computes\) has 'compute', .* LayerRule\('1'\)"):
        lq.prepare(model, "int8")
    assert type(model[0]) is nn.Linear
    model[0].codes = 3
    with pytest.raises(ValueError, match=r"layer '0' \(Linear\) has 'codes'"):
        lq.prepare(model, lq.QuantizationPlan([lq.LayerRule("1")], base="int8"))

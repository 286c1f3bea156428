"""What trained is what ships: codes bit for bit, numbers up to float rounding, the trained model untouched."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, prune

import lightning_qat as lq
from lightning_qat.nn import QATLayer, QuantizedLayer


def conv_norm(gamma, per_channel, bits, *, symmetric=True, group_size=None, layer=None, seed=0):
    torch.manual_seed(seed)
    layer = layer or nn.Conv2d(4, len(gamma), 3, padding=1, bias=seed % 2 == 0)
    model = nn.Sequential(layer, nn.BatchNorm2d(len(gamma)), nn.ReLU())
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor(gamma))
        model[1].bias.normal_()
    config = lq.QATConfig("int8", bits=bits, per_channel=per_channel, symmetric=symmetric, group_size=group_size)
    lq.prepare(model, config)
    for _ in range(2):
        model(torch.randn(3, 4, 8, 8))
    lq.calibrate(model, [torch.randn(3, 4, 8, 8)])
    return model.eval()


def dequantized_from_buffers(layer):
    """An independent reading of a converted layer: (code - zero) * scale, in float64."""
    codes, scale = layer.codes.double(), layer.weight_scale.double()
    zero = torch.zeros_like(scale) if layer.weight_zero_point is None else layer.weight_zero_point.double()
    axis, group = layer.weight_format.axis, layer.weight_format.group_size
    if group is not None:
        flat = codes.reshape(*scale.shape, group)
        return ((flat - zero[..., None]) * scale[..., None]).reshape(codes.shape)
    shape = [1] * codes.dim()
    if axis is not None:
        shape[axis] = -1
    return (codes - zero.view(shape)) * scale.view(shape)


GAMMAS = [1.0, -0.7, 0.0, 1e-30, -2.5, 3e-3, 1e-40, -0.0]


@pytest.mark.parametrize("bits", [8, 4, 3])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("layout", ["tensor", "channel", "group"])
@pytest.mark.parametrize("seed", [0, 1])
def test_folded_batchnorm_ships_what_trained(layout, symmetric, bits, seed):
    group = 12 if layout == "group" else None
    model = conv_norm(GAMMAS, layout == "channel", bits, symmetric=symmetric, group_size=group, seed=seed)
    converted = lq.convert(model)
    assert isinstance(converted[1], lq.nn.FoldedBatchNorm)
    x = torch.randn(5, 4, 8, 8)
    expected, shipped = model(x), converted(x)
    assert torch.isfinite(shipped).all()
    torch.testing.assert_close(shipped, expected, rtol=1e-4, atol=1e-5)
    # the stored weight is f times the weight that trained, exactly on its grid
    conv, norm = model[0], model[1]
    factor = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)
    trained = conv.weight_quantizer(conv.weight).double() * factor.view(-1, 1, 1, 1)
    torch.testing.assert_close(dequantized_from_buffers(converted[0]), trained, rtol=1e-5, atol=1e-30)
    fmt, codes = conv.weight_quantizer.format, conv.weight_codes()
    alive = factor.abs() > 1e-20
    flipped = -codes if fmt.symmetric else 2**bits - 1 - codes.int()
    same = (converted[0].codes.int() == codes.int()).flatten(1).all(1)
    negated = (converted[0].codes.int() == flipped.int()).flatten(1).all(1)
    assert (same | negated)[alive].all()


def test_a_gamma_of_zero_trains():
    """Zero-initialized residual branches: the gradient of gamma must be alive, and nothing NaN."""
    model = conv_norm([0.0] * 6, per_channel=False, bits=8).train()
    out = model[1](model[0](torch.randn(3, 4, 8, 8)))
    out.square().sum().backward()
    (out * torch.randn_like(out)).detach()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    model.zero_grad()
    (model[1](model[0](torch.randn(3, 4, 8, 8))) * torch.randn(3, 6, 8, 8)).sum().backward()
    assert (model[1].weight.grad.abs() > 0).all()


@pytest.mark.parametrize("plan", ["int8", "int8_dynamic", "int8_weight_only", "w4a8", "w4a4", "grouped", "asymmetric"])
def test_every_preset_converts_to_the_same_numbers(plan):
    torch.manual_seed(0)
    plans = {
        "grouped": lq.QATConfig("int4", group_size=12, activation_bits=None),
        "asymmetric": lq.QATConfig("int8", bits=5, symmetric=False, per_channel=True, activation_symmetric=True),
    }
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3, bias=False), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 8, 3, groups=4), nn.Flatten(),
        nn.Linear(8 * 16, 24), nn.BatchNorm1d(24), nn.GELU(), nn.Linear(24, 5),
    )  # fmt: skip
    if plan == "grouped":
        plans["grouped"] = lq.QuantizationPlan(
            [lq.LayerRule("*", lq.QuantizationConfig("int4", group_size=4)),
             lq.LayerRule("0", lq.QuantizationConfig("int4", group_size=9)),
             lq.LayerRule("3", lq.QuantizationConfig("int4", group_size=9))]
        )  # fmt: skip
    lq.prepare(model, plans.get(plan, plan))
    for _ in range(3):
        model(torch.randn(4, 3, 8, 8))
    lq.calibrate(model, [torch.randn(4, 3, 8, 8) for _ in range(2)])
    model.eval()
    state = {k: v.clone() for k, v in model.state_dict().items() if isinstance(v, torch.Tensor)}
    converted = lq.convert(model)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in state.items())
    assert not any(isinstance(m, QATLayer) for m in converted.modules())
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, QATLayer)]
    assert len(layers) == 4
    for name, layer in layers:
        quantized = converted.get_submodule(name)
        assert isinstance(quantized, QuantizedLayer)
        assert "weight" not in dict(quantized.named_parameters())
        if not layer.weight_quantizer.folded_norm:
            assert torch.equal(quantized.codes, layer.weight_codes())
            assert torch.equal(quantized.weight, layer.weight_quantizer(layer.weight))
    x = torch.randn(6, 3, 8, 8)
    assert lq.sqnr(model(x), converted(x)) > 60
    assert model.train()(x).requires_grad  # goes on training


def test_converted_model_holds_no_float_copy():
    model = lq.prepare(nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256)), "w4a16")
    converted = lq.convert(model)
    stored = sum(t.numel() * t.element_size() for t in converted.state_dict().values())
    assert stored < 2 * (256 * 256 / 2 + 256 * 2 * 4 + 256 * 4) + 1


def test_tied_weights_of_a_float_layer_are_copied():
    model = nn.ModuleDict({"table": nn.Embedding(10, 4), "head": nn.Linear(4, 10, bias=False)})
    model["head"].weight = model["table"].weight
    lq.prepare(model, "int8_weight_only")
    converted = lq.convert(model)
    before = converted["table"].weight.clone()
    with torch.no_grad():
        model["table"].weight.add_(1)
    assert torch.equal(converted["table"].weight, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_convert(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).to(dtype)
    lq.prepare(model, "int8")
    x = torch.randn(8, 16, dtype=dtype)
    lq.calibrate(model, [x])
    model.eval()
    converted = lq.convert(model)
    assert converted(x).dtype is dtype
    # Integer sums are exact where the reference rounds dequantized values to the dtype.
    wanted, got = model(x).detach().double(), converted(x).double()
    assert (got - wanted).norm() < 2 * torch.finfo(dtype).eps * wanted.norm()
    assert converted[0].weight_scale.dtype is torch.float32


def test_a_converted_model_can_be_cast():
    model = lq.prepare(nn.Sequential(nn.Linear(8, 4)), "int8_weight_only")
    converted = lq.convert(model).half()
    assert converted(torch.randn(2, 8).half()).dtype is torch.float16
    assert converted[0].weight_scale.dtype is torch.float32


def test_pruned_and_parametrized_layers_convert():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), parametrizations.weight_norm(nn.Linear(8, 4)))
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    lq.prepare(model, "int8")
    x = torch.randn(5, 8)
    model(x).sum().backward()
    assert model[0].weight_orig.grad is not None
    model.eval()
    converted = lq.convert(model)
    torch.testing.assert_close(converted(x), model(x), rtol=1e-5, atol=1e-5)
    assert (converted[0].codes == 0).float().mean() >= 0.5
    assert not any("orig" in k or "mask" in k or "parametrizations" in k for k in converted.state_dict())
    assert isinstance(model[0], lq.QATLinear)


class Scaled(nn.Linear):
    def forward(self, x, factor=1.0):
        return nn.functional.linear(x, self.weight * factor, self.bias)


def test_a_subclass_with_its_own_forward_dequantizes():
    torch.manual_seed(0)
    model = nn.ModuleDict({"layer": Scaled(6, 5)})
    lq.prepare(model, "int8")
    x = torch.randn(3, 6)
    lq.calibrate(model, [x], lambda m, b: m["layer"](b, factor=2.0))
    model.eval()
    converted = lq.convert(model)
    assert torch.equal(converted["layer"](x, factor=2.0), model["layer"](x, factor=2.0))
    assert isinstance(converted["layer"], Scaled)


@settings(max_examples=40, deadline=None)
@given(
    bits=st.integers(2, 16),
    rows=st.integers(1, 9),
    groups=st.integers(1, 3),
    group=st.sampled_from([1, 3, 8]),
    layout=st.sampled_from(["tensor", "channel", "group"]),
    symmetric=st.booleans(),
    magnitude=st.sampled_from([0.0, 1e-30, 1.0, 1e30]),
    seed=st.integers(0, 99),
)
def test_codes_are_the_fake_quantizers_at_any_size(bits, rows, groups, group, layout, symmetric, magnitude, seed):
    torch.manual_seed(seed)
    linear = nn.Linear(groups * group, rows)
    with torch.no_grad():
        linear.weight.mul_(magnitude)
    config = lq.QuantizationConfig(
        "int8", bits=bits, symmetric=symmetric, per_channel=layout == "channel",
        group_size=group if layout == "group" else None,
    )  # fmt: skip
    model = lq.prepare(linear, config)
    converted = lq.convert(model)
    assert torch.equal(converted.codes, model.weight_codes())
    assert torch.equal(converted.weight, model.weight_quantizer(model.weight))


def test_embedding_converts_row_by_row():
    torch.manual_seed(0)
    for bits, features in [(8, 6), (4, 6), (4, 5), (3, 7)]:
        config = lq.QuantizationConfig("int8", bits=bits, per_channel=True)
        model = nn.Sequential(nn.Embedding(11, features, max_norm=1.0 if bits == 3 else None))
        lq.prepare(model, lq.QuantizationPlan([lq.LayerRule(nn.Embedding, config)]))
        converted = lq.convert(model.eval())
        index = torch.tensor([[0, 10], [3, 3]])
        assert torch.equal(converted(index), model(index))


def test_conversion_errors():
    with pytest.raises(ValueError, match="call prepare"):
        lq.convert(nn.Sequential(nn.Linear(2, 2)))
    model = lq.prepare(nn.Sequential(nn.Linear(2, 2)), "int8_weight_only")
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="weight of layer '0' holds NaN or inf"):
        lq.convert(model)
    assert isinstance(model[0], lq.QATLinear)


def test_copies_train_apart():
    model = lq.prepare(nn.Sequential(nn.Linear(4, 4)), "int8")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin[0].weight.mul_(2)
    assert not torch.equal(twin[0].weight, model[0].weight)
    assert lq.prepare(twin, "int8") is twin

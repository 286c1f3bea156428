"""Converted layers compute with integers where the grid is the trained one; the reference is the judge."""

import copy
import math
import pickle
import threading

import pytest
import torch
from tensors import randn
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import lightning_qat as lq
from lightning_qat.native.library import without_native
from lightning_qat.native.linear_int8 import has_linear_int8
from lightning_qat.nn import QuantizedLayer
from lightning_qat.nn.conv import _QuantizedConv
from lightning_qat.ops.bag_linear import bags_are_exact
from lightning_qat.ops.digit_linear import digits_are_exact
from lightning_qat.ops.integer_conv import conv_is_exact
from lightning_qat.ops.integer_linear import linear_is_exact

pytestmark = pytest.mark.skipif(not (linear_is_exact() and conv_is_exact()), reason="no exact integer kernels here")


def conversion(layer, x, preset="int8"):
    """Return ``layer`` as it is after preparation, calibration on ``x`` and conversion."""
    model = nn.Sequential(layer)
    lq.prepare(model, preset)
    lq.calibrate(model, [x])
    return lq.convert(model)[0]


def reference(layer, x):
    """What the layer computes without integer kernels."""
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        for module in ("lightning_qat.nn.linear", "lightning_qat.nn.conv"):
            patch.setattr(f"{module}.takes_integers", lambda *_: False)
        return layer(x)


def kernel_of(layer):
    """Whose kernel computes a few tokens."""
    return "native" if isinstance(layer, nn.Linear) and has_linear_int8() else "onednn"


def sqnr(wanted, got):
    error = (wanted.double() - got.double()).square().sum()
    return math.inf if error == 0 else 10 * math.log10(wanted.double().square().sum() / error)


@pytest.fixture
def used(monkeypatch):
    """The number of calls that went to an integer kernel."""
    calls = []
    for kind in (_QuantizedConv, lq.QuantizedLinear):

        def counted(self, x, kernel=kind._kernel):
            found = kernel(self, x)
            if found is not None:
                calls.append(1)
            return found

        monkeypatch.setattr(kind, "_kernel", counted)
    return calls


LAYERS = [
    (lambda: nn.Linear(13, 7), (5, 13)),
    (lambda: nn.Linear(13, 7, bias=False), (2, 3, 13)),
    (lambda: nn.Linear(13, 7), (13,)),
    (lambda: nn.Conv1d(6, 10, 3, padding=1), (2, 6, 11)),
    (lambda: nn.Conv1d(6, 10, 3, padding=1, padding_mode="circular"), (6, 11)),
    (lambda: nn.Conv2d(6, 10, (3, 5), stride=2), (2, 6, 11, 13)),
    (lambda: nn.Conv2d(8, 8, 3, groups=8, padding=(2, 1), bias=False), (2, 8, 9, 9)),
    (lambda: nn.Conv2d(3, 7, 3, padding=1, padding_mode="reflect"), (2, 3, 9, 9)),
    (lambda: nn.Conv2d(3, 7, (3, 4), padding="same", dilation=(1, 3)), (2, 3, 9, 12)),
    (lambda: nn.Conv2d(3, 7, (4, 2), padding="same"), (3, 9, 9)),
    (lambda: nn.Conv2d(3, 7, 3, padding="valid"), (1, 3, 9, 9)),
]
PLANS = {
    "preset": ("int8", " int8"),
    "symmetric": (lq.QATConfig("int8", activation_symmetric=True), " int8"),
    "w4a8": (lq.QATConfig("int4", bits=4, per_channel=True), " int8"),
    "asymmetric w4a8": (lq.QATConfig("int4", bits=4, symmetric=False, per_channel=True), " int8"),
    "w8a5": (lq.QATConfig("int8", activation_bits=5), " int8"),
}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(("build", "shape"), LAYERS)
def test_integers_equal_the_reference_up_to_float_rounding(build, shape, plan, used):
    torch.manual_seed(0)
    x = torch.randn(shape) + 0.5
    layer = conversion(build(), x, PLANS[plan][0])
    assert layer.execution == kernel_of(layer) + PLANS[plan][1]
    assert layer.execution in repr(layer)
    for values in (x, 4 * x):  # the second beyond the grid
        with torch.no_grad():
            got = layer(values)
        wanted = reference(layer, values)
        assert got.shape == wanted.shape
        assert got.stride() == wanted.stride()
        assert sqnr(wanted, got) > 100
    assert len(used) == 2


@pytest.mark.parametrize("shape", [(5, 13), (2, 3, 13), (13,)])
def test_dynamic_ranges_per_token(shape, used):
    torch.manual_seed(0)
    x = torch.randn(shape) * torch.rand(*shape[:-1], 1) * 100
    layer = conversion(nn.Linear(13, 7), x, "int8_dynamic")
    assert layer.execution == kernel_of(layer) + " int8 per token"
    assert sqnr(reference(layer, x), layer(x)) > 100
    assert len(used) == 1


def test_channels_last_stays_channels_last():
    x = randn(2, 6, 8, 8).to(memory_format=torch.channels_last)
    layer = conversion(nn.Conv2d(6, 10, 3), x)
    assert layer(x).is_contiguous(memory_format=torch.channels_last)
    assert layer(x.contiguous()).is_contiguous()
    torch.testing.assert_close(layer(x), layer(x.contiguous()), rtol=0, atol=0)


@pytest.mark.parametrize("bits", [8, 4])
def test_folded_batch_norm_with_negative_gamma(bits, used):
    """A code without a negative keeps a negative scale."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(5, 9, 3), nn.BatchNorm2d(9))
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(9))
    x = torch.randn(4, 5, 8, 8)
    lq.prepare(model, lq.QATConfig("int8", bits=bits, per_channel=True))
    model.train()(x)
    converted = lq.convert(model)
    assert sqnr(reference(converted, x), converted(x)) > 100
    assert len(used) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("preset", ["int8", "int8_dynamic"])
def test_half_precision_is_nearer_to_exact_than_the_reference(dtype, preset, used):
    torch.manual_seed(0)
    x = torch.randn(16, 64)
    layer = conversion(nn.Linear(64, 32), x, preset)
    exact = layer.to(dtype)
    got = exact(x.to(dtype))
    wanted = reference(exact, x.to(dtype))
    assert len(used) == 1
    assert got.dtype is dtype
    assert sqnr(wanted, got) > (60 if dtype is torch.float16 else 42)
    scheme_x = x.to(dtype).double()
    values = exact.float().double()  # the same codes and scales, bias rounded to dtype before
    truth = values.quantized_input(scheme_x) @ values.weight.double().T + values.bias.double()
    assert sqnr(truth, got) >= sqnr(truth, wanted)


REFERENCES = {
    "weight-only": (lambda: nn.Conv1d(8, 4, 1), "int8_weight_only", (2, 8, 3)),
    "weights in groups": (lambda: nn.Linear(8, 4), lq.QuantizationPlan(
        [lq.LayerRule("*", lq.QuantizationConfig("int4", group_size=4), lq.QuantizationConfig("int8"))]), (2, 8)),
    "asymmetric 8-bit weights": (lambda: nn.Linear(8, 4), lq.QATConfig("int8", symmetric=False), (2, 8)),
    "three spatial dimensions": (lambda: nn.Conv3d(2, 3, 3), "int8", (1, 2, 4, 4, 4)),
    "groups of several channels": (lambda: nn.Conv2d(6, 10, 3, groups=2), "int8", (1, 6, 4, 4)),
    "ranges per sample": (lambda: nn.Conv2d(2, 3, 3), "int8_dynamic", (1, 2, 4, 4)),
    "no integer kernel for this layer": (lambda: nn.ConvTranspose2d(2, 3, 3), lq.QATConfig("int8"), (1, 2, 4, 4)),
}  # fmt: skip


@pytest.mark.parametrize("reason", REFERENCES)
def test_the_reference_says_why(reason, used):
    build, plan, shape = REFERENCES[reason]
    x = randn(*shape)
    layer = conversion(build(), x, plan)
    assert layer.execution == f"reference: {reason}"
    assert torch.equal(layer(x), reference(layer, x))
    assert not used


class OwnForward(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class OwnConvolution(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight, bias) * 2


@pytest.mark.parametrize(
    ("build", "reason", "shape"),
    [
        (lambda: OwnForward(8, 4), "a forward of its own", (2, 8)),
        (lambda: OwnConvolution(2, 3, 3), "a convolution of its own", (1, 2, 4, 4)),
    ],
)
def test_code_of_the_user_is_kept(build, reason, shape, used):
    x = randn(*shape)
    layer = conversion(build(), x)
    assert layer.execution == f"reference: {reason}"
    assert torch.equal(layer(x), reference(layer, x))
    assert not used


def test_training_float64_and_a_cpu_that_saturates(monkeypatch, used):
    x = randn(2, 8)
    layer = conversion(nn.Linear(8, 4), x)
    assert layer.train().execution == "reference: training mode"
    layer(x)
    assert layer.eval().double().execution == "reference: computes in float64"
    layer(x.double())
    layer.float()
    monkeypatch.setattr("lightning_qat.nn.linear.linear_is_exact", lambda: False)
    with without_native():
        assert layer.execution == "reference: no exact integer kernel on this CPU"
        layer(x)
    assert not used
    if has_linear_int8():  # which is exact on any, and for few tokens alone
        assert layer.execution == "native int8"
        assert sqnr(reference(layer, x), layer(x)) > 100
        layer(randn(100, 8))
        assert len(used) == 1


def test_calls_that_take_the_reference(used):
    x = randn(3, 8)
    layer = conversion(nn.Linear(8, 4), x)
    grad = x.clone().requires_grad_()
    layer(grad).sum().backward()
    assert grad.grad.abs().sum() > 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype is torch.bfloat16
    assert layer(x[:0]).shape == (0, 4)
    assert torch.equal(torch.jit.trace(layer, x, check_trace=False)(x), reference(layer, x))
    value, tangent = torch.func.jvp(layer, (x,), (x,))
    assert torch.equal(value, reference(layer, x))
    assert tangent.any()
    assert torch.equal(layer(torch._neg_view(x)), reference(layer, -x))
    with pytest.raises(RuntimeError):
        layer(x.double())
    with pytest.raises(RuntimeError):
        layer(x[:, :5])
    assert not used
    with torch.inference_mode():
        layer(x)
    layer(x)
    assert len(used) == 2


def test_mistaken_shapes_of_a_convolution_raise_as_ever():
    x = randn(2, 3, 6, 6)
    layer = conversion(nn.Conv2d(3, 4, 3), x)
    for wrong in (x[:, :2], x[:, :, :2], x[0, 0], x[:0, :, :1]):
        with pytest.raises(RuntimeError):
            layer(wrong)
    assert layer(x[:0]).shape == (0, 4, 4, 4)


@pytest.mark.parametrize("build", [lambda: nn.Conv2d(3, 4, 3), lambda: nn.Linear(6, 4)])
def test_the_cache_is_no_state_and_is_never_stale(build):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, 6)
    layer, other = conversion(build(), x), conversion(build(), 2 * x)
    keys = set(layer.state_dict())
    before, target = layer(x), other(x)
    assert set(layer.state_dict()) == keys
    twins = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)]
    assert all(torch.equal(twin(x), before) for twin in twins)
    twins[0].load_state_dict(other.state_dict())
    assert torch.equal(twins[0](x), target)
    for name, value in other._buffers.items():
        if value is not None:
            twins[1]._buffers[name].data = value.clone()
    twins[1].bias.data = other.bias.data
    assert torch.equal(twins[1](x), target)
    for name, value in other._buffers.items():
        setattr(twins[2], name, value)
    twins[2].bias = other.bias
    assert torch.equal(twins[2](x), target)
    assert torch.equal(layer(x), before)
    layer.weight_scale.mul_(2.0)
    assert sqnr(reference(layer, x), layer(x)) > 100
    assert torch.equal(layer.half().float()(x), layer(x))


def test_a_convolution_follows_its_stride():
    x = randn(2, 3, 7, 7)
    layer = conversion(nn.Conv2d(3, 4, 3), x)
    layer(x)
    layer.stride = (2, 2)
    assert sqnr(reference(layer, x), layer(x)) > 100


def test_a_convolution_follows_its_padding(used):
    """As where a strided network is made a dilated one: padding and dilation are set on layers that exist."""
    x, layer = randn(2, 3, 9, 9), nn.Conv2d(3, 4, 3, padding=1)
    layer.dilation, layer.padding = (2, 2), (2, 2)
    layer = conversion(layer, x)
    assert layer(x).shape == (2, 4, 9, 9)
    assert sqnr(reference(layer, x), layer(x)) > 80
    assert used


def test_an_output_of_one_column_takes_the_reference(used):
    """oneDNN itself is wrong here in all rows but the first."""
    x = randn(3, 7, 7, 4)
    layer = conversion(nn.Conv2d(7, 7, 3, stride=(1, 3), padding=(2, 0), groups=7), x)
    assert torch.equal(layer(x), reference(layer, x))
    assert not used
    assert sqnr(reference(layer, x[..., :1, :]), layer(x[..., :1, :])) > 100


def test_many_threads_build_one_kernel():
    x = randn(2, 64)
    layer = conversion(nn.Linear(64, 32), x)
    wanted, results = copy.deepcopy(layer)(x), []
    threads = [threading.Thread(target=lambda: results.append(layer(x))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    assert all(torch.equal(wanted, result) for result in results)


@pytest.mark.parametrize("preset", ["int8", "int8_dynamic"])
def test_compile_and_export_take_the_reference(preset):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    lq.prepare(model, preset)
    lq.calibrate(model, [x])
    model = lq.convert(model)
    eager = model(x)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
        strict, loose = (torch.export.export(model, (x,), strict=s).module()(x) for s in (True, False))
    wanted = reference(model, x)
    for got in (compiled, strict, loose):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(model(x), eager)


@pytest.mark.parametrize("preset", ["int8", "int8_weight_only", "w4a16", "nf4"])
def test_modes_that_see_operations_take_the_reference(preset):
    x = randn(3, 128)
    layer = conversion(nn.Linear(128, 128), x, preset)
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        assert layer(x).shape == (3, 128)  # no kernel reads or writes address 0, none is kept that holds such
    with torch.no_grad():
        torch.testing.assert_close(make_fx(layer)(x)(2 * x), layer(2 * x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("preset", ["int8", "int8_dynamic_per_tensor", "int8_weight_only", "llm_int8", "w4a16", "nf4"])
def test_the_default_device_does_not_matter(preset):
    x = randn(20, 256)
    layer = conversion(nn.Linear(256, 256), x, preset)
    with torch.no_grad(), without_native():
        expected = copy.deepcopy(layer)(x)
        with torch.device("meta"):
            for probe in (linear_is_exact, digits_are_exact, bags_are_exact):
                probe.cache_clear()  # as where this is the first call of all
            assert torch.equal(layer(x), expected)
            assert torch.equal(layer(x[:1]), copy.deepcopy(layer)(x[:1]))
            probed = linear_is_exact()
    linear_is_exact.cache_clear()
    assert probed == linear_is_exact()


def test_codes_made_in_inference_mode_stay_on_the_reference(used):
    x = randn(2, 8)
    with torch.inference_mode():
        layer = copy.deepcopy(conversion(nn.Linear(8, 4), x))
        for name, value in list(layer._buffers.items()):
            layer._buffers[name] = None if value is None else value.clone()
        layer(x)
    assert layer.execution == "reference: built in inference mode"
    assert not used


def test_save_and_load_round_trip(tmp_path, used):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    fresh = copy.deepcopy(model)
    lq.prepare(model, "int8")
    lq.calibrate(model, [x])
    converted = lq.convert(model)
    before = converted(x)
    lq.save_quantized(converted, tmp_path / "model")
    loaded = lq.load_quantized(tmp_path / "model", fresh)
    executions = [m.execution for m in loaded.modules() if isinstance(m, QuantizedLayer)]
    assert executions == ["onednn int8, codes out", kernel_of(nn.Linear(1, 1)) + " int8"]
    assert torch.equal(loaded(x), before)
    assert len(used) == 4

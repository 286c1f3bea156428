"""PACT: only what is clipped moves the clipping value, a decay pulls it back, and the codes stay those of the grid."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lightning_qat as lq
from lightning_qat.quantizers.clipping import LearnedClipping, add_clipping_decay
from lightning_qat.quantizers.fake_quantizer import ActivationQuantizer
from lightning_qat.quantizers.learned_scale import check_scales


def quantizer_of(scale, bits=4, symmetric=False, zero_point=0, decay=0.0):
    config = lq.QuantizationConfig("int8", bits=bits, symmetric=symmetric, learnable=True, pact_decay=decay)
    quantizer = ActivationQuantizer(config, "net.0")
    quantizer._store(torch.tensor(scale), torch.tensor(zero_point, dtype=torch.int32))
    quantizer.calibrated, quantizer.observing = True, False
    return quantizer


def through(quantizer, x, how):
    """The three ways of a call: as a layer makes it, by ops that trace, and compiled."""
    if how == "layer":
        return quantizer.fake_quantize_through(x, quantizer.parameters_now(x), [])
    if how == "made again":
        made = []
        y = quantizer.fake_quantize_through(x, quantizer.parameters_now(x), made)
        made[:] = [y.detach().clone()]
        return y
    return quantizer(x)


WAYS = ["layer", "made again", "ops"]


def paper(x, alpha, bits):
    """Equation 1 of Choi et al., differentiated by autograd, with the grid's rounding straight through."""
    clipped = 0.5 * (x.abs() - (x - alpha).abs() + alpha)
    step = alpha.detach() / (2**bits - 1)
    return clipped + ((clipped / step).round() * step - clipped).detach()


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_values_and_gradients_are_the_papers(how, bits):
    torch.manual_seed(0)
    levels, scale = 2**bits - 1, 0.0625
    alpha = torch.tensor(scale * levels, requires_grad=True)
    x = torch.randn(64, 9) * scale * levels
    # The paper's ends are sharp, ours take in what rounds to the end code: none of these are within half a step.
    x = torch.where((x / scale - levels).abs() < 0.51, 0.25, torch.where((x / scale).abs() < 0.51, 0.25, x))
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    grad = torch.randn(64, 9)
    quantizer = quantizer_of(scale, bits)
    through(quantizer, mine, how).backward(grad)
    paper(theirs, alpha, bits).backward(grad)
    torch.testing.assert_close(through(quantizer, x, how), paper(x, alpha, bits).detach(), rtol=1e-6, atol=1e-6)
    assert torch.equal(mine.grad, theirs.grad)
    # A step of gradient descent moves alpha as it would move the paper's.
    learned = quantizer.learned
    lr = 1e-4
    with torch.no_grad():
        learned.exponent -= lr * learned.exponent.grad
    moved = float(learned.scale()) * levels - scale * levels
    assert moved == pytest.approx(-lr * float(alpha.grad), rel=2e-2)
    assert abs(moved) > 1e-6


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize(("symmetric", "zero_point"), [(True, 0), (False, 5)])
def test_two_sided_ranges_move_both_ends(how, symmetric, zero_point):
    quantizer = quantizer_of(0.5, 4, symmetric, zero_point)
    low, high = (-8, 7) if symmetric else (-5, 10)
    x = torch.tensor([100.0, -100.0, 0.3, 1.1], requires_grad=True)
    y = through(quantizer, x, how)
    assert y.tolist() == [high * 0.5, low * 0.5, 0.5, 1.0]
    grad = torch.tensor([1.0, 10.0, 100.0, 1000.0])
    y.backward(grad)
    assert x.grad.tolist() == [0.0, 0.0, 100.0, 1000.0]
    slope, factor = 0.5, 1 / 15**2
    assert quantizer.learned.exponent.grad.item() == pytest.approx((high + 10 * low) * factor / slope)
    assert quantizer.learned.offset is None or not quantizer.learned.offset.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_have_the_values_of_a_fixed_scale(dtype):
    torch.manual_seed(1)
    x = (torch.randn(200) * 4).to(dtype)
    quantizer = quantizer_of(0.1)
    fixed = quantizer.scheme.fake_quantize(x, quantizer.scale, quantizer.zero_point, quantizer.format)
    for how in WAYS:
        mine = x.clone().requires_grad_()
        y = through(quantizer, mine, how)
        assert torch.equal(y, fixed)
        assert y.dtype == dtype
        y.float().sum().backward()
        inside = ((x.float() < 15.51 * 0.1) & (x.float() > -0.51 * 0.1)).to(dtype)
        assert torch.equal(mine.grad, inside)


def test_what_calibration_saw_decides_between_one_and_two_ends():
    model = lq.prepare(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), lq.QATConfig("int8", pact_decay=0.0))
    torch.manual_seed(0)
    lq.calibrate(model, [torch.randn(32, 8) for _ in range(4)])
    assert model[0].input_quantizer.zero_point.item() > 100
    assert model[2].input_quantizer.zero_point.item() == 0
    zero_points = [model[i].input_quantizer.zero_point for i in (0, 2)]
    groups = lq.quantization_param_groups(model, 0.05, 0.05)
    assert len(groups[1]["params"]) == 2  # the clipping values; weights keep the scale of their range
    optimizer = torch.optim.SGD(groups)
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randn(32, 8) * 3).square().mean().backward()
        optimizer.step()
    assert [model[i].input_quantizer.zero_point for i in (0, 2)] == zero_points


def test_alpha_settles_where_the_clipped_gradient_and_the_decay_are_equal():
    quantizer = quantizer_of(0.25, bits=4, decay=0.5)
    parameters = list(quantizer.learned.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.05)
    x = torch.full((10,), 50.0)
    for _ in range(2000):
        optimizer.zero_grad()
        (-0.1 * through(quantizer, x, "layer")).sum().backward()  # d/dalpha = -1
        add_clipping_decay(nn.ModuleList([quantizer]))
        optimizer.step()
    assert float(quantizer.scale) * 15 == pytest.approx(2.0, rel=1e-2)  # 0.5 alpha = 1
    before = float(quantizer.scale)
    optimizer.zero_grad()
    add_clipping_decay(nn.ModuleList([quantizer]))  # nothing was learned: nothing decays
    optimizer.step()
    assert float(quantizer.scale) == before


@pytest.mark.parametrize("plan", ["w8a8", "w4a4 learned weights", "conv"])
def test_the_converted_model_has_the_codes_that_trained(plan):
    torch.manual_seed(0)
    if plan == "conv":
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
        config, x = lq.QATConfig("int8", per_channel=True, pact_decay=1e-3), torch.randn(16, 3, 9, 9)
    else:
        model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4))
        x = torch.randn(64, 12)
        options = {} if plan == "w8a8" else {"activation_bits": 4, "learnable_step_size": True}
        config = lq.QATConfig("int8" if plan == "w8a8" else "int4", per_channel=True, pact_decay=1e-3, **options)
    lq.prepare(model, config)
    lq.calibrate(model, [x])
    before = model[-1].input_quantizer.scale
    optimizer = torch.optim.AdamW(lq.quantization_param_groups(model, 1e-3, 1e-2))
    for _ in range(10):
        optimizer.zero_grad()
        (F.mse_loss(model(x), torch.ones_like(model(x)))).backward()
        add_clipping_decay(model)
        optimizer.step()
    assert model[-1].input_quantizer.scale != before
    converted = lq.convert(model.eval(), verify=[x])
    first, last = (copy.deepcopy(m) for m in (model[0].input_quantizer, model[-1].input_quantizer))
    assert torch.equal(converted[0].input_scale, first.scale)
    assert torch.equal(converted[-1].input_scale, last.scale)
    codes = converted[0].quantized_input(x) / first.scale
    assert torch.equal((codes + first.zero_point).round().to(torch.int64), first.codes(x).to(torch.int64))


def test_state_goes_with_the_model_and_bits_keep_the_clipping_value():
    model = lq.prepare(nn.Sequential(nn.Linear(8, 4)), lq.QATConfig("int8", pact_decay=0.1))
    lq.calibrate(model, [torch.randn(16, 8)])
    other = lq.prepare(nn.Sequential(nn.Linear(8, 4)), lq.QATConfig("int8", pact_decay=0.1))
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    one, two = model[0].input_quantizer, other[0].input_quantizer
    assert torch.equal(one.scale, two.scale)
    assert torch.equal(one.zero_point, two.zero_point)
    assert two.zero_point.item() > 0
    alpha = float(one.scale) * 255
    lq.set_bits(model, 4, activations=True)
    assert 0.3 * alpha < float(one.scale) * 15 < 1.5 * alpha
    assert abs(one.zero_point.item() - two.zero_point.item() / 17) < 1
    moved = model.to(torch.bfloat16)[0].input_quantizer.learned
    assert moved.exponent.dtype == moved.offset.dtype == torch.float32
    assert "clipping, decay=0.1" in repr(model)


def test_a_clipping_value_that_is_none_any_more_raises_and_names_the_layer():
    quantizer = quantizer_of(0.25)
    with torch.no_grad():
        quantizer.learned.exponent.fill_(float("nan"))
    with pytest.raises(ValueError, match="the learned scale is NaN for the input of layer 'net.0'"):
        check_scales([quantizer.learned])


def test_what_the_compiled_graph_computes_is_the_same():
    torch.manual_seed(0)
    model = lq.prepare(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), lq.QATConfig("int8", pact_decay=0.1))
    x = torch.randn(16, 8)
    lq.calibrate(model, [x])
    lq.apply_phase(model, lq.Phase(observing=False))
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    for each in (model, compiled):
        each(x * 2).sum().backward()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)
    assert isinstance(twin[2].input_quantizer.learned, LearnedClipping)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lq.QuantizationConfig("int8", pact_decay=0.1), "pact_decay=0.1 needs learnable=True"),
        (lambda: lq.QuantizationConfig("int8", learnable=True, pact_decay=-1), "pact_decay=-1 is not allowed"),
        (
            lambda: lq.QATConfig("int8", pact_decay=0.1, activation_bits=None),
            "needs activations with calibrated ranges",
        ),
        (lambda: lq.QATConfig("int8", pact_decay=0.1, activation_dynamic=True), "needs activations with calibrated"),
        (lambda: lq.QATConfig("llm_int8", pact_decay=0.1), "needs activations with calibrated"),
        (
            lambda: lq.prepare(
                nn.Sequential(nn.Linear(2, 2)),
                lq.QuantizationPlan([lq.LayerRule("*", lq.QuantizationConfig(learnable=True, pact_decay=0.1))]),
            ),
            "pact_decay=0.1 is for activations, not the weight of layer '0'",
        ),
    ],
)
def test_settings_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()

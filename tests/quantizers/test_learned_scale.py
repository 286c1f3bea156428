"""Learned scales: positive by construction, LSQ's gradient, the same scale in training and conversion."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lightning_qat as lq
from lightning_qat.native.library import without_native
from lightning_qat.ops.fake_quantize import EDGE, fake_quantize_op
from lightning_qat.ops.straight_through import _by_products, learned_gradients
from lightning_qat.quantizers.exponents import exponent_of, scale_of
from lightning_qat.quantizers.fake_quantizer import ActivationQuantizer
from lightning_qat.quantizers.learned_scale import LearnedScale, least_error_parameters
from lightning_qat.quantizers.scale_gradients import (
    exponent_gradient,
    offset_gradient,
    slope_of,
)
from lightning_qat.quantizers.weight_quantizer import WeightQuantizer
from lightning_qat.schemes import get_scheme, rows_of
from lightning_qat.transforms.phase import Phase, apply_phase

GRANULARITIES = [{}, {"per_channel": True}, {"group_size": 4}]


def w4a4(**kwargs):
    return lq.QATConfig("int4", activation_bits=4, learnable_step_size=True, **kwargs)


# --- the parameter --------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.floats(-125.0, 126.0, width=32), min_size=1, max_size=9))
def test_a_scale_is_its_exponent_with_straight_lines_between_powers_of_two(exponents):
    p = torch.tensor(exponents, dtype=torch.float32)
    expected = [2.0 ** math.floor(e) * (1 + (e - math.floor(e))) for e in p.tolist()]
    assert (scale_of(p) > 0).all()
    torch.testing.assert_close(scale_of(p).double(), torch.tensor(expected, dtype=torch.float64), rtol=2**-22, atol=0)


@settings(deadline=None)
@given(st.lists(st.floats(2.0**-100, 2.0**100, width=32), min_size=1, max_size=9))
def test_a_scale_comes_back_from_its_exponent(scales):
    scale = torch.tensor(scales, dtype=torch.float32)
    again = scale_of(exponent_of(scale))
    torch.testing.assert_close(again, scale, rtol=2**-17, atol=0)
    torch.testing.assert_close(scale_of(exponent_of(again)), again, rtol=0, atol=0)
    assert ((slope_of(again) <= again) & (again < 2 * slope_of(again))).all()


@pytest.mark.parametrize("symmetric", [False, True])
def test_parameters_may_be_held_as_plain_attributes(symmetric):
    """The replicas of ``nn.DataParallel`` have no parameters, but tensors in their places."""
    learned = LearnedScale((3,), symmetric=symmetric, name="weight")
    learned.store(torch.tensor([0.5, 0.75, 3.0]), torch.tensor([0, 7, 255]), 8)
    replica = learned._replicate_for_data_parallel()
    for name, parameter in learned._parameters.items():
        setattr(replica, name, None if parameter is None else parameter * 1)
    for found, expected in zip(replica.parameters_now(8), learned.parameters_now(8), strict=True):
        assert torch.equal(found, expected)
    assert torch.equal(replica.scale(), learned.scale())


@pytest.mark.parametrize("lr", [0.5, 10.0])
def test_no_optimizer_makes_a_scale_negative(lr):
    layer = lq.QATLinear(nn.Linear(8, 4), w4a4(activation_symmetric=True))
    parameter = layer.weight_quantizer.learned.exponent
    for optimizer in (torch.optim.SGD([parameter], lr), torch.optim.Adam([parameter], lr)):
        for _ in range(5):
            parameter.grad = torch.ones_like(parameter)
            optimizer.step()
            assert layer.weight_quantizer.scale > 0


# --- the gradient ---------------------------------------------------------------------------------


def witness(v, s, quant_min, quant_max, beyond=0.0):
    """LSQ's equation 3 for d v_hat / d s, float64; values up to ``beyond`` past the last code count as in range."""
    ratio = v.double() / s
    inside = ratio.round() - ratio
    result = torch.where(ratio <= quant_min - beyond, torch.tensor(float(quant_min)).double(), inside)
    return torch.where(ratio >= quant_max + beyond, torch.tensor(float(quant_max)).double(), result)


def test_the_witness_is_right():
    """By hand, and by differences where what rounding adds is held still, as the straight-through estimator says."""
    v = torch.tensor([0.3, 0.7, -0.9, 5.0, -5.0], dtype=torch.float64)
    s, low, high = 0.5, -2, 1
    by_hand = torch.tensor([1 - 0.6, 1.0, 0.0, 1.0, -2.0], dtype=torch.float64)
    by_hand[2] = -2 + 1.8
    torch.testing.assert_close(witness(v, s, low, high), by_hand)
    added = torch.round(v / s) - v / s
    for value, extra, expected in zip(v, added, by_hand, strict=True):

        def smooth(step, value=value, extra=extra):
            ratio = value / step
            return step * (ratio.clamp(low, high) + (extra if low < value / s < high else 0))

        h = 1e-6
        found = (smooth(s + h) - smooth(s - h)) / (2 * h)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def quantizer_of(weight, **kwargs):
    config = lq.QuantizationConfig("int8", learnable=True, **kwargs)
    made = WeightQuantizer(config, weight, "w")
    made.begin_learning(weight)
    return made


def away_from_the_last_half_step(weight, scale_rows, rows, low, high):
    """Move values that lie between the last code and half a step beyond it, where clipping first and rounding first
    differ, onto the last code's inner side."""
    ratio = rows / scale_rows
    ratio = torch.where((ratio >= high - 0.01) & (ratio <= high + EDGE), torch.tensor(high - 0.4), ratio)
    return torch.where((ratio <= low + 0.01) & (ratio >= low - EDGE), torch.tensor(low + 0.4), ratio) * scale_rows


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_the_gradient_of_a_weights_scale_is_the_papers(bits, granularity):
    torch.manual_seed(bits)
    weight = torch.randn(6, 8)
    quantizer = quantizer_of(weight, bits=bits, **granularity)
    low, high = (-127, 127) if bits == 8 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    scale = quantizer.scale
    rows = rows_of(weight, quantizer.format)
    values = away_from_the_last_half_step(weight, scale.reshape(-1, 1), rows, low, high)
    values = torch.cat((values[:, :-1], values[:, -1:] * 40), 1).reshape(6, 8).requires_grad_()  # some are clipped
    grad = torch.randn(6, 8)
    quantizer(values).backward(grad)
    terms = witness(rows_of(values.detach(), quantizer.format), scale.double().reshape(-1, 1), low, high)
    n = terms.shape[1]
    expected = (rows_of(grad, quantizer.format).double() * terms).sum(1) / math.sqrt(n * high)
    found = quantizer.learned.exponent.grad.double().reshape(-1) * slope_of(scale).reshape(-1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    ratio = rows_of(values.detach(), quantizer.format) / scale.reshape(-1, 1)
    assert torch.equal(rows_of(values.grad, quantizer.format) != 0, (ratio > low - EDGE) & (ratio < high + EDGE))


def test_the_gradient_of_an_activation_counts_features_not_samples():
    torch.manual_seed(0)
    x = torch.randn(16, 5, 3)
    grads = []
    for batch in (x, torch.cat((x, x))):
        quantizer = ActivationQuantizer(lq.QuantizationConfig("int8", bits=4, symmetric=False, learnable=True), "a")
        quantizer(x)
        (quantizer(batch) ** 3).mean().backward()
        grads.append((quantizer.learned.exponent.grad, quantizer.learned.offset.grad))
    torch.testing.assert_close(grads[0], grads[1])


def test_a_step_of_gradient_descent_is_the_papers_step():
    """The scale by ``lr * g * dL/ds`` and LSQ+'s beta by ``lr * g * dL/dbeta``, to first order."""
    torch.manual_seed(1)
    x = torch.randn(64, 9) + 0.4
    quantizer = ActivationQuantizer(lq.QuantizationConfig("int8", bits=3, symmetric=False, learnable=True), "a")
    quantizer(x)
    learned, g, lr = quantizer.learned, 1 / math.sqrt(9 * 7), 1e-3
    scale, zero = quantizer.scale.double(), (learned.offset.double() * 7).squeeze()
    x = torch.where(
        ((x / scale + zero.round()) > 6.9) & ((x / scale + zero.round()) < 7.6), torch.tensor(0.1), x
    ).float()
    x = torch.where(
        ((x / scale + zero.round()) < 0.1) & ((x / scale + zero.round()) > -0.6), torch.tensor(0.1), x
    ).float()
    grad = torch.randn(64, 9)
    quantizer(x).backward(grad)
    low, high = 0 - zero.round(), 7 - zero.round()
    ratio = x.double() / scale
    inside = (ratio > low) & (ratio < high)
    d_scale = (grad.double() * torch.where(inside, ratio.round() - ratio, ratio.clamp(low, high))).sum()
    d_beta = (grad.double() * ~inside).sum()  # LSQ+: 1 where clipped, 0 inside
    assert not inside.all()
    torch.optim.SGD(learned.parameters(), lr).step()
    torch.testing.assert_close(quantizer.scale.double() - scale, -lr * g * d_scale, rtol=1e-3, atol=1e-7)
    moved = -(learned.offset.double() * 7).squeeze() * scale + zero * scale
    torch.testing.assert_close(moved, -lr * g * d_beta, rtol=1e-3, atol=1e-6)


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from([(7,), (3, 5), (4, 6, 2, 3), (2, 9000)]),
    st.sampled_from(["tensor", "channel", "asymmetric", "group"]),
    st.sampled_from([2, 4, 8]),
    st.booleans(),
    st.sampled_from(["plain", "strided", "channels_last", "inf", "nan"]),
    st.integers(0, 5),
)
def test_sums_of_products_are_the_kernels_sums(shape, granularity, bits, needs_x, how, seed):
    torch.manual_seed(seed)
    x, grad = torch.randn(shape), torch.randn(shape)
    if how == "strided":
        x = torch.randn(*shape, 2)[..., 0]
    elif how == "channels_last" and len(shape) == 4:
        x = x.to(memory_format=torch.channels_last)
    elif how in ("inf", "nan"):
        x.view(-1)[0] = float(how)
    symmetric = granularity != "asymmetric"
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)
    axis, group = (0, 0) if granularity == "channel" else (-1, x.numel() // shape[0] if granularity == "group" else 0)
    number = shape[0] if granularity in ("channel", "group") else 1
    scale = torch.rand(number) * 2 / high + 0.1 / high
    zero = None if symmetric else torch.full((number,), 2 ** (bits - 1), dtype=torch.int32)
    grid = (low, high, axis, group)
    with without_native():
        found = learned_gradients(grad, x, scale, zero, grid, needs_x)
    leaf, step = x.clone().requires_grad_(), scale.clone().requires_grad_()
    position = None if zero is None else zero.float().requires_grad_()
    fake_quantize_op(leaf, step, position, *grid).backward(grad)
    if needs_x:
        torch.testing.assert_close(found[0], leaf.grad, rtol=0, atol=0, equal_nan=True)
    size = grad.abs().sum().item() * high
    torch.testing.assert_close(found[1], step.grad, rtol=1e-4, atol=2e-6 * size, equal_nan=True)
    if position is not None:
        torch.testing.assert_close(found[2], position.grad, rtol=1e-4, atol=2e-6 * size)


def test_sums_of_products_are_taken_where_they_pay_and_are_precise():
    torch.manual_seed(0)
    x, grad = torch.randn(64, 4096) + 1, torch.randn(64, 4096)
    scale = torch.tensor([0.02])
    found = _by_products(grad, x, scale, None, (-127, 127, -1, 0), None)
    expected = (grad.double() * witness(x, 0.02, -127, 127, EDGE)).sum()
    # A rounding of float32 of the sum of magnitudes; 0.5 % of what rounding alone adds to the gradient, at 8 bits.
    assert abs(found[1].item() - expected.item()) < 2**-23 * (grad * x / 0.02).abs().sum().item()
    assert abs(found[1].item() - expected.item()) < 0.005 * math.sqrt(grad.numel()) * 0.29
    assert _by_products(grad, x, scale, None, (-32767, 32767, -1, 0), None) is None


# --- where it begins ------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_begin_where_the_squared_error_is_least(bits, granularity, symmetric):
    """Within a twentieth of the best of 400 factors, searched straightforwardly, and never above that of the range."""
    torch.manual_seed(bits)
    weight = torch.distributions.StudentT(4.0).sample((8, 64)) + (0 if symmetric else 0.5)
    quantizer = quantizer_of(weight, bits=bits, symmetric=symmetric, **granularity)
    scheme, fmt = get_scheme("int8"), quantizer.format
    rows = rows_of(weight, fmt)

    def error(scale, zero):
        return rows_of((scheme.fake_quantize(weight, scale, zero, fmt) - weight) ** 2, fmt).sum(1)

    low, high = rows.amin(1), rows.amax(1)
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    least = torch.full((len(rows),), math.inf)
    for i in range(1, 401):
        scale, zero = scheme.parameters(low * i / 400, high * i / 400, fmt)
        shape = quantizer.scale.shape
        least = torch.minimum(least, error(scale.reshape(shape), zero.reshape(shape)))
    found = error(*least_error_parameters(weight, scheme, fmt))
    assert found.sum() <= least.sum() * 1.05
    assert (found <= error(*scheme.parameters_of(weight, fmt))).all()
    stored = error(quantizer.scale, quantizer.zero_point)
    torch.testing.assert_close(stored, found, rtol=1e-2, atol=1e-6)  # to the precision of the parameters


def test_a_scale_begins_with_the_first_quantized_forward_and_not_before():
    torch.manual_seed(0)
    layer = lq.QATLinear(nn.Linear(8, 4), lq.QATConfig("int4", activation_bits=None, learnable_step_size=True))
    apply_phase(layer, Phase(quantizing=False))
    with torch.no_grad():
        layer(torch.randn(2, 8))
        layer.weight_quantizer.parameters_for(layer.weight)  # a monitor looks
        layer.weight.mul_(3)
    assert not layer.weight_quantizer.learned.ready
    apply_phase(layer, Phase())
    layer(torch.randn(2, 8))
    expected, _ = least_error_parameters(layer.weight, get_scheme("int4"), layer.weight_quantizer.format)
    assert layer.weight_quantizer.scale == scale_of(exponent_of(expected.reshape(1)))
    with torch.no_grad():
        layer.weight.mul_(3)
    layer(torch.randn(2, 8))
    assert layer.weight_quantizer.scale == scale_of(exponent_of(expected.reshape(1)))


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_weights_of_zeros_begin_with_a_scale_to_grow_into(granularity, symmetric):
    """In code 0 up to 0.5, as with a scale of 1, they would have no effect for long."""
    quantizer = quantizer_of(torch.zeros(8, 64), bits=4, symmetric=symmetric, **granularity)
    scale = quantizer.scale
    assert torch.equal(scale, scale.flatten()[0].expand_as(scale))
    torch.testing.assert_close(scale.flatten()[0] * 7.5, torch.tensor(1 / 8), rtol=1e-4, atol=0)
    grown = torch.full((8, 64), 0.05)
    assert (quantizer(grown) != 0).all()
    torch.testing.assert_close(quantizer(torch.zeros(8, 64)), torch.zeros(8, 64), rtol=0, atol=0)


def test_a_row_of_zeros_begins_as_the_mean_of_the_others():
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    weight[2] = 0
    fmt = quantizer_of(weight, bits=8, per_channel=True).format
    found, _ = least_error_parameters(weight, get_scheme("int8"), fmt)
    others = weight[[0, 1, 3]]
    expected, _ = least_error_parameters(others, get_scheme("int8"), fmt)
    torch.testing.assert_close(found[[0, 1, 3]], expected, rtol=0, atol=0)
    torch.testing.assert_close(found[2] * 127, others.abs().amax(1).mean())


def test_a_layer_of_zeros_trains():
    torch.manual_seed(0)
    layer = lq.QATLinear(nn.Linear(16, 4), lq.QATConfig("int4", per_channel=True, activation_bits=None,
                                                        learnable_step_size=True))  # fmt: skip
    nn.init.zeros_(layer.weight)
    x, target = torch.randn(64, 16), torch.randn(4, 16) * 0.25
    optimizer = torch.optim.Adam(layer.parameters(), 0.005)
    for _ in range(100):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(layer(x), x @ target.t())
        loss.backward()
        optimizer.step()
    assert loss < 0.05 * (x @ target.t()).square().mean()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("pact", [None, 0.0])
def test_inputs_of_zeros_begin_with_a_range_to_grow_into(symmetric, pact):
    config = lq.QuantizationConfig("int8", bits=4, symmetric=symmetric, learnable=True, pact_decay=pact)
    quantizer = ActivationQuantizer(config, "after_zeros")
    zeros = torch.zeros(2, 8)
    assert torch.equal(quantizer(zeros), zeros)
    levels = 15
    torch.testing.assert_close(quantizer.scale, torch.tensor(2 / levels), rtol=1e-6, atol=0)
    grown = torch.tensor([[-1.0, -0.2, 0.1, 0.9]])
    assert (quantizer(grown) - grown).abs().max() <= 1.001 / levels
    quantizer.set_bits(8)
    assert quantizer.scale == pytest.approx(2 / (254 if symmetric else 255), rel=1e-5)


@pytest.mark.parametrize("offset", [-0.1, 0.0, 0.3, 1.0, 1.2])
@pytest.mark.parametrize("grad", [-3.7e4, -1e-9, 0.0, 2.5, 3e38, math.inf])
@pytest.mark.parametrize("scale", [1e-30, 0.01, 0.75, 1.0, 40.0])
def test_one_number_has_the_gradients_that_it_has_among_several(offset, grad, scale):
    """One is computed by Python's numbers on a CPU, several by tensor operations."""
    alone = [torch.tensor([value]) for value in (grad, offset, scale)]
    among = [torch.tensor([value, 0.5]) for value in (grad, offset, scale)]
    for factor in (0.02, 1.0):
        found = exponent_gradient(alone[0], alone[2], factor)
        torch.testing.assert_close(found, exponent_gradient(among[0], among[2], factor)[:1], rtol=1e-6, atol=0)
        if scale > 1e-18:  # its square is a float32
            found = offset_gradient(*alone, factor, 255)
            torch.testing.assert_close(found, offset_gradient(*among, factor, 255)[:1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("exponent", [-126.0, -125.3, -20.7, -1.0, -1e-7, 0.0, 0.5, 126.9, 127.0])
def test_one_exponent_has_the_bits_that_it_has_among_several(exponent):
    several = scale_of(torch.tensor([exponent, 0.0]))
    assert torch.equal(scale_of(torch.tensor([exponent])).view(torch.int32), several[:1].view(torch.int32))


def test_every_batch_of_a_calibration_is_observed_in_float():
    """From the first batch on the quantizer has a range, which the next ones may widen."""
    model = lq.prepare(nn.Sequential(nn.Linear(4, 3)), w4a4())
    batches = [torch.linspace(-1.0, 1.0, 32).view(8, 4), torch.linspace(-3.0, 5.0, 32).view(8, 4)]
    seen = []
    model[0].register_forward_hook(lambda layer, inputs, output: seen.append(output))
    lq.calibrate(model, batches)
    observer = model[0].input_quantizer.observer
    assert (observer.min_val.item(), observer.max_val.item()) == (-3.0, 5.0)
    for batch, output in zip(batches, seen, strict=True):
        assert torch.equal(output, nn.functional.linear(batch, model[0].weight, model[0].bias))


def test_bits_that_are_refused_move_no_learned_scale():
    model = lq.prepare(nn.Sequential(nn.Linear(4, 3)), w4a4())
    lq.calibrate(model, [torch.randn(8, 4)])
    quantizer = model[0].input_quantizer
    before = quantizer.scale
    with pytest.raises(ValueError, match="bits=40"):
        quantizer.set_bits(40)
    assert torch.equal(quantizer.scale, before)
    assert not quantizer.learned.renewed

"""Layers with learned scales: conversion, freezing, state, compiling, errors."""

import copy
import io

import pytest
import torch
from torch import nn

import lightning_qat as lq
from lightning_qat.quantizers.learned_scale import LearnedScale, check_scales
from lightning_qat.transforms.phase import Phase, apply_phase


def w4a4(**kwargs):
    return lq.QATConfig("int4", activation_bits=4, learnable_step_size=True, **kwargs)


def model_of():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 12), nn.GELU(), nn.Linear(12, 4)
    )


def train(model, x, steps=5, lr=0.01):
    optimizer = torch.optim.Adam(model.parameters(), lr)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("granularity", [{}, {"per_channel": True}, {"group_size": 4}])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_conversion_has_the_codes_and_scales_that_trained(granularity, bits):
    config = lq.QATConfig("int8", bits=bits, activation_bits=bits, learnable_step_size=True, **granularity)
    model, x = lq.prepare(model_of(), config), torch.randn(3, 4, 6, 6)
    train(model, x)
    converted = lq.convert(model.eval(), verify=[x])
    for name in ("0", "3", "5"):
        before, after = model.get_submodule(name), converted.get_submodule(name)
        assert torch.equal(before.weight_quantizer.scale, after.weight_scale)
        assert torch.equal(before.weight_codes(), after.codes)
        assert torch.equal(before.input_quantizer.scale, after.input_scale)
        assert torch.equal(before.input_quantizer.zero_point, after.input_zero_point)


@pytest.mark.parametrize("config", [w4a4(), w4a4(per_channel=True), w4a4(activation_symmetric=True)])
def test_every_parameter_moves_and_stands_still_when_frozen(config):
    model, x = lq.prepare(model_of(), config), torch.randn(3, 4, 6, 6)
    train(model, x, 1)
    before = {k: v.detach().clone() for k, v in model.named_parameters() if ".learned." in k}
    train(model, x, 3)
    assert all((before[k] != v).any() for k, v in model.named_parameters() if k.endswith("exponent"))
    apply_phase(model, Phase(frozen=True, observing=False))
    frozen = {k: v.detach().clone() for k, v in model.named_parameters() if ".learned." in k}
    train(model, x, 3)
    for key, value in model.named_parameters():
        if ".learned." in key:
            assert torch.equal(value, frozen[key])
            assert value.grad is None


@pytest.mark.parametrize("granularity", [{}, {"per_channel": True}])
def test_embeddings_learn(granularity):
    torch.manual_seed(0)
    config = lq.QATConfig("int4", activation_bits=None, learnable_step_size=True, **granularity)
    layer = lq.QATEmbedding(nn.Embedding(6, 8), config)
    index = torch.tensor([[1, 1, 4]])
    layer(index).square().sum().backward()
    grad = layer.weight_quantizer.learned.exponent.grad
    assert grad.abs().sum() > 0
    if granularity:
        assert (grad[[0, 2, 3, 5]] == 0).all()
    rows = lq.convert(nn.Sequential(layer).eval())[0](index)
    assert torch.equal(rows, layer.eval()(index))


def test_recomputed_values_change_nothing():
    """A layer called twice, a convolution in channels_last, and one whose input takes no gradient."""
    torch.manual_seed(0)
    for x in (torch.randn(2, 4, 6, 6), torch.randn(2, 4, 6, 6).to(memory_format=torch.channels_last)):
        model = lq.prepare(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1)), w4a4(per_channel=True))
        other = copy.deepcopy(model)
        y = model(model(x))
        y.square().sum().backward()
        quantizers = (other[0].input_quantizer, other[0].weight_quantizer)
        now = x
        for _ in range(2):
            now = nn.functional.conv2d(quantizers[0](now), quantizers[1](other[0].weight), other[0].bias, padding=1)
        now.square().sum().backward()
        torch.testing.assert_close(y, now)
        for (key, mine), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-3, msg=key)


def test_state_copies_casts_and_loads():
    model, x = lq.prepare(model_of(), w4a4(per_channel=True)), torch.randn(3, 4, 6, 6)
    train(model, x, 2)
    fresh = lq.prepare(model_of(), w4a4(per_channel=True))
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh.eval()(x), model.eval()(x))
    file = io.BytesIO()
    torch.save(copy.deepcopy(model), file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), model(x))
    fresh.load_state_dict(model_of().state_dict(), strict=False)
    scale = model[3].weight_quantizer.scale
    half = model.to(torch.bfloat16)
    assert half[3].weight.dtype == torch.bfloat16
    assert torch.equal(half[3].weight_quantizer.scale, scale)
    half.train()(x.bfloat16()).float().sum().backward()
    assert half[3].weight_quantizer.learned.exponent.grad.dtype == torch.float32


def test_float_checkpoints_load():
    model = lq.prepare(model_of(), w4a4())
    model.load_state_dict(model_of().state_dict())


def test_bits_change_and_scales_begin_again():
    model, x = lq.prepare(model_of(), w4a4(per_channel=True)), torch.randn(3, 4, 6, 6)
    train(model, x, 2)
    coarse = model[3].weight_quantizer.scale
    lq.set_bits(model, 8)
    fine = model[3].weight_quantizer.scale
    assert (fine < coarse / 8).all()
    before = model[3].input_quantizer.scale
    lq.set_bits(model, 8, activations=True)
    assert model[3].input_quantizer.scale < before / 4
    assert model[3].input_quantizer.zero_point >= 0
    train(model, x, 2)
    lq.convert(model.eval(), verify=[x])


def test_compiled_training_computes_with_the_same_scales():
    torch.compiler.reset()  # which counts how often one forward was compiled
    model, x = lq.prepare(model_of(), w4a4(per_channel=True)), torch.randn(3, 4, 6, 6)
    train(model, x, 1)
    model.zero_grad()
    other = copy.deepcopy(model)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    model(x).square().mean().backward()
    compiled(x).square().mean().backward()
    for (key, mine), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-5, msg=key)


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["nf4", "fp4", "dynamic_tree", "llm_int8", "dynamic"])
def test_only_integers_have_scales_to_learn(scheme):
    with pytest.raises(ValueError, match="learnable=True is not allowed"):
        lq.QuantizationConfig(scheme, learnable=True)


@pytest.mark.parametrize(
    ("value", "what"),
    [(float("nan"), "scale is NaN"), (-200.0, "scale would be zero"), (200.0, "scale would be infinite")],
)
def test_a_scale_that_broke_is_named(value, what):
    model, x = lq.prepare(model_of(), w4a4(per_channel=True)), torch.randn(3, 4, 6, 6)
    train(model, x, 1)
    with torch.no_grad():
        model[3].weight_quantizer.learned.exponent[2] = value
    for use in (lambda: model(x), lambda: lq.convert(copy.deepcopy(model).eval())):
        with pytest.raises(ValueError, match=f"{what} for the weight of layer '3'"):
            use()
    with torch.no_grad():
        model[3].weight_quantizer.learned.exponent[2] = -3.0
        model[5].input_quantizer.learned.offset.fill_(float("nan"))
    with pytest.raises(ValueError, match="zero point is NaN or inf for the input of layer '5'"):
        check_scales([m for m in model.modules() if isinstance(m, LearnedScale)])
    with pytest.raises(ValueError, match="zero point is NaN or inf for the input of layer '5'"):
        model(x)


@pytest.mark.parametrize("name", ["input_quantizer", "weight_quantizer"])
def test_a_model_with_a_scale_that_broke_is_moved_copied_and_loaded(name):
    """What goes on from a checkpoint before it broke does no more than that."""
    model = lq.prepare(model_of(), w4a4(per_channel=True))
    train(model, torch.randn(3, 4, 6, 6), 1)
    order = torch.randperm(model[5].weight.shape[1])
    model[5].weight_quantizer.arrange_input(order, None)
    before = copy.deepcopy(model.state_dict())
    learned = getattr(model[5], name).learned
    with torch.no_grad():
        learned.exponent.fill_(float("nan"))
    copy.deepcopy(model).double().to("cpu")
    model.load_state_dict(before)
    assert learned.scale().isfinite().all()
    assert torch.equal(model[5].weight_quantizer.input_order, order)

"""AWQ of single tensors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from tensors import randn
from torch import Tensor

import lightning_qat as lq
from lightning_qat import AWQOptions, AWQQuantizer, QuantizationConfig, QuantizedTensor


def output_error(weight: Tensor, values: Tensor, magnitude: Tensor) -> float:
    """Run both on inputs of these magnitudes, uncorrelated."""
    x = randn(2000, magnitude.numel(), seed=99) * magnitude
    return float((x @ (weight - values.to(weight.dtype)).reshape(len(weight), -1).float().t()).square().sum())


@pytest.mark.parametrize(
    "config",
    [
        QuantizationConfig("awq", group_size=16),
        QuantizationConfig("awq", group_size=16, symmetric=False),
        QuantizationConfig("awq", bits=3, per_channel=True),
        QuantizationConfig("int4"),
        QuantizationConfig("nf4", group_size=16),
    ],
    ids=str,
)
@pytest.mark.parametrize("clip", [False, True])
def test_the_weight_itself_comes_back_better_than_rounded(config: QuantizationConfig, clip: bool) -> None:
    weight, magnitude = randn(40, 64), 0.1 + randn(64, seed=1).exp() ** 2
    quantizer = AWQQuantizer(config, AWQOptions(clip=clip))
    quantized = quantizer.set_activation_scales(magnitude).quantize(weight)
    plain = lq.quantize(weight, config)
    assert output_error(weight, quantized.dequantize(), magnitude) < 0.9 * output_error(
        weight, plain.dequantize(), magnitude
    )
    assert quantizer.last.loss < quantizer.last.plain_loss
    error = (weight - quantized.dequantize()).square() * magnitude.square()
    assert quantizer.last.loss == pytest.approx(float(error.sum()), rel=1e-3)
    assert quantized.format.bits == config.bits
    assert quantized.input_scale.shape == (64,)


@given(
    shape=st.sampled_from(((1, 16), (5, 48), (3, 4, 3, 3), (2, 8, 5))),
    dtype=st.sampled_from((torch.float32, torch.float16, torch.bfloat16)),
    seed=st.integers(0, 100),
)
@example(shape=(3, 4, 3, 3), dtype=torch.float32, seed=23)  # where pow differs from lane to lane
@settings(max_examples=20, deadline=None)
def test_values_are_codes_times_scale_over_the_input_scale(
    shape: tuple[int, ...], dtype: torch.dtype, seed: int
) -> None:
    weight = randn(*shape, seed=seed).to(dtype)
    magnitude = randn(shape[1], seed=seed + 1).abs()
    magnitude[0] = 0.0
    config = QuantizationConfig("awq", per_channel=True, symmetric=bool(seed % 2))
    held = AWQQuantizer(config).set_activation_scales(magnitude).quantize(weight)
    zero = 0 if held.zero_point is None else held.zero_point.view(-1, *[1] * (len(shape) - 1))
    expected = (held.codes.float() - zero) * held.scale.view(-1, *[1] * (len(shape) - 1))
    expected = expected / held.input_scale.view(1, *shape[1:])
    assert torch.equal(held.dequantize(), expected.to(dtype))
    if len(shape) > 2:  # one scale for each channel, whatever the place in the kernel
        by_channel = held.input_scale.view(shape[1], -1)
        assert torch.equal(by_channel, by_channel[:, :1].expand_as(by_channel))


def test_it_is_saved_with_its_input_scale() -> None:
    held = AWQQuantizer(QuantizationConfig("awq", group_size=8)).set_activation_scales(randn(16).abs())
    held = held.quantize(randn(4, 16, seed=1))
    again = QuantizedTensor.from_state_dict(load(save(held.state_dict())))
    assert torch.equal(again.input_scale, held.input_scale)
    assert torch.equal(again.dequantize(), held.dequantize())
    assert torch.equal(held.to(torch.float64).dequantize(), held.dequantize(torch.float64))
    assert held.to("meta").input_scale.is_meta
    assert "input scale" in repr(held)
    assert held.nbytes == 4 * 16 // 2 + 4 * 2 * 4 + 16 * 4
    with pytest.raises(ValueError, match="no tensor with its scales"):
        QuantizedTensor.from_state_dict({**held.state_dict(), "input_scale": torch.ones(15)})


def test_bitsandbytes_has_no_place_for_it() -> None:
    held = AWQQuantizer("nf4").set_activation_scales(randn(64).abs()).quantize(randn(2, 64))
    with pytest.raises(ValueError, match="input_scale"):
        lq.to_bitsandbytes_format(held, lq.BitsAndBytesConfig(bits=4, block_size=64))


def test_magnitudes_have_to_be_told() -> None:
    with pytest.raises(RuntimeError, match=r"call set_activation_scales\(x.abs\(\).mean\(0\)\) first"):
        AWQQuantizer().quantize(randn(4, 16))


@pytest.mark.parametrize(
    ("scales", "error", "message"),
    [
        ([1.0], TypeError, "floating-point torch.Tensor"),
        (torch.ones(2, 2), ValueError, r"scales have shape \(2, 2\)"),
        (torch.tensor([1.0, -1.0]), ValueError, "negative"),
        (torch.tensor([1.0, float("nan")]), ValueError, "nan|NaN"),
    ],
)
def test_scales_are_checked(scales: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        AWQQuantizer().set_activation_scales(scales)


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        (torch.ones(4, 15), ValueError, r"got 16 scales and weight has shape \(4, 15\); give 15 of them"),
        (torch.ones(4, 15, 3), ValueError, "give 15 or 45 of them"),
        (torch.ones(16), ValueError, r"shape \(16,\)"),
        (torch.ones(4, 16, dtype=torch.int8), TypeError, "int8"),
        (torch.full((4, 16), float("inf")), ValueError, "inf"),
    ],
)
def test_weights_are_checked(weight: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        AWQQuantizer().set_activation_scales(torch.ones(16)).quantize(weight)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((4,), TypeError, "config=4"),
        (("awq", 4), TypeError, "options=4"),
        (("dynamic",), ValueError, "describes activations"),
        (("llm_int8",), ValueError, "llm_int8"),
        ((QuantizationConfig("awq", observer="mse"),), ValueError, "observer='mse'"),
        ((QuantizationConfig("int8", bits=12),), ValueError, "bits=12"),
    ],
)
def test_the_config_is_checked(arguments: tuple[object, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        AWQQuantizer(*arguments)

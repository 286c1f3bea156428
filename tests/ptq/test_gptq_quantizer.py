"""GPTQ of single tensors, and the schemes whose codes an algorithm chooses."""

from __future__ import annotations

import math

import pytest
import torch
from ptq.published_gptq import published
from ptq.test_gptq import layer
from tensors import randn
from torch import Tensor, nn

import lightning_qat as lq
from lightning_qat import GPTQOptions, GPTQQuantizer, QuantizationConfig, QuantizedTensor, quantize
from lightning_qat.ptq.chosen import output_error
from lightning_qat.schemes import weight_format


def test_a_linear_weight_loses_less_and_is_read_again() -> None:
    weight, gram = layer()
    quantizer = GPTQQuantizer(QuantizationConfig("gptq", group_size=64))
    held = quantizer.quantize(weight, gram)
    plain = quantize(weight, QuantizationConfig("gptq", group_size=64))
    assert (held.format, held.shape, held.dtype) == (plain.format, plain.shape, plain.dtype)
    assert held.nbytes == plain.nbytes
    assert output_error(weight, held.dequantize(), gram) < 0.5 * output_error(weight, plain.dequantize(), gram)
    assert quantizer.last.loss == pytest.approx(output_error(weight, held.dequantize(), gram), rel=1e-5)
    read = QuantizedTensor.from_state_dict(held.state_dict())
    assert torch.equal(read.dequantize(), held.dequantize())


@pytest.mark.parametrize("scheme", ["gptq", "awq", "int8", "int4", "nf4", "fp4", "dynamic_tree"])
def test_every_scheme_by_its_name(scheme: str) -> None:
    weight, gram = layer(16, 64)
    held = GPTQQuantizer(scheme).quantize(weight, gram)
    assert held.format.scheme == scheme
    assert held.format == quantize(weight, scheme).format
    assert output_error(weight, held.dequantize(), gram) < output_error(
        weight, quantize(weight, scheme).dequantize(), gram
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_convolutions_of_other_dtypes(dtype: torch.dtype) -> None:
    weight = randn(12, 4, 3, 3).to(dtype)
    inputs = randn(300, 36, seed=1) @ (randn(36, 36, seed=2) / 6 + 0.5 * torch.eye(36))
    gram = inputs.t() @ inputs
    for config in (
        QuantizationConfig("gptq", per_channel=True),
        QuantizationConfig("gptq", group_size=9, symmetric=False),
        QuantizationConfig("nf4"),
    ):
        held = GPTQQuantizer(config).quantize(weight, gram)
        assert held.dequantize().shape == weight.shape
        assert held.dequantize().dtype == dtype
        flat = weight.float().flatten(1)
        loss = output_error(flat, held.dequantize(torch.float32).flatten(1), gram)
        assert loss < output_error(flat, quantize(weight, config).dequantize(torch.float32).flatten(1), gram)


def test_without_a_hessian_every_code_is_the_nearest() -> None:
    weight, _ = layer(16, 64)
    for config in (QuantizationConfig("gptq", group_size=32), QuantizationConfig("nf4")):
        published = GPTQQuantizer(config, GPTQOptions.published()).quantize(weight)
        assert torch.equal(published.codes, quantize(weight, config).codes)
        held = GPTQQuantizer(config).quantize(weight)
        assert ((held.dequantize() - weight) ** 2).sum() < ((published.dequantize() - weight) ** 2).sum()


def test_any_multiple_of_the_gram_matrix_will_do() -> None:
    weight, gram = layer(16, 64)
    one, other = (GPTQQuantizer("gptq").quantize(weight, gram * factor) for factor in (1.0, 2.0**-20))
    assert torch.equal(one.packed, other.packed)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [3, 4])
def test_groups_of_columns_in_activation_order(symmetric: bool, bits: int) -> None:
    weight, gram = layer(48, 256)
    expected, values = published(
        weight, gram, bits=bits, symmetric=symmetric, group_size=64, activation_order=True, static_groups=False
    )
    config = QuantizationConfig("gptq", bits=bits, symmetric=symmetric, group_size=64)
    quantizer = GPTQQuantizer(config, GPTQOptions.published(static_groups=False))
    held = quantizer.quantize(weight, gram)
    codes = held.codes.float() + (2 ** (bits - 1) if symmetric else 0)
    assert (codes == expected).float().mean() >= 0.999
    assert output_error(weight, held.dequantize(), gram) <= 1.001 * output_error(weight, values, gram)
    assert torch.equal(held.order, torch.argsort(gram.diagonal(), descending=True))
    assert torch.equal(held.group_of_columns[held.order], torch.arange(256) // 64)
    zero = 0 if held.zero_point is None else held.zero_point[:, held.group_of_columns]
    torch.testing.assert_close((held.codes - zero) * held.scale[:, held.group_of_columns], held.dequantize())
    read = QuantizedTensor.from_state_dict(held.state_dict())
    assert torch.equal(read.dequantize(), held.dequantize())
    assert torch.equal(held.to(torch.bfloat16).dequantize(), held.dequantize().bfloat16())
    assert "columns in an order of their own" in repr(held)
    wrong = {**held.state_dict(), "order": held.order.clamp(max=5)}
    with pytest.raises(ValueError, match="is no tensor with its scales"):
        QuantizedTensor.from_state_dict(wrong)
    assert quantizer.last.loss < 0.7 * quantizer.last.nearest_loss
    better = GPTQQuantizer(config, GPTQOptions(static_groups=False))
    better.quantize(weight, gram)
    assert better.last.loss < quantizer.last.loss


def test_an_order_of_convolutions_codebooks_and_rows() -> None:
    weight, gram = layer(8, 128)
    options = GPTQOptions(static_groups=False)
    flat = GPTQQuantizer(QuantizationConfig("gptq", group_size=32), options).quantize(weight, gram)
    held = GPTQQuantizer(QuantizationConfig("gptq", group_size=32), options).quantize(weight.view(8, 2, 8, 8), gram)
    assert torch.equal(held.dequantize(), flat.dequantize().view(8, 2, 8, 8))
    assert torch.equal(held.codes, flat.codes.view(8, 2, 8, 8))
    nf4 = GPTQQuantizer("nf4", options).quantize(weight, gram)
    assert nf4.order is not None
    assert output_error(weight, nf4.dequantize(), gram) < output_error(
        weight, quantize(weight, "nf4").dequantize(), gram
    )
    for config in (QuantizationConfig("gptq", per_channel=True), QuantizationConfig("gptq", group_size=128)):
        assert GPTQQuantizer(config, options).quantize(weight, gram).order is None
    assert quantize(weight, QuantizationConfig("int8")).group_of_columns is None


def test_an_observer_of_the_config_gives_the_scales() -> None:
    weight, gram = layer(16, 64)
    for symmetric in (True, False):
        config = QuantizationConfig("gptq", group_size=32, symmetric=symmetric, observer="mse")
        held, plain = GPTQQuantizer(config).quantize(weight, gram), quantize(weight, config)
        assert torch.equal(held.scale, plain.scale)
        assert symmetric or torch.equal(held.zero_point, plain.zero_point)
        assert not torch.equal(held.codes, plain.codes)


@pytest.mark.parametrize("scheme", ["gptq", "awq"])
@pytest.mark.parametrize("options", [{"group_size": 9}, {"per_channel": True, "bits": 3, "symmetric": False}, {}])
def test_models_train_convert_save_and_load_with_them(tmp_path, scheme: str, options: dict) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(36, 5))
    images = torch.randn(3, 2, 5, 5)
    lq.prepare(model, QuantizationConfig(scheme, **options))
    model(images).sum().backward()
    converted = lq.convert(model.eval(), verify=[images])
    lq.save_quantized(converted, tmp_path / "model")
    fresh = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(36, 5))
    assert torch.equal(lq.load_quantized(tmp_path / "model", fresh)(images), converted(images))
    assert scheme in (tmp_path / "model" / "manifest.json").read_text()


def test_bits_of_the_schemes() -> None:
    assert QuantizationConfig("gptq").bits == QuantizationConfig("awq").bits == 4
    for bits in (1, 9):
        with pytest.raises(ValueError, match=f"bits={bits} is not allowed with scheme='gptq'; it takes 2 to 8"):
            QuantizationConfig("gptq", bits=bits)
    assert weight_format(QuantizationConfig("gptq"), torch.Size((4, 8))).bits == 4


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("llm_int8", "'llm_int8' is no grid that GPTQ chooses codes for"),
        ("dynamic", "scheme='dynamic' describes activations"),
        (QuantizationConfig("int8", bits=16), "bits=16 is not allowed with GPTQ"),
        (
            QuantizationConfig("nf4", bnb=lq.BitsAndBytesConfig(bits=4, block_size=64, stochastic=True)),
            "stochastic=True is not allowed",
        ),
        ("gptk", "scheme='gptk' is not known; use one of: 'gptq'"),
    ],
)
def test_configs_without_a_grid(config: QuantizationConfig | str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPTQQuantizer(config)


@pytest.mark.parametrize(
    ("weight", "hessian", "error", "message"),
    [
        (torch.ones(3), None, ValueError, r"weight has shape \(3,\); use \[out_features"),
        (torch.ones(0, 3), None, ValueError, r"weight has shape \(0, 3\)"),
        (torch.ones(2, 3, dtype=torch.int8), None, TypeError, "weight is torch.int8; use a floating-point"),
        ([1.0], None, TypeError, "weight is list"),
        (torch.ones(2, 3), torch.eye(4), ValueError, r"gram has shape \(4, 4\); a weight of 3 input features"),
        (torch.full((2, 3), math.inf), None, ValueError, "holds inf at index"),
    ],
)
def test_wrong_tensors(weight: Tensor, hessian: Tensor | None, error: type[Exception], message: str) -> None:
    for options in (GPTQOptions(), GPTQOptions(static_groups=False)):
        with pytest.raises(error, match=message):
            GPTQQuantizer(QuantizationConfig("gptq", group_size=1), options).quantize(weight, hessian)


def test_wrong_types() -> None:
    with pytest.raises(TypeError, match="config=4 is not allowed"):
        GPTQQuantizer(4)
    with pytest.raises(TypeError, match="options=0.01 is not allowed; use GPTQOptions"):
        GPTQQuantizer("gptq", 0.01)

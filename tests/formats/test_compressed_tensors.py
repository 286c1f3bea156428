"""compressed-tensors files: its own compressor writes the same bytes, and transformers computes the same logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from llamas import assert_same_layers, difference, layers_of, llama, logits, pretrained, quantized_llama
from safetensors.torch import load_file, save_file
from torch import nn

import lightning_qat as lq

STATIC = lq.QuantizationConfig("int8", symmetric=False)
CHANNELS = lq.QuantizationConfig("int8", per_channel=True)
#: Weight, input, and the largest relative difference of the logits.
CASES: dict[str, tuple[Any, Any, float]] = {
    "4 bits, groups": (lq.QuantizationConfig("int4", group_size=32), None, 0.0),
    "4 bits, groups, asymmetric": (lq.QuantizationConfig("awq", group_size=16, symmetric=False), None, 0.0),
    "4 bits, channels": (lq.QuantizationConfig("int4", per_channel=True), None, 0.0),
    "4 bits, channels, asymmetric": (lq.QuantizationConfig("int4", per_channel=True, symmetric=False), None, 0.0),
    "8 bits, tensor": (lq.QuantizationConfig("int8"), None, 0.0),
    "3 bits, groups": (lq.QuantizationConfig("gptq", bits=3, group_size=32), None, 0.0),
    "8 bits, static inputs": (CHANNELS, STATIC, 1e-6),
    # Their dynamic scales are absmax / 127.5: both differ from float as much as from each other.
    "8 bits, dynamic inputs": (CHANNELS, lq.QuantizationConfig("dynamic"), 0.1),
    "4 bits, static inputs": (lq.QuantizationConfig("int4", group_size=32, symmetric=False), STATIC, 1e-6),
}


@pytest.fixture(scope="module", autouse=True)
def package() -> Any:
    return pytest.importorskip("compressed_tensors")


def their_tensors(linear: nn.Linear, held: lq.QuantizedTensor, *, packed: bool, bits: int) -> dict[str, torch.Tensor]:
    """Return what compressed-tensors' own compressor makes of a Linear on our grid."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    grouped = held.format.group_size is not None
    args = QuantizationArgs(
        num_bits=bits,
        type="int",
        symmetric=held.format.symmetric,
        strategy="group" if grouped else "channel",
        group_size=held.format.group_size,
    )
    scale = held.scale if grouped else held.scale.unsqueeze(1)
    zero = torch.zeros_like(scale, dtype=torch.int8)
    if held.zero_point is not None and not held.format.symmetric:
        zero = (held.zero_point - 2 ** (bits - 1)).to(torch.int8).reshape(scale.shape)
    state = {"weight": linear.weight.detach(), "weight_scale": scale, "weight_zero_point": zero}
    compressor = BaseCompressor.get_value_from_registry("pack-quantized" if packed else "int-quantized")
    found: dict[str, torch.Tensor] = compressor.compress(state, QuantizationScheme(targets=["Linear"], weights=args))
    return found


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [16, None])
@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("packed", [True, False])
def test_its_own_compressor_writes_the_same_bytes(tmp_path: Path, symmetric, group, bits: int, packed: bool) -> None:
    torch.manual_seed(bits)
    linear = nn.Linear(48, 20, bias=False)  # 20 outputs and 48 inputs of 3 bits do not fill words
    config = lq.QuantizationConfig("int8", bits=bits, symmetric=symmetric, group_size=group, per_channel=group is None)
    model = nn.Sequential(linear)
    lq.prepare(model, lq.QuantizationPlan([lq.LayerRule("0", config, None if packed else STATIC)]))
    if not packed:
        lq.calibrate(model, [torch.randn(8, 48)])
    lq.export(lq.convert(model), tmp_path / "file", "compressed_tensors")
    ours = load_file(tmp_path / "file" / "model.safetensors")
    theirs = their_tensors(linear, lq.quantize(linear.weight.detach(), config), packed=packed, bits=bits)
    assert {name.removeprefix("0.") for name in ours if ".input_" not in name} == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[f"0.{name}"].dtype == tensor.dtype, name
        assert torch.equal(ours[f"0.{name}"], tensor), name


@pytest.mark.parametrize("title", CASES)
def test_transformers_computes_as_we_do(tmp_path: Path, title: str) -> None:
    weight, activation, tolerance = CASES[title]
    model = quantized_llama(weight, activation, tie="groups" in title)
    lq.export(model, tmp_path / "file", "compressed_tensors")
    theirs = logits(pretrained(tmp_path / "file"))
    assert difference(theirs, logits(model)) <= tolerance
    read = lq.import_quantized(tmp_path / "file", llama(seed=5, tie="groups" in title))
    if title != "8 bits, tensor":  # which becomes one scale for each channel
        assert_same_layers(read, model)
    assert torch.equal(logits(read), logits(model))


def test_layers_may_differ(tmp_path: Path) -> None:
    first, second = CASES["4 bits, groups"][0], CHANNELS
    rules = (lq.LayerRule("*.mlp.*", second), lq.LayerRule("model.layers.1.self_attn.q_proj"))
    model = quantized_llama(first, None, *rules)
    lq.export(model, tmp_path / "file", "compressed_tensors")
    theirs = pretrained(tmp_path / "file")
    assert torch.equal(logits(theirs), logits(model))
    assert_same_layers(lq.import_quantized(tmp_path / "file", llama(seed=5)), model)


def test_half_precision_rounds_scales_once(tmp_path: Path) -> None:
    model = llama().to(torch.bfloat16)
    lq.prepare(model, lq.QuantizationPlan([lq.LayerRule("model.layers.*", CASES["4 bits, groups"][0])]))
    model = lq.convert(model)
    lq.export(model, tmp_path / "file", "compressed_tensors")
    read = lq.import_quantized(tmp_path / "file", llama(seed=5).to(torch.bfloat16))
    assert_same_layers(read, model, scale_dtype=torch.bfloat16)
    theirs = pretrained(tmp_path / "file")
    assert theirs.dtype == torch.bfloat16
    assert difference(logits(theirs), logits(read)) < 3e-2  # of products in another order
    for name, layer in layers_of(read).items():
        assert torch.equal(theirs.get_submodule(name).weight, layer.weight), name


def test_what_its_own_compressor_wrote_is_read(tmp_path: Path) -> None:
    config = CASES["4 bits, groups, asymmetric"][0]
    lq.export(quantized_llama(config), tmp_path / "file", "compressed_tensors")
    tensors, expected = load_file(tmp_path / "file" / "model.safetensors"), {}
    for name, linear in llama(seed=3).named_modules():
        if isinstance(linear, nn.Linear) and name != "lm_head":
            held = lq.quantize(linear.weight.detach(), config)
            expected[name] = held
            own = their_tensors(linear, held, packed=True, bits=4)
            tensors |= {f"{name}.{end}": tensor.contiguous() for end, tensor in own.items()}
    save_file(tensors, tmp_path / "file" / "model.safetensors")
    read = layers_of(lq.import_quantized(tmp_path / "file", llama(seed=5)))
    assert read.keys() == expected.keys()
    for name, held in expected.items():
        assert torch.equal(read[name].codes, held.codes)
        assert torch.equal(read[name].scale, held.scale)
        assert torch.equal(read[name].weight_zero_point, held.zero_point)


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    lq.export(quantized_llama(CASES["4 bits, groups"][0]), tmp_path / "file", "compressed_tensors")
    file = tmp_path / "file" / "config.json"
    facts = json.loads(file.read_text())
    facts["quantization_config"]["config_groups"]["group_0"]["weights"]["type"] = "float"
    file.write_text(json.dumps(facts))
    with pytest.raises(lq.QuantizedFileError, match="layer 'model.layers.0.mlp.down_proj' has type='float'"):
        lq.import_quantized(tmp_path / "file", llama(seed=5))


def test_codebooks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is in nf4, which compressed_tensors has no codes for"):
        lq.export(quantized_llama(lq.QuantizationConfig("nf4", group_size=64)), tmp_path / "file", "compressed_tensors")
    assert not any(tmp_path.iterdir())

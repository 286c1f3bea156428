"""GPTQ files: gptqmodel packs the same bytes, and transformers computes with the same weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from llamas import (
    IDS,
    assert_same_layers,
    difference,
    layers_of,
    llama,
    logits,
    pretrained,
    quantized_bert,
    quantized_llama,
)
from safetensors.torch import load_file, save_file
from torch import nn

import lightning_qat as lq
from lightning_qat.ops.word_packing import pack_words

CONFIGS = {
    "4 bits, groups": lq.QuantizationConfig("int4", group_size=32),
    "4 bits, channels": lq.QuantizationConfig("int4", per_channel=True),
    "8 bits, channels": lq.QuantizationConfig("int8", per_channel=True),
    "3 bits, groups": lq.QuantizationConfig("gptq", bits=3, group_size=32),
    "4 bits, asymmetric": lq.QuantizationConfig("gptq", group_size=64, symmetric=False),
    "2 bits, asymmetric, version 2": lq.QuantizationConfig("int8", bits=2, group_size=16, symmetric=False),
}


def format_of(title: str) -> str:
    return "gptq_v2" if "version 2" in title else "gptq"


@pytest.fixture(scope="module")
def gptqmodel() -> Any:
    pytest.importorskip("optimum")
    return pytest.importorskip("gptqmodel")


@pytest.fixture
def eager() -> Any:
    """gptqmodel compiles what it dequantizes with; that takes minutes."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def their_layer(bits: int, group: int, columns: int, rows: int) -> Any:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    facts = dict(bits=bits, group_size=group, sym=False, desc_act=False, in_features=columns, out_features=rows)
    return TorchLinear(**facts, bias=False)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_witness_is_right_and_packs_as_we_do(gptqmodel, eager, bits: int) -> None:
    rows, columns, group = 96, 64, 32
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator)
    scale = torch.rand(rows, columns // group, generator=generator).mul(0.1).add(0.01).half()
    zero = torch.randint(1, 2**bits, scale.shape, generator=generator)
    values = (codes - zero.repeat_interleave(group, 1)) * scale.float().repeat_interleave(group, 1)

    linear = nn.Linear(columns, rows, bias=False)
    linear.weight = nn.Parameter(values)
    theirs = their_layer(bits, group, columns, rows)
    theirs.pack_original(linear, scale.float(), zero.float(), (torch.arange(columns) // group).int())
    assert torch.equal(theirs.qweight, pack_words(codes, bits).t())
    assert torch.equal(theirs.qzeros, pack_words(zero.t(), bits))  # in memory; minus one is for version 1 on disk

    theirs.qzero_format(format=2)
    theirs.post_init()
    assert torch.equal(theirs.eval().dequantize_weight().t(), values.half())


@pytest.mark.parametrize("title", CONFIGS)
def test_transformers_computes_with_our_weights(gptqmodel, eager, tmp_path: Path, title: str) -> None:
    from transformers import GPTQConfig

    model = quantized_llama(CONFIGS[title])
    lq.export(model, tmp_path / "file", format_of(title))
    kernel = GPTQConfig(bits=model.model.layers[0].mlp.up_proj.weight_format.bits, backend="gptq_torch")
    theirs = pretrained(tmp_path / "file", quantization_config=kernel)
    read = lq.import_quantized(tmp_path / "file", llama(seed=5))
    assert_same_layers(read, model, scale_dtype=torch.float16)
    for name, layer in layers_of(read).items():
        weight = theirs.get_submodule(name).dequantize_weight().t()
        assert torch.equal(weight, layer.weight.half()), name
    # What is left is their weights in float16, and our scales before they were rounded.
    assert difference(logits(theirs), logits(read)) < 2e-3
    assert difference(logits(theirs), logits(model)) < 4e-3


def test_it_loads_without_being_told_anything(gptqmodel, eager, tmp_path: Path) -> None:
    model = quantized_llama(CONFIGS["4 bits, groups"], tie=True)
    lq.export(model, tmp_path / "file", "gptq")
    theirs = pretrained(tmp_path / "file")
    assert theirs.lm_head.weight is theirs.model.embed_tokens.weight
    assert difference(logits(theirs), logits(model)) < 3e-2  # of a kernel in bfloat16


def test_layers_in_float_stay_in_float(gptqmodel, eager, tmp_path: Path) -> None:
    model = quantized_llama(CONFIGS["4 bits, groups"], None, lq.LayerRule("model.layers.1.self_attn.*"))
    lq.export(model, tmp_path / "file", "gptq")
    theirs = pretrained(tmp_path / "file")
    assert type(theirs.model.layers[1].self_attn.q_proj) is nn.Linear
    assert type(theirs.model.layers[0].self_attn.q_proj) is not nn.Linear
    assert difference(logits(theirs), logits(model)) < 3e-2
    assert_same_layers(lq.import_quantized(tmp_path / "file", llama(seed=5)), model, scale_dtype=torch.float16)


def test_what_gptqmodel_packed_is_read(gptqmodel, eager, tmp_path: Path) -> None:
    lq.export(quantized_llama(CONFIGS["4 bits, groups"]), tmp_path / "file", "gptq")
    tensors, expected = load_file(tmp_path / "file" / "model.safetensors"), {}
    for name, linear in llama(seed=3).named_modules():
        if not isinstance(linear, nn.Linear) or name == "lm_head":
            continue
        held = lq.quantize(linear.weight.detach(), lq.QuantizationConfig("int4", group_size=32, symmetric=False))
        scale, zero = held.scale.half(), held.zero_point.clamp(1)
        layer = their_layer(4, 32, linear.in_features, linear.out_features)
        layer.pack_original(linear, scale.float(), zero.float(), (torch.arange(linear.in_features) // 32).int())
        tensors |= {
            f"{name}.{end}": getattr(layer, end).contiguous() for end in ("qweight", "scales", "g_idx", "qzeros")
        }
        steps = linear.weight.detach() / scale.float().repeat_interleave(32, 1)
        expected[name] = ((steps + zero.repeat_interleave(32, 1)).round().clamp(0, 15), scale, zero)
    save_file(tensors, tmp_path / "file" / "model.safetensors")
    facts = json.loads((tmp_path / "file" / "config.json").read_text())
    facts["quantization_config"] |= {"sym": False, "checkpoint_format": "gptq_v2"}
    (tmp_path / "file" / "config.json").write_text(json.dumps(facts))
    read = layers_of(lq.import_quantized(tmp_path / "file", llama(seed=5)))
    assert read.keys() == expected.keys()
    for name, (codes, scale, zero) in expected.items():
        assert torch.equal(read[name].codes.float(), codes)
        assert torch.equal(read[name].scale, scale.float())
        assert torch.equal(read[name].weight_zero_point, zero)


@pytest.mark.parametrize(
    ("weight", "rules", "format", "message"),
    [
        ("int4 channel bits 5", [], "gptq", r"bits=5 \(layer 'model.layers.0.self_attn.q_proj'\) is not one of GPTQ's"),
        ("group 8", [], "gptq", "group_size=8 .* is not one that loaders of gptq take; use 16, 32"),
        ("nf4", [], "gptq", "layer 'model.layers.0.self_attn.q_proj' is in nf4, which gptq has no codes for"),
        ("zero", [], "gptq", "has the zero point 0, .* use format='gptq_v2'"),
        ("group 32", [("*.up_proj", "8 bits")], "gptq", "layer 'model.layers.0.mlp.up_proj' has bits=8, group_size=-1"),
        ("group 32", [("lm_head", "group 32")], "gptq", "layer 'lm_head' is the output head"),
    ],
)
def test_what_it_cannot_hold_is_named(tmp_path: Path, weight: str, rules, format: str, message: str) -> None:
    known = {
        "int4 channel bits 5": lq.QuantizationConfig("int8", bits=5, per_channel=True),
        "group 8": lq.QuantizationConfig("int4", group_size=8),
        "group 32": lq.QuantizationConfig("int4", group_size=32),
        "8 bits": lq.QuantizationConfig("int8", per_channel=True),
        "nf4": lq.QuantizationConfig("nf4", group_size=64),
        "zero": lq.QuantizationConfig("int8", bits=2, group_size=16, symmetric=False),
    }
    model = quantized_llama(known[weight], None, *(lq.LayerRule(match, known[config]) for match, config in rules))
    with pytest.raises(ValueError, match=message):
        lq.export(model, tmp_path / "file", format)
    assert not any(tmp_path.iterdir())


def test_scales_beyond_float16_are_refused_and_dead_groups_are_not(tmp_path: Path) -> None:
    model = quantized_llama(CONFIGS["4 bits, groups"])
    layer = model.model.layers[1].mlp.down_proj
    layer.weight_scale[3, 2] = 1e-9
    with pytest.raises(ValueError, match=r"mlp.down_proj' has the scale 1e-09 \(output channel 3, group 2"):
        lq.export(model, tmp_path / "file", "gptq")
    assert not any(tmp_path.iterdir())
    codes = layer.codes
    codes[3, 64:96] = 0
    layer.weight_packed = lq.quantize(codes * 1.0, lq.QuantizationConfig("int4", group_size=32)).packed
    assert torch.equal(layer.codes[3, 64:96], codes[3, 64:96])
    lq.export(model, tmp_path / "file", "gptq")


def test_quantized_inputs_are_refused(tmp_path: Path) -> None:
    model = quantized_llama(CONFIGS["8 bits, channels"], lq.QuantizationConfig("dynamic"))
    with pytest.raises(ValueError, match="q_proj' quantizes its input to 8 bits, and gptq holds weights only"):
        lq.export(model, tmp_path / "file", "gptq")


@pytest.mark.parametrize("symmetric", [True, False])
def test_groups_in_activation_order(gptqmodel, eager, tmp_path: Path, symmetric: bool) -> None:
    """``desc_act``: the groups of inputs do not lie together."""
    from transformers import GPTQConfig

    config = lq.QuantizationConfig("gptq", group_size=32, symmetric=symmetric)
    plan = lq.QuantizationPlan([lq.LayerRule(nn.Linear, config), lq.LayerRule("lm_head")])
    options = lq.PTQOptions(gptq=lq.GPTQOptions(static_groups=False))
    model = lq.quantize_model(llama(), plan, [{"input_ids": IDS}], "gptq", options=options)
    lq.export(model, tmp_path / "file", "gptq_v2")
    facts = json.loads((tmp_path / "file" / "config.json").read_text())["quantization_config"]
    assert facts["desc_act"] is True
    theirs = pretrained(tmp_path / "file", quantization_config=GPTQConfig(bits=4, backend="gptq_torch"))
    read = lq.import_quantized(tmp_path / "file", llama(seed=5))
    for name, layer in layers_of(read).items():
        whole = torch.empty_like(layer.weight).index_copy_(1, layer.input_order, layer.weight)
        assert torch.equal(theirs.get_submodule(name).dequantize_weight().t(), whole.half()), name
    assert difference(logits(theirs), logits(read)) < 2e-3
    assert difference(logits(theirs), logits(model)) < 4e-3
    lq.export(read, tmp_path / "again", "gptq_v2")
    first, second = (load_file(tmp_path / folder / "model.safetensors") for folder in ("file", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_groups_of_other_sizes_are_not_read(tmp_path: Path) -> None:
    lq.export(quantized_llama(CONFIGS["4 bits, groups"]), tmp_path / "file", "gptq")
    file = tmp_path / "file" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.g_idx"][0] = 1
    save_file(tensors, file)
    model = llama(seed=5)
    before = logits(model)
    with pytest.raises(lq.QuantizedFileError, match=r"mlp.up_proj' has groups of other sizes than 32 in g_idx"):
        lq.import_quantized(tmp_path / "file", model)
    assert torch.equal(logits(model), before)


def test_an_encoder(gptqmodel, eager, tmp_path: Path) -> None:
    from transformers import AutoModel

    model = quantized_bert(CONFIGS["4 bits, groups"], pooler=False)
    lq.export(model, tmp_path / "file", "gptq")
    theirs = AutoModel.from_pretrained(tmp_path / "file").eval()
    assert type(theirs.pooler.dense) is nn.Linear
    assert type(theirs.encoder.layer[1].output.dense) is not nn.Linear
    with torch.no_grad():
        assert difference(theirs(IDS).last_hidden_state, model(IDS).last_hidden_state) < 3e-2
    with pytest.raises(ValueError, match="layer 'pooler.dense' lies outside the blocks 'encoder.layer'"):
        lq.export(quantized_bert(CONFIGS["4 bits, groups"], pooler=True), tmp_path / "other", "gptq")

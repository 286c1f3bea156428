"""AWQ files: gptqmodel packs the same bytes, and transformers computes with the same weights."""

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
from torch import Tensor, nn

import lightning_qat as lq
from lightning_qat.ops.word_packing import pack_awq_words

CONFIGS = {
    "groups": lq.QuantizationConfig("int4", group_size=32),
    "asymmetric": lq.QuantizationConfig("awq", group_size=64, symmetric=False),
    "channels": lq.QuantizationConfig("int4", per_channel=True),
}


@pytest.fixture(scope="module")
def gptqmodel() -> Any:
    return pytest.importorskip("gptqmodel")


@pytest.fixture
def eager() -> Any:
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def their_layer(linear: nn.Linear, scale: Tensor, zero: Tensor, group: int) -> Any:
    """Return gptqmodel's own packing of a Linear whose weight lies on the grid."""
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear

    columns, rows = linear.in_features, linear.out_features
    facts = dict(bits=4, group_size=group, sym=False, desc_act=False, in_features=columns, out_features=rows)
    layer = AwqTorchLinear(**facts, bias=False, register_buffers=True)
    layer.pack(linear, scale.float(), zero.float())
    return layer


def test_the_witness_is_right_and_packs_as_we_do(gptqmodel, eager) -> None:
    rows, columns, group = 96, 64, 32
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (rows, columns), generator=generator)
    scale = torch.rand(rows, columns // group, generator=generator).mul(0.1).add(0.01).half()
    zero = torch.randint(0, 16, scale.shape, generator=generator)
    values = (codes - zero.repeat_interleave(group, 1)) * scale.float().repeat_interleave(group, 1)
    linear = nn.Linear(columns, rows, bias=False)
    linear.weight = nn.Parameter(values)
    theirs = their_layer(linear, scale, zero, group)
    assert torch.equal(theirs.qweight, pack_awq_words(codes.t()))
    assert torch.equal(theirs.qzeros, pack_awq_words(zero.t()))
    assert torch.equal(theirs.scales, scale.t())
    theirs.post_init()
    out = theirs.eval()(torch.eye(columns, dtype=torch.float16)).t()
    assert difference(out.float(), values) < 1e-3


@pytest.mark.parametrize("title", CONFIGS)
def test_transformers_computes_with_our_weights(gptqmodel, eager, tmp_path: Path, title: str) -> None:
    from transformers import AwqConfig

    model = quantized_llama(CONFIGS[title], tie=title == "channels")
    lq.export(model, tmp_path / "file", "awq")
    read = lq.import_quantized(tmp_path / "file", llama(seed=5, tie=title == "channels"))
    assert_same_layers(read, model, scale_dtype=torch.float16)
    # The kernel of gptqmodel that computes in the model's dtype; the default one is in bfloat16.
    exact = pretrained(tmp_path / "file", quantization_config=AwqConfig(backend="torch_awq"))
    assert difference(logits(exact), logits(read)) < 3e-3
    assert difference(logits(exact), logits(model)) < 4e-3
    assert difference(logits(pretrained(tmp_path / "file")), logits(model)) < 3e-2


def test_layers_in_float_stay_in_float(gptqmodel, eager, tmp_path: Path) -> None:
    model = quantized_llama(CONFIGS["groups"], None, lq.LayerRule("model.layers.1.self_attn.*"))
    lq.export(model, tmp_path / "file", "awq")
    theirs = pretrained(tmp_path / "file")
    assert type(theirs.model.layers[1].self_attn.q_proj) is nn.Linear
    assert type(theirs.model.layers[0].self_attn.q_proj) is not nn.Linear
    assert difference(logits(theirs), logits(model)) < 3e-2


def test_what_gptqmodel_packed_is_read(gptqmodel, tmp_path: Path) -> None:
    lq.export(quantized_llama(CONFIGS["groups"]), tmp_path / "file", "awq")
    tensors, expected = load_file(tmp_path / "file" / "model.safetensors"), {}
    for name, linear in llama(seed=3).named_modules():
        if not isinstance(linear, nn.Linear) or name == "lm_head":
            continue
        held = lq.quantize(linear.weight.detach(), lq.QuantizationConfig("int4", group_size=32, symmetric=False))
        scale, zero = held.scale.half(), held.zero_point
        by_input = (scale.float().repeat_interleave(32, 1), zero.repeat_interleave(32, 1))
        linear.weight = nn.Parameter((held.codes.float() - by_input[1]) * by_input[0])
        layer = their_layer(linear, scale, zero, 32)
        for end in ("qweight", "qzeros", "scales"):
            tensors[f"{name}.{end}"] = getattr(layer, end).contiguous()
        expected[name] = (held.codes, scale, zero)
    save_file(tensors, tmp_path / "file" / "model.safetensors")
    facts = json.loads((tmp_path / "file" / "config.json").read_text())
    del facts["quantization_config"]["sym"]  # which is ours
    (tmp_path / "file" / "config.json").write_text(json.dumps(facts))
    read = layers_of(lq.import_quantized(tmp_path / "file", llama(seed=5)))
    assert read.keys() == expected.keys()
    for name, (codes, scale, zero) in expected.items():
        assert torch.equal(read[name].codes, codes)
        assert torch.equal(read[name].scale, scale.float())
        assert torch.equal(read[name].weight_zero_point, zero)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lq.QuantizationConfig("int8", per_channel=True), "bits=8 .* is not allowed: AWQ's files have 4"),
        (lq.QuantizationConfig("int4", group_size=8), "group_size=8 .* is not one that loaders of awq take"),
        (lq.QuantizationConfig("fp4", group_size=64), "q_proj' is in fp4, which awq has no codes for"),
    ],
)
def test_what_it_cannot_hold_is_named(tmp_path: Path, config, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lq.export(quantized_llama(config), tmp_path / "file", "awq")
    assert not any(tmp_path.iterdir())


def test_outputs_that_do_not_fill_a_word_are_refused(tmp_path: Path) -> None:
    model = lq.convert(lq.prepare(nn.Sequential(nn.Linear(32, 12)), CONFIGS["groups"]))
    with pytest.raises(ValueError, match="layer '0' has out_features=12, and AWQ packs 8 outputs into a word"):
        lq.export(model, tmp_path / "file", "awq")


def test_an_encoder(gptqmodel, eager, tmp_path: Path) -> None:
    from transformers import AutoModel

    model = quantized_bert(CONFIGS["groups"], pooler=False)
    lq.export(model, tmp_path / "file", "awq")
    theirs = AutoModel.from_pretrained(tmp_path / "file").eval()
    assert type(theirs.pooler.dense) is nn.Linear
    assert type(theirs.encoder.layer[1].output.dense) is not nn.Linear
    with torch.no_grad():
        assert difference(theirs(IDS).last_hidden_state, model(IDS).last_hidden_state) < 3e-2
    with pytest.raises(ValueError, match="layer 'pooler.dense' is the last of all"):
        lq.export(quantized_bert(CONFIGS["groups"], pooler=True), tmp_path / "other", "awq")


def test_layers_that_a_class_holds_in_float32_are_refused(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(vocab_size=64, d_model=64, d_kv=32, d_ff=64, num_layers=1, num_heads=2)
    base = lq.QATConfig("int4", group_size=32, symmetric=False, activation_bits=None)
    model = transformers.T5ForConditionalGeneration(config).eval()
    quantized = lq.quantize_model(model, lq.QuantizationPlan([lq.LayerRule("lm_head")], base=base))
    with pytest.raises(ValueError, match=r"DenseReluDense.wo' is of those that T5F.* in float32 \('wo'\)"):
        lq.export(quantized, tmp_path / "file", "awq")

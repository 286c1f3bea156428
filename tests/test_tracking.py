"""Trackers leave their files, need no account, and follow each other in one process."""

from __future__ import annotations

import csv
import json
import socket
import time
from pathlib import Path

import pytest

from lightning_qat.tracking import CSVTracker, Tracker, WandbTracker

ROWS = [{"variant": "float", "acc": 0.99, "bytes": 100}, {"variant": "converted", "acc": 0.98, "bytes": None}]


@pytest.fixture(autouse=True)
def no_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty home, no key, and no way out of this machine."""
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("DATA", "CACHE", "CONFIG"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "home" / name))
    connect = socket.socket.connect

    def local_only(self: socket.socket, address: object) -> None:
        host = address[0] if isinstance(address, tuple) else "unix"
        if host not in ("unix", "localhost", "127.0.0.1", "::1"):
            pytest.fail(f"a connection to {address} was tried")
        connect(self, address)  # type: ignore[arg-type]

    monkeypatch.setattr(socket.socket, "connect", local_only)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights" * 10)
    (folder / "manifest.json").write_text("{}")
    return folder


def use(tracker: Tracker, model: Path, *, failed: bool = False) -> None:
    tracker.start({"seed": 0, "task": {"lr": 0.1}})
    for stage in ("float", "qat"):
        logger = tracker.logger(stage)
        if not isinstance(logger, bool):
            logger.log_metrics({"train/loss": 0.5}, step=0)
            logger.log_metrics({"train/loss": 0.25}, step=1)
    tracker.log_results(ROWS)
    tracker.log_model(model, {"acc": 0.98})
    tracker.finish(failed=failed)


def test_the_plain_tracker_keeps_nothing(tmp_path: Path, model: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    use(Tracker(), model)
    assert Tracker().logger("float") is False
    assert sorted(tmp_path.rglob("*")) == before


def test_csv_keeps_each_fit_in_a_file(tmp_path: Path, model: Path) -> None:
    use(CSVTracker(tmp_path / "csv"), model)
    for stage in ("float", "qat"):
        with (tmp_path / "csv" / stage / "metrics.csv").open() as file:
            assert [float(row["train/loss"]) for row in csv.DictReader(file)] == [0.5, 0.25]


def test_wandb_offline_leaves_a_run_with_all_of_it(tmp_path: Path, model: Path) -> None:
    use(WandbTracker(tmp_path / "run"), model)
    runs = list((tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert len(runs) == 1
    path, log = next(runs[0].glob("*.wandb")), b""
    words = (b"float-train/loss", b"qat-train/loss", b"quantized-model", b"seed", b"float/acc", b"converted/acc")
    for _ in range(300):  # a process of wandb's own writes it, a little later where cores are busy
        log = path.read_bytes()
        if all(word in log for word in words):
            break
        time.sleep(0.1)
    assert [word for word in words if word not in log] == []
    tables = [json.loads(path.read_text()) for path in runs[0].rglob("*.table.json")]
    assert [table["columns"] for table in tables] == [["variant", "acc", "bytes"]]
    assert tables[0]["data"] == [["float", 0.99, 100], ["converted", 0.98, None]]


def test_wandb_runs_follow_each_other(tmp_path: Path, model: Path) -> None:
    for job, failed in enumerate((False, True)):
        tracker = WandbTracker(tmp_path / str(job))
        use(tracker, model, failed=failed)
        tracker.finish()  # a second time does nothing
        assert len(list((tmp_path / str(job) / "wandb").glob("offline-run-*"))) == 1


def test_wandb_before_start_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="start"):
        WandbTracker(tmp_path).logger("float")

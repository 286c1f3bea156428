"""A comparison from one command: skipped where it is measured, exact where it was killed, clear where it is wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import hydra
import lightning as L
import pytest
from omegaconf import DictConfig

from lightning_qat import QATConfig, load_quantized
from lightning_qat.data import DigitsDataModule
from lightning_qat.recipes._arms import check_comparison
from lightning_qat.recipes._build import make
from lightning_qat.recipes._cli import main
from lightning_qat.recipes._ledger import code_digest, config_digest, data_digest
from lightning_qat.tasks import ImageClassifier, SmallResNet

from .test_conf import options

#: The shortest comparison that has every kind of arm.
TINY = [
    "seeds=[0]",
    "float_fit.max_epochs=2",
    "arm_fit.max_epochs=2",
    "trainer.limit_train_batches=2",
    "trainer.limit_val_batches=1",
    "model.widths=[4,8]",
    "calibration_batches=1",
    "parity.batches=1",
    "output_dir=out",
    "~callbacks",
    "+trainer.enable_progress_bar=false",
]
#: What is another number, or date, in every run.
_OF_THE_MOMENT = ("seconds", "certificate", "fingerprint")


def entries(path: Path) -> dict[tuple[int, str], dict[str, Any]]:
    runs = json.loads((path / "results.json").read_text())["runs"]
    return {(run["seed"], run["arm"]): {k: v for k, v in run.items() if k not in _OF_THE_MOMENT} for run in runs}


@pytest.fixture(autouse=True)
def fixed_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the tests hold while somebody edits the sources, which is other code to a comparison."""
    monkeypatch.setattr("lightning_qat.recipes.compare.code_digest", lambda: "as it is")


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the folders of the fits that are begun, as they come."""
    begun: list[str] = []
    fit = L.Trainer.fit

    def counted(trainer: L.Trainer, *args: Any, **options: Any) -> None:
        begun.append(Path(trainer.callbacks[-1].path).parent.name)
        fit(trainer, *args, **options)

    monkeypatch.setattr(L.Trainer, "fit", counted)
    return begun


def test_all_arms_and_a_second_time_nothing(
    tmp_path: Path, fits: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", *TINY]) == 0
    assert fits == ["_shared", "float", "qat_int8", "qat_w4a8"]
    results = tmp_path / "out" / "results.json"
    found, text, stamp = entries(tmp_path / "out"), results.read_bytes(), results.stat().st_mtime_ns
    for name in ("qat_int8", "qat_w4a8", "ptq_int8", "ptq_w4a8"):
        run = found[0, name]
        assert run["same_top1_as_fake_quantized"] == 1
        assert run["metrics"]["test/acc"] == run["fake_quantized_metrics"]["test/acc"]
        load_quantized(tmp_path / "out" / "seed_0" / name / "model", ImageClassifier(SmallResNet(widths=(4, 8))))
    assert found[0, "qat_w4a8"]["bytes"] < found[0, "qat_int8"]["bytes"]
    assert not list(tmp_path.rglob("last.ckpt"))
    capsys.readouterr()

    assert main(["compare", *TINY]) == 0
    assert len(fits) == 4
    assert (results.read_bytes(), results.stat().st_mtime_ns) == (text, stamp)
    assert "points to float" in " ".join(capsys.readouterr().out.split())


def test_only_what_changed_is_run_again(tmp_path: Path, fits: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *TINY]) == 0
    before = entries(tmp_path / "out")
    fits.clear()
    more = [*TINY[1:], "seeds=[0,1]"]
    assert main(["compare", *more, "~arms.qat_w4a8", "~arms.ptq_w4a8", "~arms.ptq_int8"]) == 0
    assert fits == ["_shared", "float", "qat_int8"]  # of seed 1
    summary = {row["arm"]: row for row in json.loads((tmp_path / "out" / "results.json").read_text())["summary"]}
    assert list(summary) == ["_shared", "float", "qat_int8"]
    values = [entries(tmp_path / "out")[seed, "qat_int8"]["metrics"]["test/acc"] for seed in (0, 1)]
    assert summary["qat_int8"]["shipped"]["mean"] == pytest.approx(sum(values) / 2)
    assert summary["qat_int8"]["shipped"]["std"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)

    fits.clear()
    assert main(["compare", *TINY, "+arms.qat_int8.fit.max_epochs=1"]) == 0
    assert fits == ["qat_int8"]
    assert "qat_int8, seed 0: measured with other config" in capsys.readouterr().out
    after = entries(tmp_path / "out")
    assert after[0, "qat_int8"]["epochs"] == 1
    assert {k: v for k, v in after.items() if k[0] == 0 and k[1] != "qat_int8"} == {
        k: v for k, v in before.items() if k[1] != "qat_int8"
    }


def test_weights_that_an_arm_needs_are_trained_again(tmp_path: Path, fits: list[str]) -> None:
    one = [*TINY, "~arms.qat_w4a8", "~arms.ptq_w4a8", "~arms.ptq_int8"]
    assert main(["compare", *one]) == 0
    before = entries(tmp_path / "out")
    (tmp_path / "out" / "seed_0" / "_shared" / "float.safetensors").unlink()
    fits.clear()
    assert main(["compare", *one]) == 0
    assert fits == []
    assert main(["compare", *one, "+arms.more.quantization={preset:int8,freeze_step:0.5}"]) == 0
    assert fits == ["_shared", "more"]
    assert entries(tmp_path / "out")[0, "_shared"] == before[0, "_shared"]


def test_other_code_measures_again(monkeypatch: pytest.MonkeyPatch, fits: list[str]) -> None:
    one = [*TINY, "arms=custom"]
    assert main(["compare", *one]) == 0
    monkeypatch.setattr("lightning_qat.recipes.compare.code_digest", lambda: "other")
    assert main(["compare", *one]) == 0
    assert fits == ["_shared", "float"] * 2


def test_fits_are_logged(tmp_path: Path) -> None:
    assert main(["compare", *TINY, "arms=custom", "logger=csv", "trainer.log_every_n_steps=1"]) == 0
    for name in ("shared", "float"):
        assert "train/loss" in (tmp_path / "out" / "csv" / f"seed_0_{name}" / "metrics.csv").read_text()


def test_digests_tell_apart(tmp_path: Path) -> None:
    assert code_digest() == code_digest()
    digests = {data_digest(DigitsDataModule(seed=seed)) for seed in (0, 1, 0)}
    assert len(digests) == 2
    one, other = (DictConfig({"task": {"lr": 1}, "output_dir": folder}) for folder in ("a", "b"))
    assert config_digest(one) == config_digest(other) != config_digest(DictConfig({"task": {"lr": 2}}))


KILLER = """
import os, pathlib, signal
import lightning as L
from torch import nn

class Noisy(nn.Sequential):
    def __init__(self):  # dropout: the random state matters
        super().__init__(nn.Flatten(), nn.Dropout(0.3), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Linear(16, 10))

class Killer(L.Callback):
    def __init__(self, name):
        self.name = name
    def kill(self, moment):
        file = pathlib.Path(os.environ["KILLS"]) / f"{self.name}-{moment}"
        if file.is_file():
            file.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
    def on_train_batch_end(self, trainer, *_):
        self.kill(f"step-{trainer.global_step}")
    def on_fit_end(self, *_):
        self.kill("trained")
"""


@pytest.mark.slow
def test_killed_and_run_again_is_never_having_been_killed(tmp_path: Path) -> None:
    (tmp_path / "deadly.py").write_text(KILLER)
    killed = "quantization:w4a8,callbacks:{k:{_target_:deadly.Killer,name:qat}}"
    arms = f"{{float:{{}},qat:{{{killed}}},ptq:{{quantization:int8,after:float}}}}"
    kept = [option for option in TINY if not option.startswith(("output_dir", "model", "~callbacks"))]
    shared = "callbacks={every_fit:{k:{_target_:deadly.Killer,name:fit}}}"
    options = [*kept, "model._target_=deadly.Noisy", "~callbacks", f"+{shared}", "arms=custom", f"+arms={arms}"]
    kills = tmp_path / "kills"
    kills.mkdir()

    def run(folder: str, expected: int) -> None:
        command = [sys.executable, "-m", "lightning_qat", "compare", *options, f"output_dir={folder}"]
        env = {**os.environ, "KILLS": str(kills)}
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == expected, done.stderr

    run("whole", 0)
    for moment in ("fit-step-1", "fit-step-3", "qat-step-3", "qat-trained"):
        (kills / moment).touch()
        run("killed", -signal.SIGKILL)
    run("killed", 0)
    assert entries(tmp_path / "killed") == entries(tmp_path / "whole")


@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ("comparison=fashion_mnist_int8", "did you mean 'fashion_mnist_int8_w4a8'?"),
        ("arms=int8", "did you mean 'int8_w4a8'?"),
        ("seeds=[0,0]", "a list of different integers"),
        ("seeds=[-1]", "seeds=-1 is not allowed"),
        ("reference=flaot", "did you mean 'float'?"),
        ("reference=qat_int8", "must be a float arm"),
        (
            "arms.qat_int8.quantization=int9",
            "arms.qat_int8.quantization: preset='int9' is not known; use one of: 'int8'",
        ),
        ("+arms.new={quantisation:int8}", "did you mean 'quantization'?"),
        ("+arms.new={quantization:{preset:w4a8,bitz:3}}", "arm 'new': quantization.bitz: QATConfig takes no argument"),
        ("+arms.new={quantization:int8,after:qat_int8}", "must be a float arm"),
        ("+arms.new={quantization:int8,after:float,fit:{max_epochs:1}}", "arms.new.after: the arm is not trained"),
        ("+arms.new={fit:{max_epoch:1}}", "arm 'new': qat_fit.max_epoch: Trainer takes no argument 'max_epoch'"),
        ("+arms.new={fit:{accelerator:abacus}}", "arm 'new': trainer: "),
        ("+arms.new={callbacks:{f:{_target_:lightning_qat.FreezeQuantization,step:-1}}}", "step=-1 is not allowed"),
        ("+arms.new={task:3}", "arms.new.task=3 must hold names and values"),
        ("+arms.new=3", "arms.new=3 must hold some of"),
        ("+arms._new={}", "beginning with a letter"),
        ("-m seeds=[0],[1]", "compare takes no -m"),
    ],
)
def test_a_mistake_is_said_in_a_sentence(overrides: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *overrides.split()]) == 2
    printed = capsys.readouterr().err
    assert said in printed
    assert "Traceback" not in printed


def test_files_of_others_are_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.json").write_text("[]")
    assert main(["compare", *TINY]) == 2
    assert "is not a file of `lightning-qat compare`" in capsys.readouterr().err
    (tmp_path / "out" / "results.json").unlink()
    precious = tmp_path / "out" / "seed_0" / "_shared" / "precious.txt"
    precious.parent.mkdir(parents=True)
    precious.touch()
    assert main(["compare", *TINY]) == 2
    assert "is there and not of `lightning-qat compare`" in capsys.readouterr().err
    assert precious.is_file()


@pytest.mark.parametrize("choice", [f"{g}={name}" for g in ("arms", "comparison") for name in options(g)])
def test_every_file_holds_arms_that_can_be_run(choice: str) -> None:
    with hydra.initialize_config_module("lightning_qat.conf", version_base="1.3"):
        cfg = hydra.compose("compare", [choice, "output_dir=out"])
    assert "float" in check_comparison(cfg)


def test_a_quantization_is_a_preset_with_changes() -> None:
    arms = "{a:{quantization:w4a8},b:{quantization:{preset:w4a8,bits:4,freeze_step:0.5}},float:{}}"
    with hydra.initialize_config_module("lightning_qat.conf", version_base="1.3"):
        cfg = hydra.compose("compare", ["output_dir=out", f"+arms={arms}"])
    found = check_comparison(cfg)
    assert make(found["a"].quantization, "a") == QATConfig("int4", per_channel=True)
    assert make(found["b"].quantization, "b") == QATConfig("int4", per_channel=True, freeze_step=0.5)

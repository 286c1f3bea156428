"""A mistake stops a recipe before anything is trained, in one sentence with the nearest valid name."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_qat.recipes._cli import main

pytestmark = pytest.mark.usefixtures("untrained")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ("quantization=int9", "quantization='int9' is not known; did you mean 'int8'?"),
        ("data=digit", "did you mean 'digits'?"),
        ("recipe=mnist_int8", "did you mean 'mnist5k_int8'?"),
        ("callbacks=[default,freeze]", "did you mean 'freeze_quantization'?"),
        ("quantisation=int8", "did you mean 'quantization'?"),
        ("recipee=default", "did you mean 'recipe'?"),
        ("quantization.bitz=4", "did you mean 'bits'?"),
        ("+quantization.bitz=4", "did you mean 'bits'?"),
        ("quantization.bits=99", "bits=99 is not allowed"),
        ("quantization.scheme=in8", "use one of: 'int8'"),
        ("quantization.weight_observer=minmax", "use one of: 'min_max'"),
        ("data.batchsize=4", "did you mean 'batch_size'?"),
        ("+data.batchsize=4", "did you mean 'batch_size'?"),
        ("data.batch_size=0", "batch_size=0 is not allowed"),
        ("task.lr=-1", "lr=-1,"),
        ("+qat_task.lrr=1", "did you mean 'lr'?"),
        ("+qat_fit.max_epoch=1", "did you mean 'max_epochs'?"),
        ("task._target_=lightning_qat.tasks.ImageClasifier", "did you mean 'lightning_qat.tasks.ImageClassifier'?"),
        ("task._target_=lightning_qat.task.ImageClassifier", "did you mean 'lightning_qat.tasks'?"),
        ("task._target_=no_such_package.Task", "is its package installed"),
        ("task._target_=lightning_qat.tasks", "is no class or function"),
        ("task._target_=Task", "write package.module.Class"),
        ("task._target_=lightning_qat.data.DigitsDataModule", "must be a LightningModule"),
        ("data._target_=torch.nn.Identity", "not a LightningDataModule"),
        ("model._target_=lightning_qat.tasks.SmallResNet model.width=3", "did you mean 'widths'?"),
        ("task=custom", "task._target_ is missing"),
        ("data=fashion_mnist data.root=/nowhere", "apt-get install dataset-fashion-mnist"),
        ("float_checkpoint=/nowhere/float.safetensors", "is no file"),
        ("calibration_batches=0", "calibration_batches=0 is not allowed"),
        ("threads=0", "threads=0 is not allowed"),
        ("quantization=plan +quantization.base.x=3", "base"),
        ("recipe=digits_mixed quantization.rules.0.match=model.stam", "model.stam"),
        ("quantization=w4a16", "group_size must divide"),
        ("quantization.bits", "missing EQUAL"),
    ],
)
def test_a_mistake_is_said_in_a_sentence(overrides: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *overrides.split(), "logger=csv"]) == 2
    printed = capsys.readouterr().err
    assert said in printed
    assert "Traceback" not in printed


def test_a_task_that_cannot_be_tested(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = "import lightning as L, torch\nclass Task(L.LightningModule):\n    def __init__(self):\n"
    (tmp_path / "blind.py").write_text(f"{code}        super().__init__()\n        self.net = torch.nn.Linear(2, 2)\n")
    assert main(["train", "task._target_=blind.Task", "logger=none"]) == 2
    assert "need test_step and test_dataloader" in capsys.readouterr().err


def test_a_sweep_is_checked_as_a_whole_before_its_first_job(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "-m", "quantization.bits=8,99,4", "logger=none"]) == 2
    printed = capsys.readouterr().err
    assert "job quantization.bits=99" in printed
    assert "bits=99 is not allowed" in printed


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([], "model_path is missing"),
        (["model_path=/nowhere"], "is no folder"),
        (["model_path=."], "holds no config.yaml"),
    ],
)
def test_evaluate(overrides: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", *overrides]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("held", [b"garbage: [", b"\xff\xfe\x00", b"- one"], ids=["no YAML", "no text", "no names"])
def test_a_damaged_config_of_a_run(held: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model").mkdir()
    (tmp_path / "run" / "config.yaml").write_bytes(held)
    assert main(["evaluate", f"model_path={tmp_path / 'run'}"]) == 2
    assert "config.yaml is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("folder", ["file", "file/below"])
def test_a_folder_that_cannot_be_made(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("here first")
    assert main(["train", f"output_dir={tmp_path / folder}", "logger=none"]) == 2
    printed = capsys.readouterr().err
    assert str(tmp_path / "file") in printed
    assert "Traceback" not in printed


def test_a_fault_of_the_program_keeps_its_traceback(tmp_path: Path) -> None:
    (tmp_path / "faulty.py").write_text("class Task:\n    def __init__(self):\n        1 / 0\n")
    with pytest.raises(Exception, match="ZeroDivisionError"):
        main(["train", "task._target_=faulty.Task", "logger=none"])


def test_the_traceback_of_a_mistake_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ValueError, match="bits=99"):
        main(["train", "quantization.bits=99", "logger=none"])

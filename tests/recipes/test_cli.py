"""Verbs, their help, and how classes of the user reach Hydra."""

from __future__ import annotations

import os
import sys

import pytest

from lightning_qat.recipes._cli import expand_custom, main, verbs


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]])
def test_help_lists_the_verbs(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert set(verbs()) >= {"train", "evaluate"}
    for verb, summary in verbs().items():
        assert verb in printed
        assert summary.endswith(".")


def test_an_unknown_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    assert "did you mean 'train'?" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["train", "evaluate"])
def test_help_of_a_verb_shows_its_config(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    assert "output_dir" in capsys.readouterr().out


def test_arguments_and_environment_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    before = list(sys.argv)
    main(["train", "--help"])
    assert sys.argv == before
    assert "HYDRA_FULL_ERROR" not in os.environ


@pytest.mark.parametrize(
    ("given", "spelled"),
    [
        (["task.lr=1"], ["task.lr=1"]),
        (["task._target_=a.B", "seed=1"], ["task=custom", "task._target_=a.B", "seed=1"]),
        (
            ["task._target_=a.B", "task.lr=1", "qat_task.lr=2", "data.n=3"],
            ["task=custom", "task._target_=a.B", "++task.lr=1", "++qat_task.lr=2", "data.n=3"],
        ),
        (["task=mine", "task._target_=a.B", "task.lr=1"], ["task=mine", "task._target_=a.B", "task.lr=1"]),
        (["data._target_=a.D", "+data.n=3"], ["data=custom", "data._target_=a.D", "+data.n=3"]),
        (["-m", "model._target_=a.N,a.M"], ["model=custom", "-m", "model._target_=a.N,a.M"]),
    ],
)
def test_classes_of_the_user(given: list[str], spelled: list[str]) -> None:
    assert expand_custom(given) == spelled

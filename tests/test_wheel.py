"""The wheel holds everything: installed elsewhere, it runs from another folder without the repository."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomllib")

ROOT = Path(__file__).parent.parent
SOURCES = ("lightning_qat", "conf", "recipes")


def run(*command: str, cwd: Path, **env: str) -> str:
    done = subprocess.run(command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that nothing is written into the repository."""
    copy = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist", ".", cwd=copy)
    (built,) = (copy / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(wheel), cwd=target)
    return target


def test_every_source_file_is_in_the_wheel(wheel: Path) -> None:
    expected = set()
    for name in SOURCES:
        for path in (ROOT / name).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                relative = path.relative_to(ROOT).as_posix()
                expected.add(relative if name == "lightning_qat" else f"lightning_qat/{relative}")
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
        licences = [name for name in archive.namelist() if name.endswith("LICENSE")]
    assert found == expected
    assert len(licences) == 1


def test_every_package_is_listed() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "lightning_qat").rglob("*.py")}
    names = {".".join(folder.parts) for folder in folders}
    assert set(settings["tool"]["setuptools"]["packages"]) == {*names, "lightning_qat.conf", "lightning_qat.recipes"}
    assert all((ROOT / folder / "__init__.py").is_file() for folder in folders)


def test_the_verbs_run_from_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    # -S leaves out any editable install; what else is installed is appended by hand.
    script = (
        f"import sys; sys.path += [{sysconfig.get_path('purelib')!r}, {sysconfig.get_path('platlib')!r}]; "
        "import lightning_qat, lightning_qat.conf, lightning_qat.recipes as r; "
        "print(lightning_qat.__file__, lightning_qat.conf.__file__, r.__file__, sep='\\n'); "
        "from lightning_qat.recipes._cli import main; raise SystemExit(main())"
    )
    python = [sys.executable, "-S", "-c", script]
    places = {"PYTHONPATH": str(installed)}
    printed = run(*python, "--help", cwd=tmp_path, **places).splitlines()
    assert [Path(line).is_relative_to(installed) for line in printed[:3]] == [True, True, True]
    assert "train" in "".join(printed)
    tiny = ["float_fit.max_epochs=1", "qat_fit.max_epochs=1", "trainer.limit_train_batches=1", "model.widths=[4]"]
    run(*python, "train", "logger=none", *tiny, cwd=tmp_path, **places)
    (folder,) = (tmp_path / "outputs" / "train").iterdir()
    assert len(json.loads((folder / "results.json").read_text())["variants"]) == 4
    assert [path.name for path in tmp_path.iterdir()] == ["outputs"]


def test_python_dash_m_is_the_console_script(installed: Path, tmp_path: Path) -> None:
    printed = run(sys.executable, "-m", "lightning_qat", "--help", cwd=tmp_path, PYTHONPATH=str(installed))
    assert printed.startswith("lightning-qat VERB")

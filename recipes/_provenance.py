"""Which code ran: versions of packages, and the commit of this one where it runs from a checkout."""

from __future__ import annotations

import os
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import lightning_qat


def package_version(package: str) -> str | None:
    """Return the version of an installed package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def source_commit(package: Path | None = None) -> str | None:
    """Return the commit of the checkout that the package runs from, with ``-dirty`` where files differ from it.

    None where it is installed elsewhere, also inside of another project's repository, and without git.

    Args:
        package: its folder; None is this one's.
    """
    root = (package or Path(lightning_qat.__file__).parent).resolve().parent
    project = root / "pyproject.toml"
    if not project.is_file() or 'name = "lightning-qat"' not in project.read_text(encoding="utf-8"):
        return None
    top, commit, changes = (_git(root, *words) for words in _QUESTIONS)
    if not top or not commit or changes is None or Path(top).resolve() != root:
        return None
    return f"{commit}-dirty" if changes else commit


_QUESTIONS = (("rev-parse", "--show-toplevel"), ("rev-parse", "HEAD"), ("status", "--porcelain"))


def _git(folder: Path, *words: str) -> str | None:
    """Return what git says of ``folder``, or None."""
    # Inside a hook, GIT_DIR and its kin name another repository.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", *words], cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None

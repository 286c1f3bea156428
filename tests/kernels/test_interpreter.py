"""The kernel tests in Triton's interpreter, which has to be chosen before Triton is imported."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOM = Path(__file__).parent


def test_kernels_in_the_interpreter(compiler: None) -> None:
    files = sorted(str(path) for path in ROOM.glob("test_*.py") if "device: str" in path.read_text(encoding="utf-8"))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(command, cwd=ROOM.parents[1], env=environment, capture_output=True, text=True, check=False)
    if run.returncode:
        pytest.fail(run.stdout[-8000:] + run.stderr[-2000:], pytrace=False)
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed is not None
    assert int(passed[1]) >= len(files)

"""The pytest plugin: every assertion of :mod:`lightning_qat.testing` as a fixture of its name.

Installed with the package; ``pytest -p no:lightning_qat`` leaves it out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def assert_resume_exact(tmp_path: Path) -> Callable[..., None]:
    """:func:`lightning_qat.testing.assert_resume_exact`, with checkpoints in ``tmp_path``."""
    from lightning_qat import testing  # takes seconds: not for test runs that do not use it

    return functools.partial(testing.assert_resume_exact, folder=tmp_path)


@pytest.fixture
def assert_rank_equal(tmp_path: Path) -> Callable[..., None]:
    """:func:`lightning_qat.testing.assert_rank_equal`, with its files in ``tmp_path``."""
    from lightning_qat import testing

    return functools.partial(testing.assert_rank_equal, folder=tmp_path)


@pytest.fixture
def assert_convert_parity() -> Callable[..., Any]:
    """:func:`lightning_qat.testing.assert_convert_parity`."""
    from lightning_qat import testing

    return testing.assert_convert_parity


@pytest.fixture
def assert_compile_fullgraph() -> Callable[..., None]:
    """:func:`lightning_qat.testing.assert_compile_fullgraph`."""
    from lightning_qat import testing

    return testing.assert_compile_fullgraph

"""Assertions about quantization-aware training for a module of your own.

Each raises ``AssertionError`` that names the first tensor and step that differ. With pytest they are fixtures of the
same names too (:mod:`lightning_qat.testing.plugin`), which write into the test's ``tmp_path``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_qat.testing.compile import assert_compile_fullgraph
    from lightning_qat.testing.parity import assert_convert_parity
    from lightning_qat.testing.ranks import assert_rank_equal
    from lightning_qat.testing.resume import assert_resume_exact
    from lightning_qat.testing.scheme import check_scheme

# The plugin is imported by every test run of an environment; Lightning is not, until one of these is used.
_LAZY = {
    "assert_compile_fullgraph": "compile",
    "assert_convert_parity": "parity",
    "assert_rank_equal": "ranks",
    "assert_resume_exact": "resume",
    "check_scheme": "scheme",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)


__all__ = [
    "assert_compile_fullgraph",
    "assert_convert_parity",
    "assert_rank_equal",
    "assert_resume_exact",
    "check_scheme",
]

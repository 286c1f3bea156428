"""Where the kernel tests run: on a GPU, or in Triton's interpreter, in a process that test_interpreter.py starts.

A test of numbers takes the fixture ``device`` and makes its tensors there. A test of the compiler takes ``compiler``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is installed on Linux only")

from triton.runtime import interpreter

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(scope="session")
def device() -> str:
    """Return where tensors go; the same tests check the compiled kernels where there is a GPU."""
    if INTERPRETED:
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    pytest.skip("no GPU: test_interpreter.py runs this in Triton's interpreter")


@pytest.fixture(scope="session")
def compiler() -> None:
    """Skip where kernels are interpreted, which leaves nothing to compile."""
    if INTERPRETED:
        pytest.skip("kernels are interpreted in this process")


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what ``torch.empty`` and its kin return, so that an element which is never written shows."""

    def poison(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: object, **kwargs: object) -> Tensor:
            result = function(*args, **kwargs)
            return result.fill_(float("nan") if result.is_floating_point() else 85)

        return made

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))


def _convert_bfloat16(fallback: Callable[..., Any]) -> Callable[..., Any]:
    """Return what converts as the hardware does; the interpreter's own truncates, and shifts denormals wrongly."""

    def convert(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        if (str(source), str(target)) == ("bf16", "fp32"):
            return data.astype(np.uint32) << np.uint32(16)
        if (str(source), str(target)) == ("fp32", "bf16"):
            bits = np.ascontiguousarray(data).view(np.uint32)
            nearest = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
            return np.where(np.isnan(data), np.uint32(0x7FC0), nearest).astype(np.uint16)
        return fallback(data, source, target, rounding)

    return convert


if INTERPRETED:
    interpreter._convert_float = _convert_bfloat16(interpreter._convert_float)

"""Giving memory that was freed back to the system, which then counts it no longer."""

from __future__ import annotations

import ctypes
import sys
from functools import lru_cache
from typing import Any


def return_freed_memory() -> None:
    """Let glibc return the free pages of its heap; elsewhere nothing is done.

    It keeps them where a smaller tensor lies above: at the last of 24 blocks that were streamed, a process had taken
    309 MB, of which 112 were in use.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@lru_cache(maxsize=1)
def _malloc_trim() -> Any:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None

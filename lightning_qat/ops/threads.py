"""Work in parts on threads of our own, for passes of many small operations that each stay on their thread.

PyTorch's own threads meet after every operation: 8 ms each time while other processes keep the cores busy. These meet
once. The parts call PyTorch with fewer elements than it spreads over threads.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TypeVar

import torch

#: More threads than this are not worth the waiting for them, nor for Python.
MOST_PARTS = 8

Result = TypeVar("Result")


def parts_of(count: int, least: int) -> int:
    """Return into how many parts ``count`` pieces of work go: as many as PyTorch has threads, of ``least`` or more."""
    return max(1, min(MOST_PARTS, torch.get_num_threads(), count // max(1, least)))


def shares(count: int, parts: int) -> list[slice]:
    """Return ``parts`` or fewer slices of nearly equal length that cover ``count``."""
    step = max(1, -(-count // parts))
    return [slice(start, min(count, start + step)) for start in range(0, count, step)]


def in_threads(tasks: Sequence[Callable[[], Result]]) -> list[Result]:
    """Return what the tasks return, in order; the first runs on the calling thread.

    All have ended when this returns or raises. Gradients are not recorded.

    Args:
        tasks: one or more.
    """
    first, *others = tasks
    if not others:
        return [first()]
    inference = torch.is_inference_mode_enabled()

    def without_gradients(task: Callable[[], Result]) -> Result:
        with torch.inference_mode(inference), torch.no_grad():
            return task()

    waiting = [_workers(os.getpid(), len(others)).submit(without_gradients, task) for task in others]
    try:
        result = without_gradients(first)
    finally:
        for future in waiting:
            future.exception()  # waits
    return [result, *(future.result() for future in waiting)]


@lru_cache(maxsize=MOST_PARTS)
def _workers(process: int, count: int) -> ThreadPoolExecutor:
    """Return threads of this process: those of the one it was forked from are not there."""
    return ThreadPoolExecutor(count, thread_name_prefix="lightning_qat")

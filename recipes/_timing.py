"""Times of alternatives, taken in turn in one process, and what the machine itself can do."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from rich.progress import track

#: What is timed; its result is freed before the next one starts.
Case = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Median time of one alternative, and how many times as long the one that it is compared with took.

    Args:
        group: what was measured, such as ``"fake_quantize forward"``.
        name: of the alternative.
        milliseconds: median.
        ratio: time of the group's baseline divided by this one's; above 1 is faster.
        kept: bytes kept for backward, as a multiple of the baseline's, where that was measured.
    """

    group: str
    name: str
    milliseconds: float
    ratio: float
    kept: float | None = None


def interleaved(cases: Mapping[str, Case], rounds: int, title: str) -> dict[str, float]:
    """Return the median milliseconds of each case, run in turn ``rounds`` times after one uncounted round.

    What else runs on the machine meets all of them alike.
    """
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in track(range(rounds + 1), description=title, transient=True):
        for name, case in cases.items():
            start = time.perf_counter()
            result = case()
            times[name].append((time.perf_counter() - start) * 1e3)
            del result
    return {name: statistics.median(t[1:]) for name, t in times.items()}


def compared(group: str, cases: Mapping[str, Case], rounds: int, *, baseline: str) -> list[Timing]:
    """Time ``cases`` and set each against the one called ``baseline``."""
    medians = interleaved(cases, rounds, group)
    return [Timing(group, name, medians[name], medians[baseline] / medians[name]) for name in cases]


def machine(rounds: int) -> dict[str, Any]:
    """Return what ran the measurements: processor, versions, and its own copy bandwidth and matrix rate."""
    source, target = torch.randn(16 * 2**20), torch.empty(16 * 2**20)
    matrix = torch.randn(1024, 1024)
    limits = interleaved({"copy": lambda: target.copy_(source), "matrix": lambda: matrix @ matrix}, rounds, "machine")
    return {
        "processor": platform.processor() or platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("lightning-qat", "torch", "lightning", "torchao")},
        "copy_gigabytes_per_second": 2 * source.nbytes / limits["copy"] / 1e6,
        "matrix_gigaflops": 2 * 1024**3 / limits["matrix"] / 1e6,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None

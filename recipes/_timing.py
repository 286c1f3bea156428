"""Times of alternatives, taken in turn in one process, and what the machine itself can do."""

from __future__ import annotations

import math
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.progress import track

from ._provenance import package_version

#: What is timed; its result is freed before the next one starts.
Case = Callable[[], object]

#: A case whose first call takes less is called this many times a turn.
_SHORT_MS = 20.0
_CALLS_OF_SHORT_CASES = 4


@dataclass(frozen=True)
class Timing:
    """Median time of one alternative, and how many times as long the one that it is compared with took.

    Args:
        group: what was measured, such as ``"fake_quantize forward"``.
        name: of the alternative.
        milliseconds: median.
        ratio: time of the group's baseline divided by this one's; above 1 is faster.
        kept: bytes kept for backward, as a multiple of the baseline's, where that was measured.
        peak: most bytes allocated at any moment of forward and backward, as a multiple of the baseline's.
        sqnr_db: of the outputs against float's, where that was measured.
    """

    group: str
    name: str
    milliseconds: float
    ratio: float
    kept: float | None = None
    peak: float | None = None
    sqnr_db: float | None = None


@dataclass(frozen=True)
class Results:
    """What a group of measurements found.

    Args:
        timings: of the alternatives.
        notes: what could not be timed, and why.
    """

    timings: Sequence[Timing] = ()
    notes: Sequence[str] = ()

    def __add__(self, other: Results) -> Results:
        return Results([*self.timings, *other.timings], [*self.notes, *other.notes])


def interleaved(cases: Mapping[str, Case], rounds: int, title: str, *, seconds: float = math.inf) -> dict[str, float]:
    """Return the median milliseconds of each case, run in turn ``rounds`` times after one uncounted round.

    What else runs on the machine meets all of them alike. A turn of a short case is several calls, of which the first,
    which finds the caches as another case left them, is not counted: a model that serves runs after itself. After
    ``seconds`` no further round is begun, but one is counted in any case. An empty ``title`` shows no progress.
    """
    times: dict[str, list[float]] = {name: [] for name in cases}
    calls: dict[str, int] = {}
    begun = time.perf_counter()
    for done in track(range(rounds + 1), description=title, transient=True, disable=not title):
        if done > 1 and time.perf_counter() - begun > seconds:
            break
        for name, case in cases.items():
            turn = [_milliseconds(case) for _ in range(calls.get(name, 1))]
            if done:
                times[name] += turn[1:] or turn
            else:
                calls[name] = _CALLS_OF_SHORT_CASES if turn[0] < _SHORT_MS else 1
    return {name: statistics.median(t) for name, t in times.items()}


def _milliseconds(case: Case) -> float:
    start = time.perf_counter()
    result = case()
    taken = (time.perf_counter() - start) * 1e3
    del result
    return taken


def compared(group: str, cases: Mapping[str, Case], rounds: int, *, baseline: str) -> list[Timing]:
    """Time ``cases`` and set each against the one called ``baseline``."""
    medians = interleaved(cases, rounds, group)
    return [Timing(group, name, medians[name], medians[baseline] / medians[name]) for name in cases]


def machine(rounds: int, packages: Iterable[str]) -> dict[str, Any]:
    """Return what ran the measurements: processor, versions of packages, its own copy bandwidth and matrix rate."""
    source, target = torch.randn(16 * 2**20), torch.empty(16 * 2**20)
    matrix = torch.randn(1024, 1024)
    limits = interleaved({"copy": lambda: target.copy_(source), "matrix": lambda: matrix @ matrix}, rounds, "machine")
    return {
        "processor": platform.processor() or platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: package_version(name) for name in packages},
        "copy_gigabytes_per_second": 2 * source.nbytes / limits["copy"] / 1e6,
        "matrix_gigaflops": 2 * 1024**3 / limits["matrix"] / 1e6,
    }

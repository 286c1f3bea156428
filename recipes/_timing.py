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
from rich import get_console
from rich.progress import track

from lightning_qat.native.library import why_not_native

from ._provenance import package_version

#: What is timed; its result is freed before the next one starts.
Case = Callable[[], object]

#: A case whose first call takes less is called this many times a turn.
_SHORT_MS = 20.0
_CALLS_OF_SHORT_CASES = 4
#: More than a GPU's caches hold. Reading it also takes longer than Python needs to launch what is timed after it.
_FLUSHED_BYTES = 512 * 2**20

CPU = torch.device("cpu")


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
        moved: bytes that have to be read and written, whatever an alternative really moves.
        operations: multiplications and additions.
        gigabytes_per_second, gigaflops: of these two.
        of_copy, of_matrix: shares that they are of what the device itself reached, see :class:`Gauge`.
    """

    group: str
    name: str
    milliseconds: float
    ratio: float
    kept: float | None = None
    peak: float | None = None
    sqnr_db: float | None = None
    moved: int | None = None
    operations: int | None = None
    gigabytes_per_second: float | None = None
    gigaflops: float | None = None
    of_copy: float | None = None
    of_matrix: float | None = None


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


def interleaved(
    cases: Mapping[str, Case], rounds: int, title: str, *, seconds: float = math.inf, device: torch.device = CPU
) -> dict[str, float]:
    """Return the median milliseconds of each case, run in turn ``rounds`` times after one uncounted round.

    What else runs on the machine meets all of them alike. A turn of a short case is several calls, of which the first,
    which finds the caches as another case left them, is not counted: a model that serves runs after itself. After
    ``seconds`` no further round is begun, but one is counted in any case. An empty ``title`` shows no progress. On a
    GPU its own clock is read, before and after each call.
    """
    times: dict[str, list[float]] = {name: [] for name in cases}
    calls: dict[str, int] = {}
    measure = _gpu_clock(device) if device.type == "cuda" else _milliseconds
    hidden = not title or not get_console().is_terminal  # in a file, progress is empty lines
    begun = time.perf_counter()
    for done in track(range(rounds + 1), description=title, transient=True, disable=hidden):
        if done > 1 and time.perf_counter() - begun > seconds:
            break
        for name, case in cases.items():
            turn = [measure(case) for _ in range(calls.get(name, 1))]
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


def _gpu_clock(device: torch.device) -> Callable[[Case], float]:
    """Return what takes the milliseconds of a call on the GPU, with its caches flushed before.

    The flush keeps the GPU busy while Python launches the case, whose time is thus that of its kernels; a case that
    waits for the GPU, as a check of values does, has that in its time. It reads: what it wrote would have to leave the
    caches while the case runs, 50 MB beside the 36 of a 4-bit weight.
    """
    flushed = torch.zeros(_FLUSHED_BYTES // 8, dtype=torch.int64, device=device)

    def measure(case: Case) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        flushed.max()
        start.record()
        result = case()
        end.record()
        end.synchronize()
        del result
        return float(start.elapsed_time(end))

    return measure


def compared(
    group: str, cases: Mapping[str, Case], rounds: int, *, baseline: str, device: torch.device = CPU
) -> list[Timing]:
    """Time ``cases`` and set each against the one called ``baseline``."""
    medians = interleaved(cases, rounds, group, device=device)
    return [Timing(group, name, medians[name], medians[baseline] / medians[name]) for name in cases]


def rated(
    group: str,
    cases: Mapping[str, Case],
    conditions: Conditions,
    *,
    baseline: str,
    moved: Mapping[str, int],
    operations: int | None = None,
) -> list[Timing]:
    """Return :func:`compared` with rates, and their shares of what the device itself reached in the same turns.

    Args:
        group: what is measured.
        cases: the alternatives.
        conditions: how.
        baseline: the one that the others are set against.
        moved: alternative -> bytes that have to be read and written.
        operations: multiplications and additions of each.
    """
    gauge = conditions.gauge
    own = {} if gauge is None else gauge.cases(operations is not None)
    medians = interleaved({**cases, **own}, conditions.rounds, group, device=conditions.device)
    copied = gauge.copy_rate(medians) if gauge is not None else None
    multiplied = gauge.matrix_rate(medians) if gauge is not None and operations else None
    found = []
    for name in cases:
        milliseconds = medians[name]
        gigabytes = moved[name] / milliseconds / 1e6
        gigaflops = None if operations is None else operations / milliseconds / 1e6
        found.append(
            Timing(
                group,
                name,
                milliseconds,
                medians[baseline] / milliseconds,
                moved=moved[name],
                operations=operations,
                gigabytes_per_second=gigabytes,
                gigaflops=gigaflops,
                of_copy=gigabytes / copied if copied else None,
                of_matrix=gigaflops / multiplied if gigaflops and multiplied else None,
            )
        )
    return found


class Gauge:
    """A copy and a matrix product of the library, which are timed beside what is measured.

    What else runs on the machine thus slows them as it slows the cases.

    Args:
        device: where; matrices are float32 on a CPU and bfloat16 on a GPU.
        elements: of the tensor that is copied, of four bytes each; None is more than caches hold.
        side: of the square matrices; None is large enough for the full rate.
    """

    def __init__(self, device: torch.device, elements: int | None = None, side: int | None = None) -> None:
        on_gpu = device.type == "cuda"
        self.device = device
        self.source = torch.randn(elements or (64 if on_gpu else 16) * 2**20, device=device)
        self.target = torch.empty_like(self.source)
        side = side or (8192 if on_gpu else 2048)
        self.matrix = torch.randn(side, side, device=device).to(torch.bfloat16 if on_gpu else torch.float32)

    def cases(self, multiplies: bool = True) -> dict[str, Case]:
        """Return what is to be timed; the names are no alternative's."""
        copy: dict[str, Case] = {_COPY: lambda: self.target.copy_(self.source)}
        return copy | ({_MATRIX: lambda: self.matrix @ self.matrix} if multiplies else {})

    def copy_rate(self, medians: Mapping[str, float]) -> float:
        """Return gigabytes per second, read plus written."""
        return 2 * self.source.nbytes / medians[_COPY] / 1e6

    def matrix_rate(self, medians: Mapping[str, float]) -> float:
        """Return billions of operations per second."""
        return 2 * len(self.matrix) ** 3 / medians[_MATRIX] / 1e6


_COPY, _MATRIX = "the device's own copy", "the device's own matrix product"


@dataclass(frozen=True)
class Conditions:
    """How a group is measured.

    Args:
        rounds: times that each alternative runs.
        device: where.
        size: sides of the square tensors; None is :attr:`side`'s.
        gauge: of the device; None gives no shares.
    """

    rounds: int
    device: torch.device = CPU
    size: int | None = None
    gauge: Gauge | None = None

    @property
    def side(self) -> int:
        """Rows and columns of a tensor: 4096, or 8192 on a GPU, where it does not fit into caches either."""
        return self.size or (8192 if self.device.type == "cuda" else 4096)

    @property
    def dtype(self) -> torch.dtype:
        """What models are trained in there."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32


def machine(rounds: int, packages: Iterable[str], gauge: Gauge) -> dict[str, Any]:
    """Return what ran the measurements: device, processor, versions of packages, copy bandwidth and matrix rate."""
    medians = interleaved(gauge.cases(), rounds, "machine", device=gauge.device)
    return {
        "device": gauge.device.type,
        "gpu": gpu_facts(gauge.device),
        "processor": platform.processor() or platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "no_native_kernels": why_not_native(),
        "python": platform.python_version(),
        "versions": {name: package_version(name) for name in packages},
        "copy_gigabytes_per_second": gauge.copy_rate(medians),
        "matrix_gigaflops": gauge.matrix_rate(medians),
    }


def gpu_facts(device: torch.device) -> dict[str, Any] | None:
    """Return name, capability and size of a GPU, and None for a CPU."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "gigabytes": properties.total_memory / 1e9,
        "cuda": torch.version.cuda,
    }

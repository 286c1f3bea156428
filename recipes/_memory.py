"""Memory that PyTorch allocates on the CPU while something runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch.profiler import profile


@contextmanager
def memory_recorded() -> Iterator[profile]:
    """Record what is allocated and freed inside; on some machines the profiler would tell each of its stages."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with profile(profile_memory=True) as recorded:
        yield recorded


def kept_bytes(run: Callable[[], object]) -> int:
    """Return the memory that is still allocated when ``run`` is over and its result is held."""
    with memory_recorded() as recorded:
        result = run()
    allocated = sum(event.self_cpu_memory_usage for event in recorded.key_averages())
    del result
    return int(allocated)

"""What the tests of native kernels share: values that are hard, equality to the last bit, another processor."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from lightning_qat.native import build, library
from lightning_qat.native.library import Family

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SPECIAL = (0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-42, -3e38, 65504.0, 65520.0, 6e-8, 0.5, -1.0)
_WORDS = {4: torch.int32, 2: torch.int16}


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether all is equal, the sign of zeros too; one NaN is as good as another."""
    if a.dtype != b.dtype or a.shape != b.shape or a.stride() != b.stride():
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    nan, word = a.isnan(), _WORDS[a.element_size()]
    return torch.equal(nan, b.isnan()) and torch.equal(a.view(word)[~nan], b.view(word)[~nan])


@st.composite
def values(draw: st.DrawFn, counts: tuple[int, ...] = (1, 2, 7, 64, 65, 1023, 1025, 4099)) -> Tensor:
    """Return a flat tensor of normal values of some size, special ones among them or not."""
    count = draw(st.one_of(st.sampled_from(counts), st.integers(1, 3000)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    x = torch.randn(count, generator=generator) * draw(st.sampled_from((1.0, 1e-3, 1e-38, 1e-41, 1e30, 0.0)))
    where = torch.rand(count, generator=generator) < draw(st.sampled_from((0.0, 0.0, 0.01, 0.3)))
    x[where] = torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), (int(where.sum()),), generator=generator)]
    return x.to(draw(st.sampled_from(DTYPES)))


@contextlib.contextmanager
def fine_grained(threads: int) -> Iterator[None]:
    """Let small tensors go over so many threads."""
    before = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "GRAIN", 7)
        torch.set_num_threads(threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)


@contextlib.contextmanager
def another_processor(family: Family, folder: Path) -> Iterator[None]:
    """Compile ``family`` for the least of this architecture, without intrinsics, and use that."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIGHTNING_QAT_CACHE", str(folder / "cache"))
        patch.setattr(build, "_machine_flags", lambda: ("-DWITHOUT_INTRINSICS",))
        patch.setattr(family, "_functions", None)
        assert family.functions() is not None, family.reason
        yield

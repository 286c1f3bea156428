"""Tensors that the tests of several rooms draw."""

from __future__ import annotations

import math

import torch
from hypothesis import strategies as st
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LARGEST = torch.finfo(torch.float32).max
DENORMAL = 2.0**-149


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def channel_axes(x: Tensor, axis: int) -> tuple[int, ...]:
    return tuple(d for d in range(x.dim()) if d != axis % x.dim())


@st.composite
def batches(draw: st.DrawFn) -> tuple[Tensor, int]:
    """Return a tensor of 1 to 4 dimensions, any dtype, layout and magnitude, and an axis of it."""
    shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    dtype = draw(st.sampled_from(DTYPES))
    x = randn(*shape, seed=draw(st.integers(0, 2**16)))
    if dtype in (torch.float32, torch.float64, torch.bfloat16):
        x = x * 2.0 ** draw(st.integers(-140, 124))
    x = (x * draw(st.sampled_from((1.0, 0.0))) + draw(st.sampled_from((0.0, 1.0, -3.0)))).to(dtype)
    layout = draw(st.sampled_from(("plain", "reversed", "strided")))
    if layout == "reversed":
        x = x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim())))
    if layout == "strided":
        x = torch.stack((x, torch.full_like(x, math.nan)), dim=-1)[..., 0]
    return x, axis

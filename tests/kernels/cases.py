"""What the tests of fake quantization draw: tensors in all layouts, granularities, grids and odd values."""

from __future__ import annotations

import math
from dataclasses import dataclass
from math import prod

import torch
from hypothesis import strategies as st
from torch import Tensor

from lightning_qat.ops.fake_quantize import quant_range

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SPECIAL = (0.0, -0.0, math.nan, math.inf, -math.inf, 2.0**-149, -(2.0**-127), 3e38, -65504.0, 0.5, -1.5)


@dataclass(frozen=True)
class Case:
    """Arguments of the op, on the CPU and contiguous, with the layout that ``x`` is to have."""

    x: Tensor
    scale: Tensor
    zero_point: Tensor | None
    grid: tuple[int, int, int, int]
    layout: str

    def on(self, device: str) -> tuple[Tensor, Tensor, Tensor | None, int, int, int, int]:
        """Return the arguments on a device."""
        zero = None if self.zero_point is None else self.zero_point.to(device)
        return self.laid_out(self.x.to(device)), self.scale.to(device), zero, *self.grid

    def laid_out(self, t: Tensor) -> Tensor:
        """Return ``t`` in the layout of the case, with the same elements."""
        if self.layout == "reversed":
            order = tuple(reversed(range(t.dim())))
            return t.permute(order).contiguous().permute(order)
        if self.layout == "last" and t.dim() > 2:  # as channels_last does for 4 dimensions
            return t.movedim(1, -1).contiguous().movedim(-1, 1)
        if self.layout == "strided":
            return torch.stack((t, torch.full_like(t, math.nan)), dim=-1)[..., 0]
        return t


def within(shape: list[int], most: int) -> list[int]:
    """Return a shape of at most that many elements: each program takes the interpreter some milliseconds."""
    while prod(shape) > most:
        largest = shape.index(max(shape))
        shape = [*shape[:largest], shape[largest] * 2 // 3, *shape[largest + 1 :]]
    return shape


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Return arguments for the op: 1 to 4 dimensions, now and then longer than a tile."""
    shape = draw(st.lists(st.sampled_from((1, 2, 3, 4, 5, 7, 8, 16)), min_size=1, max_size=4))
    if draw(st.booleans()):
        shape[draw(st.integers(0, len(shape) - 1))] *= draw(st.sampled_from((33, 64, 129)))
    shape = within(shape, 6000)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    dtype = draw(st.sampled_from(DTYPES))
    size = 1.0 if dtype == torch.float16 else 2.0 ** draw(st.sampled_from((-120, -20, 0, 40, 110)))
    x = torch.randn(shape, generator=generator) * 20 * size
    flat = x.view(-1)
    for value in draw(st.lists(st.sampled_from(SPECIAL), max_size=4)):
        flat[int(torch.randint(len(flat), (1,), generator=generator))] = value
    axis, group, count = -1, 0, 1
    granularity = draw(st.sampled_from(("tensor", "channel", "channel", "group", "token")))
    if granularity == "channel":
        axis = draw(st.integers(0, len(shape) - 1))
        count = shape[axis]
    elif granularity != "tensor":
        row = shape[-1] if granularity == "token" else prod(shape[1:]) if len(shape) > 1 else shape[0]
        group = row if granularity == "token" else draw(st.sampled_from([d for d in range(1, row + 1) if row % d == 0]))
        count = x.numel() // group
    bits, symmetric = draw(st.sampled_from((2, 3, 4, 8, 16))), draw(st.booleans())
    scale = (torch.rand(count, generator=generator) + 0.05) * size * draw(st.sampled_from((0.3, 8.0)))
    scale = scale.to(draw(st.sampled_from((torch.float32, torch.float32, torch.float64, torch.bfloat16))))
    zero = None
    if not symmetric:
        kind = draw(st.sampled_from(("none", "int32", "int64", "float", "far")))
        zero = torch.randint(0, 2**bits, (count,), generator=generator) if kind != "none" else None
        if zero is not None and kind == "float":
            zero = zero + torch.rand(count, generator=generator)
        elif zero is not None and kind == "far":
            zero = (zero - 2**22 - 5) * 100
        elif kind == "int32" and zero is not None:
            zero = zero.to(torch.int32)
    layout = draw(st.sampled_from(("plain", "reversed", "last", "strided")))
    return Case(x.to(dtype), scale, zero, (*quant_range(bits, symmetric), axis, group), layout)


def same(actual: Tensor, expected: Tensor) -> bool:
    """Whether dtype, shape and every element are equal; NaN equals NaN, and a zero any zero."""
    actual, expected = actual.cpu(), expected.cpu()
    return (
        actual.dtype == expected.dtype
        and actual.shape == expected.shape
        and torch.equal(actual.isnan(), expected.isnan())
        and torch.equal(actual.nan_to_num(0, math.inf, -math.inf), expected.nan_to_num(0, math.inf, -math.inf))
    )

"""A sum, clamped, and its codes in C++ are those of PyTorch's operations, bit for bit, on any threads and processor."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native.bits import another_processor, fine_grained, same_bits, values
from torch import Tensor

from lightning_qat.native import residual as native
from lightning_qat.native.library import without_native
from lightning_qat.ops import residual
from lightning_qat.ops.integer_conv import CodeGrid
from lightning_qat.ops.integer_linear import CodeRange
from lightning_qat.ops.residual import add_clamped, add_quantized

pytestmark = pytest.mark.skipif(native._FAMILY.functions() is None, reason="no C++ compiler")

BOUNDS = ((-math.inf, math.inf), (0.0, math.inf), (0.0, 6.0), (-0.3, 0.4), (-math.inf, -0.0), (1.0, 1.0))
CODES = ((0, 0, 255), (128, 1, 255), (128, 120, 135), (7, 0, 15), (255, 0, 255))

Case = tuple[Tensor, Tensor, tuple[float, float], CodeGrid, bool]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    left, right = (draw(values((1, 2, 15, 64, 65, 2047, 2049, 6000))).float() for _ in range(2))
    for side in (left, right):
        side[side.isnan()] = math.nan  # float16's may have every bit set, which PyTorch's quantization reads as a code
    count = min(len(left), len(right))
    scale = torch.tensor(draw(st.sampled_from((0.0317, 1.0, 1e-39, 3e-4, 1e30)))).item()
    grid = CodeGrid(scale, CodeRange(*draw(st.sampled_from(CODES))))
    return left[:count], right[:count], draw(st.sampled_from(BOUNDS)), grid, draw(st.booleans())


def everything(left: Tensor, right: Tensor, bounds: tuple[float, float], grid: CodeGrid, fresh: bool) -> list[Tensor]:
    """Return what the functions give, and what they left of ``left``."""
    first, second = left.clone(), left.clone()
    found = [add_clamped(first, right, *bounds, fresh=fresh), *add_quantized(second, right, grid, *bounds, fresh=fresh)]
    return found if fresh else [*found, first, second]


def assert_same(case: Case) -> None:
    found = everything(*case)
    with without_native():
        expected = everything(*case)
    for place, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert same_bits(one, other), place


@settings(max_examples=150, deadline=None)
@given(cases(), st.integers(1, 4))
def test_bits_are_those_of_pytorchs_operations(case: Case, threads: int) -> None:
    with fine_grained(threads):
        assert_same(case)


@settings(max_examples=25, deadline=None)
@given(cases())
def test_another_processor_gets_the_same_bits(tmp_path_factory: pytest.TempPathFactory, case: Case) -> None:
    with another_processor(native._FAMILY, tmp_path_factory.getbasetemp()):
        assert_same(case)


def test_the_kernel_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    left, right = torch.tensor([[1.0, -3.0], [math.nan, 2.0]]), torch.ones(2, 2)
    monkeypatch.setattr(residual, "quantize_unsigned", lambda *_: pytest.fail("a second pass"))
    total, codes = add_quantized(left, right, CodeGrid(0.5, CodeRange(3, 0, 255)), 0.0, 2.5, fresh=True)
    assert total is left
    assert codes.tolist() == [[7, 3], [3, 8]]


def test_the_sum_may_lie_in_either_side() -> None:
    for place in (0, 1):
        sides = [torch.randn(5000), torch.randn(5000)]
        expected = torch.relu(sides[0] + sides[1])
        assert native.residual_add(*sides, 0.0, math.inf, sides[place])
        assert torch.equal(sides[place], expected)

"""Vector-wise int8 in C++ gives the bits of PyTorch's operations, on any number of threads and any processor."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native.bits import another_processor, fine_grained, same_bits, values
from tensors import randn
from torch import Tensor

from lightning_qat.native import vectorwise as native
from lightning_qat.native.library import without_native
from lightning_qat.ops import vectorwise as ops
from lightning_qat.ops.vectorwise_codes import vectorwise_codes_op

pytestmark = pytest.mark.skipif(
    native._FAMILY.functions() is None or native._find("quantize", torch.ones(1)) is None,
    reason="no C++ compiler, or one without float16",
)

#: The smallest is 0.0 in float16, where everything is an outlier.
THRESHOLDS = st.sampled_from((0.0, 0.0, 1e-9, 0.5, 2.0, 6.0, 60000.0, float("inf")))


def everything(x: Tensor, threshold: float) -> list[Tensor]:
    """Return what all ops give for a matrix."""
    found = list(ops.vectorwise_quantize_op(x, threshold))
    codes, absmax, _ = found
    found += [ops.dequantize_vectorwise(codes, absmax, dtype=dtype) for dtype in (torch.float32, x.dtype)]
    found.append(ops.vectorwise_fake_quantize_op(x, threshold))
    found += [vectorwise_codes_op(x, scale) for scale in (absmax, absmax * 0.5, torch.zeros_like(absmax))]
    return found


def assert_same(x: Tensor, threshold: float) -> None:
    found = everything(x, threshold)
    with without_native():
        expected = everything(x, threshold)
    for place, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert same_bits(one, other), place


@settings(max_examples=150, deadline=None)
@given(values(), st.integers(1, 40), THRESHOLDS, st.booleans(), st.integers(1, 4))
def test_bits_are_those_of_pytorchs_operations(
    x: Tensor, rows: int, threshold: float, transposed: bool, threads: int
) -> None:
    rows = min(rows, len(x))
    matrix = x[: len(x) // rows * rows].view(rows, -1)
    with fine_grained(threads):
        assert_same(matrix.t() if transposed else matrix, threshold)


@settings(max_examples=25, deadline=None)
@given(values(), THRESHOLDS)
def test_another_processor_gets_the_same_bits(
    tmp_path_factory: pytest.TempPathFactory, x: Tensor, threshold: float
) -> None:
    with another_processor(native._FAMILY, tmp_path_factory.getbasetemp()):
        assert_same(x.view(1, -1), threshold)


def test_every_float16_is_rounded_to_as_pytorch_rounds() -> None:
    """Between any two neighbours: both, what lies in the middle, and what is beside the middle."""
    halves = torch.arange(0, 0x7C00, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    middles = (halves[:-1] + halves[1:]) / 2
    x = torch.cat([halves, middles, *(torch.nextafter(middles, torch.tensor(side)) for side in (0.0, 1e9))])
    assert_same(torch.stack((x, -x)), 0.0)
    rows = torch.stack((x, torch.full_like(x, 65504.0)), dim=1)
    assert same_bits(ops.vectorwise_quantize_op(rows[:, :1].contiguous(), 0.0)[1], x.half().float())


def test_what_there_is_no_kernel_for() -> None:
    for x in (randn(2, 4).double(), torch.empty(0, 4), torch.empty(4, 0)):
        codes, absmax = torch.empty(x.shape, dtype=torch.int8), torch.empty(len(x))
        assert not native.quantize(x, codes, absmax, torch.zeros(4, dtype=torch.bool), None)
        assert not native.codes_of(x, absmax, codes)

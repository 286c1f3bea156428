"""Stored bytes to scaled values in C++: see ``tests/ops/test_lookup_cpu.py``; here, what only the kernel can do."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native.bits import DTYPES, another_processor, fine_grained, same_bits
from tensors import randn
from torch import Tensor

from lightning_qat.native import lookup as native

pytestmark = pytest.mark.skipif(native._FAMILY.functions() is None, reason="no C++ compiler")

SINGLE = randn(256, seed=3)
BYTE = torch.arange(256)
PAIRS = torch.stack((SINGLE[BYTE >> 4], SINGLE[BYTE & 15]), 1).view(torch.float64).view(-1)
CASES = (st.integers(1, 3000), st.integers(1, 700), st.booleans(), st.booleans(), st.sampled_from(DTYPES))


def compare(count: int, run: int, pairs: bool, shifted: bool, dtype: torch.dtype) -> None:
    """Raise ``AssertionError`` unless values are those of plain indexing; runs may begin in the middle of a byte."""
    generator = torch.Generator().manual_seed(count + run)
    codes = torch.randint(0, 16 if pairs else 256, (count,), generator=generator, dtype=torch.uint8)
    at = torch.arange(count) // run
    scale = randn(int(at[-1]) + 1, seed=1) * 2.0 ** (count % 60 - 30)
    zero = randn(len(scale), seed=2).round() if shifted else None
    padded = torch.cat((codes, codes.new_zeros(count % 2)))
    stored, result = padded[::2] << 4 | padded[1::2] if pairs else codes, torch.full((count,), torch.nan, dtype=dtype)
    assert native.write_lookups(PAIRS if pairs else SINGLE, stored, scale, zero, run, result)
    assert same_bits(result, expected(codes, scale, zero, at, dtype))


def expected(codes: Tensor, scale: Tensor, zero: Tensor | None, at: Tensor, dtype: torch.dtype) -> Tensor:
    values = SINGLE[codes.long()] if zero is None else SINGLE[codes.long()] - zero[at]
    return (values * scale[at]).to(dtype)


@settings(max_examples=200, deadline=None)
@given(*CASES, st.integers(1, 4))
def test_values(count: int, run: int, pairs: bool, shifted: bool, dtype: torch.dtype, threads: int) -> None:
    with fine_grained(threads):
        compare(count, run, pairs, shifted, dtype)


@settings(max_examples=40, deadline=None)
@given(*CASES)
def test_another_processor_gets_the_same_bits(
    tmp_path_factory: pytest.TempPathFactory, count: int, run: int, pairs: bool, shifted: bool, dtype: torch.dtype
) -> None:
    with another_processor(native._FAMILY, tmp_path_factory.getbasetemp()):
        compare(count, run, pairs, shifted, dtype)


def test_what_there_is_no_kernel_for() -> None:
    codes, scale = torch.zeros(8, dtype=torch.uint8), torch.ones(1)
    for result in (torch.empty(8, dtype=torch.float64), torch.empty(8, device="meta")):
        assert not native.write_lookups(SINGLE, codes, scale, None, 8, result)

"""Bytes to scaled values by table: the values of plain indexing, on any number of threads."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensors import DTYPES, randn
from torch import Tensor

from lightning_qat.native.library import without_native
from lightning_qat.ops import lookup_cpu
from lightning_qat.ops.chunks import CHUNK
from lightning_qat.ops.lookup_cpu import write_lookups

WAYS = pytest.mark.parametrize("way", [nullcontext, without_native])
SINGLE = randn(256, seed=3)
BYTE = torch.arange(256)
PAIRS = torch.stack((SINGLE[BYTE >> 4], SINGLE[BYTE & 15]), 1).view(torch.float64).view(-1)


def plain(codes: Tensor, scale: Tensor, zero: Tensor | None, run: int, dtype: torch.dtype) -> Tensor:
    """One element at a time, as the docstring says it."""
    at = torch.arange(len(codes)) // run
    values = SINGLE[codes.long()] if zero is None else SINGLE[codes.long()] - zero[at]
    return (values * scale[at]).to(dtype)


@settings(max_examples=150, deadline=None)
@given(
    count=st.sampled_from((0, 1, 2, 7, 999, CHUNK - 1, CHUNK, CHUNK + 1, 100_001, 262_144)),
    run=st.sampled_from((1, 2, 3, 64, 100, 4096, 10_000, CHUNK, CHUNK + 2, 70_000)) | st.integers(1, 300_000),
    pairs=st.booleans(),
    shifted=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    parts=st.integers(1, 5),
    compiled=st.booleans(),
)
def test_values_are_those_of_plain_indexing(
    count: int, run: int, pairs: bool, shifted: bool, dtype: torch.dtype, parts: int, compiled: bool
) -> None:
    pairs = pairs and (run % 2 == 0 or run >= count)
    generator = torch.Generator().manual_seed(count + run)
    codes = torch.randint(0, 16 if pairs else 256, (count,), generator=generator, dtype=torch.uint8)
    padded = torch.cat((codes, codes.new_zeros(count % 2)))
    runs = -(-count // run)
    scale, zero = randn(runs, seed=1), randn(runs, seed=2).round() if shifted else None
    result = torch.full((count,), torch.nan, dtype=dtype)
    with pytest.MonkeyPatch.context() as patch, nullcontext() if compiled else without_native():
        patch.setattr(lookup_cpu, "_LEAST_ELEMENTS", 1000)
        patch.setattr(torch, "get_num_threads", lambda: parts)
        stored = padded[::2] << 4 | padded[1::2] if pairs else codes
        write_lookups(PAIRS if pairs else SINGLE, stored, scale, zero, run, result)
    assert torch.equal(result, plain(codes, scale, zero, run, dtype))


@WAYS
def test_nothing_is_written_beyond_the_result(way) -> None:
    memory = torch.full((10_003,), 7.0)
    codes = torch.zeros(10_001, dtype=torch.uint8)
    with way():
        write_lookups(SINGLE, codes, torch.ones(157), None, 64, memory[1:10_002])
    assert memory[0] == 7.0 == memory[-1]
    assert bool((memory[1:-1] == SINGLE[0]).all())


@WAYS
def test_scales_that_want_a_gradient_and_inference_mode(way, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup_cpu, "_LEAST_ELEMENTS", 1000)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    codes, scale = torch.arange(4096).to(torch.uint8), torch.ones(64, requires_grad=True)
    expected = plain(codes, scale.detach(), None, 64, torch.float32)
    for mode in (torch.enable_grad, torch.inference_mode):
        with mode(), way():
            result = torch.empty(4096)
            write_lookups(SINGLE, codes, scale, None, 64, result)
        assert torch.equal(result, expected)

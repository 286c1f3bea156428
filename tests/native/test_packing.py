"""Bytes of packed codes in C++: the stream of the docstring, and PyTorch's operations, on any number of threads."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native.bits import another_processor, fine_grained

from lightning_qat.native import packing as native
from lightning_qat.native.library import without_native
from lightning_qat.ops.nibbles import pack_nibbles, unpack_nibbles
from lightning_qat.ops.packing import pack_bits, unpack_bits

pytestmark = pytest.mark.skipif(native._FAMILY.functions() is None, reason="no C++ compiler")

CASES = (
    st.integers(2, 7),
    st.sampled_from((0, 1, 2, 7, 8, 9, 63, 64, 65, 1001)) | st.integers(0, 3000),
    st.booleans(),
    st.sampled_from((torch.int8, torch.int16, torch.int64)),
)


def same(bits: int, count: int, signed: bool, dtype: torch.dtype) -> None:
    """Raise ``AssertionError`` unless bytes are those of a number of that many bits, and of PyTorch's operations."""
    offset = 2 ** (bits - 1) if signed else 0
    generator = torch.Generator().manual_seed(count)
    codes = (torch.randint(0, 2**bits, (2, count), generator=generator) - offset).to(dtype).t()[:, 0]
    packed = pack_bits(codes, bits, signed=signed)
    stream = sum(code + offset << place * bits for place, code in enumerate(codes.tolist()))
    assert bytes(packed.tolist()) == stream.to_bytes(-(-count * bits // 8), "little")
    found = unpack_bits(packed, bits, (count, 1), signed=signed)
    with without_native():
        assert torch.equal(pack_bits(codes, bits, signed=signed), packed)
        expected = unpack_bits(packed, bits, (count, 1), signed=signed)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)
    assert torch.equal(found.view(-1).to(dtype), codes)


@settings(max_examples=200, deadline=None)
@given(*CASES, st.integers(1, 4))
def test_a_stream(bits: int, count: int, signed: bool, dtype: torch.dtype, threads: int) -> None:
    with fine_grained(threads):
        same(bits, count, signed, dtype)


@settings(max_examples=40, deadline=None)
@given(*CASES)
def test_another_processor_gets_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, bits: int, count: int, signed: bool, dtype: torch.dtype
) -> None:
    with another_processor(native._FAMILY, tmp_path_factory.getbasetemp()):
        same(bits, count, signed, dtype)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 300), st.sampled_from(("nf4", "fp4")), st.booleans(), st.integers(1, 4))
def test_nibbles(count: int, codebook: str, strided: bool, threads: int) -> None:
    codes = torch.randint(0, 16, (count,), generator=torch.Generator().manual_seed(count), dtype=torch.uint8)
    if strided:
        codes = torch.stack((codes, codes + 1), dim=1)[:, 0]
    with fine_grained(threads):
        packed = pack_nibbles(codes, codebook)
        found = unpack_nibbles(packed, (count, 1))
    with without_native():
        assert torch.equal(packed, pack_nibbles(codes, codebook))
        assert torch.equal(found, unpack_nibbles(packed, (count, 1)))
    assert torch.equal(found.view(-1), codes)


def test_codes_out_of_range_are_told_as_before() -> None:
    for codes in (torch.tensor([16]), torch.tensor([300], dtype=torch.int16), torch.tensor([-1], dtype=torch.int8)):
        with pytest.raises(ValueError, match="stores 0 to 15"):
            pack_bits(codes, 4, signed=False)

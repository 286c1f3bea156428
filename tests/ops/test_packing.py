"""Bit streams against Python's own integers, and back."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_qat.ops import packing
from lightning_qat.ops.affine import codes_dtype
from lightning_qat.ops.packing import pack_bits, packed_size, unpack_bits


def codes_of(bits: int, signed: bool, shape: list[int], seed: int) -> Tensor:
    """Return random codes with both ends among them."""
    low = -(2 ** (bits - 1)) if signed else 0
    codes = torch.randint(low, low + 2**bits, shape, generator=torch.Generator().manual_seed(seed))
    codes.view(-1)[:2] = torch.tensor([low, low + 2**bits - 1])[: codes.numel()]
    return codes.to(codes_dtype(bits, signed))


@given(st.integers(2, 16), st.booleans(), st.lists(st.integers(0, 13), max_size=3), st.integers(0, 999), st.booleans())
@settings(max_examples=300, deadline=None)
def test_stream_is_one_long_little_endian_number(
    bits: int, signed: bool, shape: list[int], seed: int, strided: bool
) -> None:
    codes = codes_of(bits, signed, shape, seed)
    if strided and codes.dim():
        codes = codes.repeat_interleave(2, dim=-1)[..., ::2]
    before = codes.clone()
    with mock.patch.object(packing, "_CHUNK_RUNS", 3):
        packed = pack_bits(codes, bits, signed=signed)
        unpacked = unpack_bits(packed, bits, codes.shape, signed=signed)
    width, offset = (bits if bits <= 8 else 16), (2 ** (bits - 1) if signed else 0)
    number = sum((code + offset) << (i * width) for i, code in enumerate(codes.flatten().tolist()))
    assert packed.dtype == torch.uint8
    assert bytes(packed.tolist()) == number.to_bytes(packed_size(codes.numel(), bits), "little")
    assert torch.equal(unpacked, before)
    assert unpacked.dtype == codes.dtype
    assert torch.equal(codes, before)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_no_byte_is_wasted(bits: int) -> None:
    for count in (0, 1, 7, 8, 9, 1001):
        packed = pack_bits(torch.zeros(count, dtype=torch.uint8), bits, signed=False)
        assert packed.numel() == packed.untyped_storage().nbytes() == (count * bits + 7) // 8


def test_low_nibble_is_the_even_element() -> None:
    assert pack_bits(torch.tensor([1, 2, 3]), 4, signed=False).tolist() == [0x21, 0x03]
    assert pack_bits(torch.tensor([-8, 7]), 4, signed=True).tolist() == [0xF0]


@pytest.mark.parametrize("bits", [4, 5, 8, 12])
def test_results_never_share_memory_with_inputs(bits: int) -> None:
    codes = codes_of(bits, False, [16], 0)
    packed = pack_bits(codes, bits, signed=False)
    unpacked = unpack_bits(packed, bits, [16], signed=False)
    kept_codes, kept_packed = codes.clone(), packed.clone()
    packed.zero_()
    assert torch.equal(codes, kept_codes)
    assert torch.equal(unpacked, kept_codes)
    unpacked.zero_()
    assert not torch.equal(packed, kept_packed)


@pytest.mark.parametrize(
    ("codes", "bits", "signed", "message"),
    [
        (torch.tensor([8]), 4, True, "from 8 to 8; bits=4, signed=True stores -8 to 7"),
        (torch.tensor([-1, 3]), 4, False, "from -1 to 3; bits=4, signed=False stores 0 to 15"),
        (torch.tensor([300]), 8, False, "stores 0 to 255"),
        (torch.tensor([2**20]), 16, True, "stores -32768 to 32767"),
        (torch.tensor([0]), 1, True, "bits=1 is not allowed; use 2 to 16"),
        (torch.tensor([0]), 17, True, "use 2 to 16"),
        (torch.tensor([0.0]), 4, True, "torch.float32; use an integer dtype"),
    ],
)
def test_pack_refuses(codes: Tensor, bits: int, signed: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack_bits(codes, bits, signed=signed)


@pytest.mark.parametrize(
    "packed", [torch.zeros(3, dtype=torch.uint8), torch.zeros(2), torch.zeros(1, 2, dtype=torch.uint8)]
)
def test_unpack_refuses(packed: Tensor) -> None:
    with pytest.raises(ValueError, match=r"shape \(3, 1\) with bits=4 take torch.uint8 of shape \(2,\)"):
        unpack_bits(packed, 4, (3, 1), signed=True)

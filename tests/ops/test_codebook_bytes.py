"""Codes, scales and values of the codebook formats against the installed bitsandbytes, byte by byte."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops import bitsandbytes_witness as witness

from lightning_qat.ops.codebook import (
    block_absmax,
    codebook_dequantize_op,
    codebook_quantize_op,
    dequantize_codebook,
    fake_quantize_codebook,
    pack_nibbles,
    quantize_codebook,
    unpack_nibbles,
)
from lightning_qat.ops.codebook_tables import CODEBOOK_BITS, thresholds

CASES_EACH = 40


@pytest.mark.parametrize("name", list(CODEBOOK_BITS))
@pytest.mark.parametrize("block_size", [64, 4096])
def test_the_witness_is_right(name: str, block_size: int) -> None:
    """Its codes stand for the nearest values of its table, by a search in float64 that knows nothing of blocks."""
    x = torch.randn(3 * block_size + 17, generator=torch.Generator().manual_seed(block_size))
    stored, absmax = witness.quantize(x, name, block_size)
    codes = stored if name == "dynamic_tree" else witness.split(stored, len(x))
    values = witness.values(codes, absmax, name, block_size).double()
    for block in range(4):
        part = slice(block * block_size, (block + 1) * block_size)
        assert absmax[block] == x[part].abs().max()
        errors = (x[part, None].double() - witness.table(name).double() * absmax[block].double()).abs()
        # The 8-bit quantizer takes what is nearest to the middle of a step, up to 1/65535 away.
        slack = (2 / 65535 if name == "dynamic_tree" else 1e-6) * float(absmax[block])
        assert bool(((x[part] - values[part]).abs() <= errors.amin(1) + slack).all())


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(("nf4", "fp4")),
    st.sampled_from(witness.BLOCK_SIZES),
    st.sampled_from(witness.DTYPES),
    st.integers(0, 2**32 - 1),
)
def test_4_bit_bytes_are_those_of_bitsandbytes(name: str, block_size: int, dtype: torch.dtype, seed: int) -> None:
    _compare(name, block_size, dtype, seed)


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 300) | st.sampled_from((1024, 4096)), st.sampled_from(witness.DTYPES), st.integers(0, 2**32 - 1))
def test_8_bit_bytes_are_those_of_bitsandbytes(block_size: int, dtype: torch.dtype, seed: int) -> None:
    _compare("dynamic_tree", block_size, dtype, seed)


def _compare(name: str, block_size: int, dtype: torch.dtype, seed: int) -> None:
    limits = thresholds(name, "cpu", "cpu")
    for x in witness.samples(seed, CASES_EACH, min(3 * block_size, 5000) + 1, dtype, limits):
        expected, expected_absmax = witness.quantize(x, name, block_size)
        stored, absmax = codebook_quantize_op(x, None, name, block_size, "cpu")
        assert torch.equal(absmax, expected_absmax)
        assert torch.equal(stored, expected)
        assert torch.equal(block_absmax(x, block_size, codebook=name), expected_absmax)
        codes = quantize_codebook(x, absmax, codebook=name, block_size=block_size)
        assert torch.equal(pack_nibbles(codes, name) if CODEBOOK_BITS[name] == 4 else codes, expected)
        values = witness.values(codes, absmax, name, block_size)
        assert torch.equal(codebook_dequantize_op(stored, absmax, len(x), name, block_size, torch.float32), values)
        fake = fake_quantize_codebook(x, absmax, codebook=name, block_size=block_size)
        assert torch.equal(fake, values.to(dtype))


@pytest.mark.parametrize("name", list(CODEBOOK_BITS))
def test_a_large_tensor(name: str) -> None:
    """More than the pieces of the kernel, in which a short one ends."""
    x = torch.randn(1001, 333, generator=torch.Generator().manual_seed(1))
    expected, expected_absmax = witness.quantize(x, name, 64)
    stored, absmax = codebook_quantize_op(x, None, name, 64, "cpu")
    assert torch.equal(stored, expected)
    assert torch.equal(absmax, expected_absmax)


@pytest.mark.parametrize("name", list(CODEBOOK_BITS))
def test_strides_do_not_matter(name: str) -> None:
    x = torch.randn(6, 50, 7).permute(2, 0, 1)[:, ::2]
    expected, absmax = witness.quantize(x.contiguous(), name, 64)
    codes = quantize_codebook(x, absmax, codebook=name, block_size=64)
    assert codes.shape == x.shape
    assert torch.equal(pack_nibbles(codes, name) if CODEBOOK_BITS[name] == 4 else codes.view(-1), expected)
    fake = fake_quantize_codebook(x, absmax, codebook=name, block_size=64)
    assert torch.equal(fake, dequantize_codebook(codes, absmax, codebook=name, block_size=64))


@pytest.mark.parametrize("count", [0, 1, 2, 7, 64, 65])
def test_nibbles_are_where_bitsandbytes_has_them(count: int) -> None:
    codes = torch.randint(0, 16, (count,), dtype=torch.uint8)
    packed = pack_nibbles(codes)
    assert packed.shape == ((count + 1) // 2,)
    assert torch.equal(witness.split(packed, count), codes)
    assert torch.equal(unpack_nibbles(packed, (count,)), codes)
    with pytest.raises(ValueError, match=r"take 9 of torch\.uint8"):
        unpack_nibbles(packed, (17,))


def test_a_short_last_block_of_zeros_has_the_absmax_that_bitsandbytes_stores() -> None:
    x = torch.zeros(70)
    _, expected = witness.quantize(x, "nf4", 64)
    assert expected.tolist() == [0.0, pytest.approx(1e-38)]
    assert torch.equal(block_absmax(x, 64, codebook="nf4"), expected)
    assert torch.equal(block_absmax(x, 64, codebook="nf4", rule="cuda"), torch.zeros(2))
    assert torch.equal(block_absmax(x, 64, codebook="dynamic_tree"), torch.zeros(2))
    assert torch.equal(block_absmax(x, 64), torch.zeros(2))

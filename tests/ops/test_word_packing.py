"""Words of 32 bits: the place of every bit, checked one by one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_qat.ops.word_packing import AWQ_ORDER, pack_awq_words, pack_words, unpack_awq_words, unpack_words


def codes(rows: int, columns: int, bits: int) -> Tensor:
    return torch.randint(0, 2**bits, (rows, columns), generator=torch.Generator().manual_seed(rows + columns))


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 5), columns=st.integers(1, 70), bits=st.integers(2, 8))
def test_every_bit_has_its_place(rows: int, columns: int, bits: int) -> None:
    given_codes = codes(rows, columns, bits)
    words = pack_words(given_codes, bits)
    assert words.dtype == torch.int32
    assert words.shape == (rows, -(-columns * bits // 32))
    for row in range(rows):
        stream = sum(int(c) << (bits * i) for i, c in enumerate(given_codes[row]))
        expected = [(stream >> (32 * i)) & 0xFFFFFFFF for i in range(words.shape[1])]
        assert [int(w) & 0xFFFFFFFF for w in words[row]] == expected
    assert torch.equal(unpack_words(words, bits, columns).long(), given_codes)


def test_transposed_codes_are_packed_as_they_are_seen() -> None:
    given_codes = codes(8, 16, 4)
    assert torch.equal(pack_words(given_codes.t(), 4), pack_words(given_codes.t().contiguous(), 4))
    assert torch.equal(unpack_words(pack_words(given_codes, 4).t().contiguous().t(), 4, 16).long(), given_codes)


def test_words_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="2 words of 32 bits a row do not hold 32 codes of 4 bits"):
        unpack_words(torch.zeros(3, 2, dtype=torch.int32), 4, 32)


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 5), words=st.integers(1, 6))
def test_awq_nibbles(rows: int, words: int) -> None:
    given_codes = codes(rows, words * 8, 4)
    packed = pack_awq_words(given_codes)
    for i, column in enumerate(AWQ_ORDER):
        assert torch.equal((packed >> (4 * i)) & 15, given_codes[:, column::8].to(torch.int32))
    assert torch.equal(unpack_awq_words(packed).long(), given_codes)

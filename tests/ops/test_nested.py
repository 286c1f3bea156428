"""Nested scales against the installed bitsandbytes, byte by byte."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops import bitsandbytes_witness as witness
from tensors import randn

from lightning_qat.ops.codebook import block_absmax
from lightning_qat.ops.codebook_tables import thresholds
from lightning_qat.ops.nested import NestedScale, nest, unnest


def test_the_witness_is_right() -> None:
    """Its codes give back the scales to what a step of the map can miss."""
    x = randn(64 * 700)
    codes, absmax, offset = witness.nest(x, "nf4", 64)
    scales = x.view(-1, 64).abs().amax(1)
    assert offset == scales.mean()
    stored = witness.values(codes, absmax, "dynamic_tree", 256) + offset
    # Neighbours of the map are up to 0.0141 apart, and the rule may miss the nearest by 2/65535.
    assert float(((stored - scales).abs() / absmax.repeat_interleave(256)[:700]).max()) <= 0.0141 / 2 + 2 / 65535
    assert absmax[0] == (scales[:256] - offset).abs().max()


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(("nf4", "fp4")),
    st.sampled_from((32, 64, 128)),
    st.sampled_from(witness.DTYPES),
    st.integers(0, 2**32 - 1),
)
def test_bytes_are_those_of_bitsandbytes(name: str, block_size: int, dtype: torch.dtype, seed: int) -> None:
    for x in witness.samples(seed, 12, block_size * 600, dtype, thresholds(name, "cpu", "cpu")):
        expected = witness.nest(x, name, block_size)
        nested = nest(block_absmax(x, block_size, codebook=name))
        for ours, theirs in zip(nested, expected, strict=True):
            assert torch.equal(ours, theirs)
            assert ours.dtype == theirs.dtype
        values = witness.values(expected[0], expected[1], "dynamic_tree", 256) + expected[2]
        # The sum of 600 blocks of 3e38 overflows; bitsandbytes stores the infinite mean, too.
        torch.testing.assert_close(unnest(nested), values, rtol=0, atol=0, equal_nan=True)


def test_shape_is_kept_and_nothing_is_nothing() -> None:
    nested = nest(torch.rand(4, 3))
    assert nested.codes.shape == unnest(nested).shape == (4, 3)
    empty = nest(torch.empty(0))
    assert [t.numel() for t in empty] == [0, 0, 1]
    assert unnest(empty).shape == (0,)


def test_the_cuda_rule_is_another_one() -> None:
    absmax = torch.rand(100_000)
    assert isinstance(nest(absmax), NestedScale)
    share = float((nest(absmax).codes != nest(absmax, "cuda").codes).float().mean())
    assert 0 < share < 0.01


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"torch\.float16"):
        nest(torch.ones(1, dtype=torch.float16))
    with pytest.raises(ValueError, match="rule='gpu'"):
        nest(torch.ones(1), "gpu")

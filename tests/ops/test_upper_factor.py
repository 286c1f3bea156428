"""The factor against its meaning, and its two ways of gathering what is decomposed against each other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.test_gptq import gram_of

from lightning_qat.native.library import without_native
from lightning_qat.native.upper_factor import gather_upper
from lightning_qat.ops import upper_factor as module
from lightning_qat.ops.upper_factor import inverse_of_upper, upper_factor


@pytest.mark.parametrize("size", [1, 2, 7, 64, 256, 300, 513])
def test_the_factor_is_upper_and_its_square_the_matrix(size: int) -> None:
    gram = gram_of(size)
    given_ = gram.clone()
    upper = upper_factor(gram, gram.diagonal())
    assert torch.equal(gram, given_)
    assert upper.dtype == torch.float32
    assert torch.equal(upper, upper.triu())
    assert bool((upper.diagonal() > 0).all())
    square = upper.double() @ upper.double().t()
    torch.testing.assert_close(square, gram.double(), rtol=0, atol=1e-6 * float(gram.max()))
    # The inverse is GPTQ's own factor.
    inverse = inverse_of_upper(upper).double()
    torch.testing.assert_close(
        inverse.t() @ inverse @ gram.double(), torch.eye(size, dtype=torch.float64), rtol=0, atol=2e-4
    )


@given(size=st.integers(1, 90), block=st.integers(1, 100), seed=st.integers(0, 9), native=st.booleans())
@settings(max_examples=40, deadline=None)
def test_order_diagonal_unit_and_blocks(size: int, block: int, seed: int, native: bool) -> None:
    gram, generator = gram_of(size, seed), torch.Generator().manual_seed(seed)
    order, unit = torch.randperm(size, generator=generator), gram.diagonal().mean()
    diagonal = gram.diagonal()[order] / unit + 0.5
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BLOCK", block)
        if native:
            found = upper_factor(gram, diagonal, order, unit)
        else:
            with without_native():
                found = upper_factor(gram, diagonal, order, unit)
    matrix = (gram / unit)[order][:, order]
    matrix.diagonal().copy_(diagonal)
    expected = torch.linalg.cholesky(matrix.double().flip(0, 1)).flip(0, 1)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("size", [1, 5, 17, 200])
def test_what_is_gathered_has_the_same_bits(size: int) -> None:
    gram, order = gram_of(size), torch.randperm(size)
    unit = gram.diagonal().mean()
    for matrix in (gram, torch.stack((gram, gram), dim=-1)[..., 0]):
        for arguments in ((order, unit), (None, None), (order, None), (None, unit)):
            found = gather_upper(matrix, *arguments)
            if found is None:
                pytest.skip("nothing is compiled here")
            with without_native():
                expected = module._gathered(matrix, *arguments)
            assert torch.equal(found.triu(), expected.triu())
    assert gather_upper(gram.double(), order, None) is None


def test_huge_inputs_leave_the_factor_of_the_others_exact() -> None:
    """As language models have them: one input is a thousand times the others, which float32 alone would not survive."""
    gram = gram_of(300)
    gram[3] *= 3e3
    gram[:, 3] *= 3e3
    expected = torch.linalg.cholesky(torch.linalg.inv(gram.double()), upper=True)
    found = inverse_of_upper(upper_factor(gram, gram.diagonal())).double()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6 * float(expected.max()))


@pytest.mark.parametrize("what", ["negative", "nan", "inf", "singular"])
@pytest.mark.parametrize("size", [8, 300])
def test_what_has_no_inverse_gives_none(what: str, size: int) -> None:
    for at in (0, 2, size - 1):
        gram = torch.eye(size)
        gram[at, at] = {"negative": -1.0, "nan": float("nan"), "inf": float("inf"), "singular": 0.0}[what]
        assert upper_factor(gram, gram.diagonal()) is None
    beside = torch.eye(size)
    beside[0, -1] = beside[-1, 0] = {"negative": -2.0, "nan": float("nan"), "inf": float("inf"), "singular": 1.0}[what]
    assert upper_factor(beside, beside.diagonal()) is None

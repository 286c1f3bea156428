"""Outputs of a test are kept in a file, and compared a few at a time."""

from __future__ import annotations

import pytest
import torch

from lightning_qat.metrics import Agreement, Cosine, sqnr
from lightning_qat.recipes import _measure
from lightning_qat.recipes._measure import Measurement, Outputs


def kept(batches: list[torch.Tensor]) -> Outputs:
    outputs = Outputs()
    for batch in batches:
        outputs.append(batch)
    return outputs


@pytest.mark.parametrize("in_memory", [64, 2**24])
@pytest.mark.parametrize("piece", [1, 35, 2**20])
def test_what_is_kept_is_compared_as_a_whole(piece: int, in_memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_measure, "_PIECE", piece)
    monkeypatch.setattr(_measure, "_IN_MEMORY", in_memory)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(size, 3, 7, generator=generator) for size in (4, 4, 0, 1)]
    others = [batch + 0.3 * torch.randn(batch.shape, generator=generator) for batch in batches]
    whole, other = torch.cat(batches), torch.cat(others)
    first, second = Measurement({}, kept(batches)), Measurement({}, kept([batch.double() for batch in others]))
    assert torch.equal(torch.cat(list(first.outputs.vectors())), whole.flatten(0, 1))
    agreement, cosine = Agreement(), Cosine()
    agreement.update(whole, other)
    cosine.update(whole, other)
    assert second.agreement(first) == pytest.approx(float(agreement.compute()))
    assert second.sqnr_db(first) == pytest.approx(float(sqnr(whole, other)), rel=1e-12)
    assert second.compared(first, Cosine()) == pytest.approx(float(cosine.compute()), rel=1e-6)


def test_other_outputs_are_not_compared() -> None:
    one, two = Measurement({}, kept([torch.zeros(2, 3)])), Measurement({}, kept([torch.zeros(3, 3)]))
    assert one.agreement(two) is None
    assert one.sqnr_db(Measurement({}, None)) is None

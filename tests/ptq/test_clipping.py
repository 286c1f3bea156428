"""Clipping: never worse than round to nearest, as good as the published search, and what it says it is."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensors import randn
from torch import Tensor

from lightning_qat.ptq.chosen import output_error
from lightning_qat.ptq.clipping import ClippingOptions, _shares, choose_clipped
from lightning_qat.ptq.nearest import choose_nearest
from lightning_qat.schemes import TensorFormat, get_scheme, scale_shape

FORMATS = (
    TensorFormat("int4", 4, True, group_size=16),
    TensorFormat("int8", 3, False, group_size=16),
    TensorFormat("int8", 8, True, axis=0),
    TensorFormat("int8", 4, False, axis=0),
    TensorFormat("int8", 4, True),
    TensorFormat("nf4", 4, True, block_size=16),
)


def problem(rows: int = 12, size: int = 48, seed: int = 0) -> tuple[Tensor, Tensor]:
    x = randn(200, size, seed=seed) @ (torch.eye(size) + 0.2 * randn(size, size, seed=seed + 1))
    return randn(rows, size, seed=seed + 2), x.t() @ x


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@given(seed=st.integers(0, 500), sweeps=st.integers(0, 3))
@settings(max_examples=5, deadline=None)
def test_never_worse_than_round_to_nearest(fmt: TensorFormat, seed: int, sweeps: int) -> None:
    weight, gram = problem(rows=1 + seed % 7, seed=seed)
    weight[:, 16:32] *= seed % 3
    chosen = choose_clipped(weight, gram, fmt, ClippingOptions(sweeps=sweeps))
    plain = choose_nearest(weight, gram, fmt)
    assert chosen.nearest_loss == plain.loss
    assert chosen.loss <= plain.loss
    assert chosen.loss == output_error(weight, chosen.values(), gram)
    assert chosen.scale.shape == scale_shape(weight.shape, fmt)
    # What the engine relies on: the values come back as these codes.
    codes = get_scheme(fmt.scheme).quantize(chosen.values(), chosen.scale, chosen.zero_point, fmt)
    assert torch.equal(codes, chosen.codes)
    if fmt.axis == 0 or fmt.group_size or fmt.block_size:
        rows = [((w - v) @ gram @ (w - v)) for w, v in zip(weight, chosen.values(), strict=True)]
        before = [((w - v) @ gram @ (w - v)) for w, v in zip(weight, plain.values(), strict=True)]
        assert all(float(a) <= float(b) * 1.0001 + 1e-6 for a, b in zip(rows, before, strict=True))


@pytest.mark.parametrize("fmt", [FORMATS[0], FORMATS[1]], ids=str)
def test_a_group_alone_gets_the_best_of_all_shares(fmt: TensorFormat) -> None:
    """The published search: every share of one group's range, the outputs of the group alone compared."""
    x = randn(100, 16) * randn(16, seed=1).exp()
    weight, options = randn(9, 16, seed=2), ClippingOptions(shares=20)
    chosen = choose_clipped(weight, x.t() @ x, fmt, ClippingOptions(sweeps=0))
    for row, value in zip(weight, chosen.values(), strict=True):
        losses = []
        for share in _shares(fmt, options):
            low, high = row.min() * share, row.max() * share
            if fmt.symmetric:
                scale = row.abs().max() * share / (2 ** (fmt.bits - 1) - 0.5)
                q = (row / scale).round().clamp(-(2 ** (fmt.bits - 1)), 2 ** (fmt.bits - 1) - 1) * scale
            else:
                scale = (high - low) / (2**fmt.bits - 1)
                zero = (-low / scale).round()
                q = (((row / scale).round() + zero).clamp(0, 2**fmt.bits - 1) - zero) * scale
            losses.append(float((x @ (row - q)).square().sum()))
        assert float((x @ (row - value)).square().sum()) == pytest.approx(min(losses), rel=1e-4)


def test_sweeps_find_the_best_ranges_of_two_groups_together() -> None:
    """Every pair of shares is tried: the sweeps end where changing one group alone gains nothing."""
    fmt, options = TensorFormat("int4", 4, True, group_size=8), ClippingOptions(shares=10, sweeps=10)
    x = randn(100, 16) + 2 * randn(100, 1, seed=1)
    weight, gram = randn(6, 16, seed=2), x.t() @ x
    chosen = choose_clipped(weight, gram, fmt, options)
    alone = choose_clipped(weight, gram, fmt, ClippingOptions(shares=10, sweeps=0))
    assert chosen.loss < 0.9 * alone.loss
    best, scheme = 0.0, get_scheme("int4")
    for row in weight:
        losses = []
        for pair in itertools.product(_shares(fmt, options), repeat=2):
            scale = row.view(2, 8).abs().amax(1) * torch.tensor(pair) / 7.5
            error = scheme.fake_quantize(row.unsqueeze(0), scale.view(1, 2), None, fmt)[0] - row
            losses.append(float(error @ gram @ error))
        best += min(losses)
    assert best * 0.999 <= chosen.loss <= 1.3 * best


def test_wide_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, gram = problem()
    fmt = TensorFormat("int8", 4, True, axis=0)
    tried = choose_clipped(weight, gram, fmt)
    monkeypatch.setattr("lightning_qat.ptq.clipping._WIDE", 16)
    wide = choose_clipped(weight, gram, fmt)
    assert tried.loss <= wide.loss * 1.05
    assert wide.loss < 0.9 * wide.nearest_loss


@pytest.mark.parametrize("fmt", [FORMATS[0], FORMATS[1], FORMATS[3]], ids=str)
def test_pieces_of_rows_are_the_same(fmt: TensorFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, gram = problem()
    whole = choose_clipped(weight, gram, fmt)
    monkeypatch.setattr("lightning_qat.ptq.clipping._PIECE", 48 * 5)
    assert choose_clipped(weight, gram, fmt).loss == pytest.approx(whole.loss, rel=1e-3)


def test_given_grids_and_blocks_across_rows_stay() -> None:
    weight, gram = problem()
    fmt = FORMATS[0]
    scale = torch.full((12, 3), 0.4)
    chosen = choose_clipped(weight, gram, fmt, None, scale)
    assert torch.equal(chosen.scale, scale)
    assert chosen.notes == ("its grid is given: nothing to clip",)
    across = choose_clipped(weight, gram, TensorFormat("nf4", 4, True, block_size=64))
    assert across.loss == across.nearest_loss
    assert across.notes == ("blocks that go on in the next row are not clipped",)


def test_odd_weights() -> None:
    gram = problem()[1]
    for weight in (torch.zeros(3, 48), torch.ones(1, 48), randn(48, 3).t().to(torch.bfloat16)):
        for fmt in FORMATS:
            chosen = choose_clipped(weight, gram, fmt)
            assert chosen.loss <= chosen.nearest_loss
    assert choose_clipped(torch.zeros(0, 48), gram, FORMATS[0]).loss == 0.0


@pytest.mark.parametrize("options", [{"least_share": 1.0}, {"shares": 0}, {"sweeps": -1}])
def test_options_are_checked(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        ClippingOptions(**options)

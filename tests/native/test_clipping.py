"""The range that loses least in one group of columns: against losses in float64, and against PyTorch's path."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.test_gptq import gram_of
from torch import Tensor

from lightning_qat.native import build
from lightning_qat.native import clipping as native
from lightning_qat.native.library import FAMILIES, Family, without_native
from lightning_qat.ptq.clipping import choose_clipped
from lightning_qat.schemes import TensorFormat

pytestmark = pytest.mark.skipif(native._FAMILY.functions() is None, reason="no C++ compiler")


def losses_of(
    weight: Tensor, own: Tensor, others: Tensor | None, step: Tensor, zero: Tensor | None, bounds: tuple[int, int]
) -> Tensor:
    """Return the loss of every grid in every row, float64 ``[tries, rows]``, with the errors as float32 has them."""
    at_zero = torch.zeros_like(step) if zero is None else zero
    codes = (torch.round(weight / step[..., None]) + at_zero[..., None]).clamp(*bounds)
    errors = ((codes - at_zero[..., None]) * step[..., None] - weight).double()
    products = errors @ own.double() + (0 if others is None else 2 * others.double())
    return (products * errors).sum(-1)


def case(rows: int, width: int, tries: int, seed: int, asymmetric: bool, alone: bool) -> tuple:
    generator = torch.Generator().manual_seed(seed)
    weight, own = torch.randn(rows, width, generator=generator), gram_of(width, seed)
    others = None if alone else torch.randn(rows, width, generator=generator) * own.diagonal().mean() * 0.2
    step = torch.rand(tries, rows, generator=generator) * 0.4 + 0.1
    zero = torch.randint(0, 16, step.shape, generator=generator).float() if asymmetric else None
    return weight, own, others, step, zero, ((0, 15) if asymmetric else (-8, 7))


def check(arguments: tuple) -> Tensor:
    """Raise ``AssertionError`` unless what is chosen loses least, up to the rounding of sums; return it."""
    chosen = native.best_shares(*arguments)
    losses = losses_of(*arguments)
    rounding = 1e-5 * losses.abs().amax(0)
    assert bool((losses.gather(0, chosen[None])[0] <= losses.amin(0) + rounding).all())
    return chosen


@given(
    rows=st.one_of(st.integers(1, 5), st.sampled_from((63, 64, 65, 130))),
    width=st.one_of(st.integers(1, 9), st.sampled_from((32, 64, 127))),
    tries=st.integers(1, 12),
    seed=st.integers(0, 99),
    asymmetric=st.booleans(),
    alone=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_what_is_chosen_loses_least(
    rows: int, width: int, tries: int, seed: int, asymmetric: bool, alone: bool
) -> None:
    check(case(rows, width, tries, seed, asymmetric, alone))


def test_the_first_of_equal_grids_is_taken_and_the_first_where_no_loss_is_finite() -> None:
    weight, own, others, step, zero, bounds = case(70, 32, 5, 0, True, False)
    step[3:], zero[3:] = step[1:3], zero[1:3]
    assert bool((check((weight, own, others, step, zero, bounds)) < 3).all())
    assert bool((native.best_shares(weight, own * torch.nan, others, step, zero, bounds) == 0).all())


def test_the_number_of_threads_and_strides_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = case(300, 40, 7, 1, False, False)
    expected = check(arguments)
    strided = [torch.stack((t, t), -1)[..., 0] if isinstance(t, Tensor) else t for t in arguments]
    assert torch.equal(native.best_shares(*strided), expected)
    for threads in (2, 7):
        monkeypatch.setattr(native, "threads_for", lambda _, threads=threads: threads)
        assert torch.equal(native.best_shares(*arguments), expected)


def test_another_processor_chooses_likewise(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = case(100, 33, 9, 2, True, False)
    expected = check(arguments)
    monkeypatch.setenv("LIGHTNING_QAT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "_machine_flags", lambda: ())
    monkeypatch.setitem(FAMILIES, "clipping", FAMILIES["clipping"])
    monkeypatch.setattr(native, "_FAMILY", Family("clipping", native._FAMILY.signatures))
    assert torch.equal(native.best_shares(*arguments), expected)


@pytest.mark.parametrize(
    "fmt",
    [
        TensorFormat("gptq", 4, True, group_size=32),
        TensorFormat("gptq", 3, False, group_size=64),
        TensorFormat("int4", 4, True, axis=0),
        TensorFormat("int8", 2, False, axis=0),
        TensorFormat("nf4", 4, True, block_size=64),
    ],
    ids=str,
)
def test_ranges_are_those_that_pytorch_finds(fmt: TensorFormat) -> None:
    generator = torch.Generator().manual_seed(3)
    weight, gram = torch.randn(70, 192, generator=generator) * 0.02, gram_of(192)
    found = choose_clipped(weight, gram, fmt)
    with without_native():
        expected = choose_clipped(weight, gram, fmt)
        assert native.best_shares(*case(3, 4, 2, 0, False, True)) is None
    assert found.loss == pytest.approx(expected.loss, rel=1e-4)
    assert (found.scale == expected.scale).float().mean() > 0.99
    assert found.loss < 0.95 * found.nearest_loss

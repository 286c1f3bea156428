"""GPTQ on tensors against its own meaning: each column is rounded where the loss of all that is left is least."""

from __future__ import annotations

import contextlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_qat.native.library import without_native
from lightning_qat.ops import gptq, gptq_cpu
from lightning_qat.ops.codebook_tables import bin_codes, codebook, thresholds
from lightning_qat.ops.gptq import (
    Levels,
    Reached,
    Steps,
    gptq_block_op,
    gptq_columns,
    nearest_level,
    reference_gptq_block,
)
from lightning_qat.ops.upper_factor import inverse_of_upper, upper_factor


def gram_of(size: int, seed: int = 0, samples: int | None = None) -> Tensor:
    """Return the Gram matrix of correlated inputs of different sizes, with some damping."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size, size, generator=generator) / size**0.5
    inputs = torch.randn(samples or 4 * size, size, generator=generator) @ (mixing + 0.3 * torch.eye(size))
    inputs *= torch.rand(size, generator=generator) * 3 + 0.1
    gram = inputs.t() @ inputs
    gram.diagonal().add_(0.01 * gram.diagonal().mean())
    return gram


def levels_of(kind: str) -> Levels:
    if kind in ("nf4", "dynamic_tree"):
        return Levels(0, 15, codebook(kind, "cpu"), thresholds(kind, "cpu", "cpu"))
    return {"int4": Levels(-8, 7), "int8": Levels(-127, 127), "uint3": Levels(0, 7), "uint8": Levels(0, 255)}[kind]


def block_of(count: int, rows: int, kind: str, seed: int = 0) -> tuple[Tensor, Tensor, Steps, Levels]:
    """Return columns, the factor and the grid of a block."""
    generator = torch.Generator().manual_seed(seed)
    columns, levels = torch.randn(count, rows, generator=generator), levels_of(kind)
    gram = gram_of(count, seed)
    factor = inverse_of_upper(upper_factor(gram, gram.diagonal()))
    step = torch.rand(count, rows, generator=generator) + 0.1
    if levels.values is None:
        step *= 4 / (levels.high - levels.low)
    zero = None
    if kind.startswith("u"):
        zero = torch.randint(0, levels.high + 1, step.shape, generator=generator).float()
    return columns, factor, Steps(step, zero), levels


def by_least_loss(weight: Tensor, gram: Tensor, step: Tensor, zero: Tensor | None, levels: Levels) -> Tensor:
    """The meaning of GPTQ in float64, with a linear system for each column and no factor.

    Column j is rounded; then all columns after it take the values of least ``(w - w0) G (w - w0)^T``, those up to j
    being what they were rounded to. ``weight`` is ``[in_features, out_features]``.
    """
    gram, start = gram.double(), weight.double()
    now, codes = start.clone(), torch.empty(weight.shape, dtype=torch.int16)
    for j in range(len(start)):
        at_zero = None if zero is None else zero[j].double()
        tables = (None, None) if levels.values is None else (levels.values.double(), levels.thresholds.double())
        codes[j], now[j] = nearest_level(now[j], step[j].double(), at_zero, levels.low, levels.high, *tables)
        rest = slice(j + 1, None)
        pulled = gram[rest, : j + 1] @ (now[: j + 1] - start[: j + 1])
        now[rest] = start[rest] - torch.linalg.solve(gram[rest, rest], pulled)
    return codes


@pytest.mark.parametrize("kind", ["int4", "uint3", "nf4"])
@pytest.mark.parametrize(("block_size", "panel"), [(1, 512), (16, 512), (48, 512), (16, 32), (7, 20), (1, 1)])
def test_codes_are_those_of_least_loss_column_by_column(
    monkeypatch: pytest.MonkeyPatch, kind: str, block_size: int, panel: int
) -> None:
    monkeypatch.setattr(gptq, "_PANEL", panel)
    weight, _, steps, levels = block_of(48, 20, kind)
    gram = gram_of(48)
    expected = by_least_loss(weight, gram, steps.step, steps.zero, levels)

    def steps_of(start: int, stop: int, _: Reached) -> Steps:
        return Steps(steps.step[start:stop], None if steps.zero is None else steps.zero[start:stop])

    left = weight.clone()
    codes, loss = gptq_columns(left, upper_factor(gram, gram.diagonal()), steps_of, levels, block_size)
    assert torch.equal(codes, expected)
    units = codes.double() if levels.values is None else levels.values[codes.long()].double()
    difference = weight.double() - (units - (0 if steps.zero is None else steps.zero)) * steps.step
    assert float(loss) == pytest.approx(float(((gram.double() @ difference) * difference).sum()), rel=1e-4)
    torch.testing.assert_close(left.double(), difference, rtol=0, atol=1e-6)


def test_rounding_to_nearest_is_something_else() -> None:
    """So that the test above cannot pass with a factor that is ignored."""
    weight, _, steps, levels = block_of(48, 20, "int4")
    expected = by_least_loss(weight, gram_of(48), steps.step, None, levels)
    nearest, _ = nearest_level(weight, steps.step, None, levels.low, levels.high)
    assert 0.2 < (expected != nearest).float().mean() < 0.9


@pytest.mark.parametrize("kind", ["int4", "int8", "uint3", "uint8", "nf4", "dynamic_tree"])
@given(count=st.integers(1, 130), rows=st.sampled_from((1, 3, 64)), seed=st.integers(0, 99))
@settings(max_examples=8, deadline=None)
def test_the_cpu_kernel_is_the_definition_up_to_the_order_of_sums(kind: str, count: int, rows: int, seed: int) -> None:
    columns, factor, steps, levels = block_of(count, rows, kind, seed)
    before = columns.clone()
    with without_native():
        codes, errors = gptq_block_op(columns, factor, *steps, *levels)
    exact, expected = reference_gptq_block(
        columns.double(), factor.double(), *(None if t is None else t.double() for t in steps), *levels[:2],
        *(None if t is None else t.double() for t in levels[2:]),
    )  # fmt: skip
    assert codes.dtype == torch.int16
    assert torch.equal(columns, before)
    same = (codes == exact).all(0)  # a code at a tie may fall to the other side, and others of its row follow
    assert same.float().mean() >= (0.97 if rows == 64 else 0)
    torch.testing.assert_close(errors[:, same].double(), expected[:, same], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("sub_block", [1, 5, 32, 200])
def test_the_size_of_sub_blocks_changes_nothing(monkeypatch: pytest.MonkeyPatch, sub_block: int) -> None:
    columns, factor, steps, levels = block_of(70, 33, "int4", 3)
    expected, _ = reference_gptq_block(columns, factor, *steps, *levels)
    monkeypatch.setattr(gptq_cpu, "_SUB_BLOCK", sub_block)
    with without_native():
        assert torch.equal(gptq_block_op(columns, factor, *steps, *levels)[0], expected)


@pytest.mark.parametrize("kind", ["int4", "nf4"])
def test_columns_that_are_not_contiguous_and_zeros(kind: str) -> None:
    columns, factor, steps, levels = block_of(40, 12, kind)
    strided = torch.stack((columns, torch.full_like(columns, torch.nan)), dim=-1)[..., 0]
    expected = gptq_block_op(columns, factor, *steps, *levels)
    for found, right in zip(gptq_block_op(strided, factor, *steps, *levels), expected, strict=True):
        assert torch.equal(found, right)
    codes, errors = gptq_block_op(torch.zeros_like(columns), factor, *steps, *levels)
    assert codes.eq(7 if kind == "nf4" else 0).all()
    assert errors.eq(0).all()


def test_a_block_of_zeros_stays_zero_in_a_codebook() -> None:
    columns, factor, steps, levels = block_of(8, 4, "nf4")
    steps.step[3:6] = 0.0
    _, errors = gptq_block_op(columns, factor, *steps, *levels)
    assert bool(torch.isfinite(errors).all())
    _, rounded = nearest_level(columns[3:6], steps.step[3:6], None, *levels)
    assert rounded.eq(0).all()


@pytest.mark.parametrize("panel", [20, 512])
def test_steps_are_asked_for_with_the_columns_as_they_are_by_then(monkeypatch: pytest.MonkeyPatch, panel: int) -> None:
    """Also columns of later blocks: groups may be wider than these, or lie in two of them."""
    monkeypatch.setattr(gptq, "_PANEL", panel)
    weight, _, steps, levels = block_of(48, 6, "int4")
    gram, seen = gram_of(48), []

    def steps_of(start: int, stop: int, reached: Reached) -> Steps:
        seen.append((start, stop, reached(start, stop), reached(min(start + 3, stop - 1), 48)))
        return Steps(steps.step[start:stop], None)

    codes, _ = gptq_columns(weight.clone(), upper_factor(gram, gram.diagonal()), steps_of, levels, 20)
    assert [(a, b) for a, b, *_ in seen] == [(0, 20), (20, 40), (40, 48)]
    exact, rounded = gram.double(), (codes * steps.step).double()
    for start, stop, block, rest in seen:
        # Those of least loss, all before being what they were rounded to.
        error = exact[start:, :start] @ (rounded[:start] - weight[:start].double())
        expected = weight[start:].double() - torch.linalg.solve(exact[start:, start:], error)
        torch.testing.assert_close(block.double(), expected[: stop - start], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(rest.double(), expected[min(3, stop - start - 1) :], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["int4", "uint3", "nf4"])
def test_opcheck(kind: str) -> None:
    columns, factor, steps, levels = block_of(9, 5, kind)
    torch.library.opcheck(gptq_block_op, (columns, factor, *steps, *levels))


@pytest.mark.parametrize("shape", [(1, 1), (3, 70), (64, 5), (65, 130), (200, 33)])
@pytest.mark.parametrize("native", [True, False])
def test_columns_are_gathered_in_order(shape: tuple[int, int], native: bool) -> None:
    order = torch.randperm(shape[1])
    whole = torch.randn(*shape)
    whole[0, 0] = torch.nan
    for weight in (whole, torch.stack((whole, whole), dim=-1)[..., 0], whole.t().contiguous().t()):
        with contextlib.nullcontext() if native else without_native():
            found = gptq.ordered_columns(weight, order)
        assert found.is_contiguous()
        assert torch.equal(found.nan_to_num(7.0), whole[:, order].t().nan_to_num(7.0))


@pytest.mark.parametrize("shape", [(1, 1), (70, 3), (5, 64), (130, 65), (33, 200)])
@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("kind", ["int8", "uint8", "nf4"])
def test_codes_are_placed_as_the_columns_lie(shape: tuple[int, int], native: bool, kind: str) -> None:
    order, table = torch.randperm(shape[0]), bin_codes("nf4", "cpu", "cpu") if kind == "nf4" else None
    low, high = {"int8": (-128, 128), "uint8": (0, 256), "nf4": (0, 16)}[kind]
    codes = torch.randint(low, high, shape).to(torch.int16)
    with contextlib.nullcontext() if native else without_native():
        found = gptq.placed_codes(codes, order, table, torch.int8 if kind == "int8" else torch.uint8)
    assert found.is_contiguous()
    assert found.dtype == (torch.int8 if kind == "int8" else torch.uint8)
    for row, column in enumerate(order.tolist()):
        expected = [int(code) if table is None else int(table[code]) for code in codes[row]]
        assert found[:, column].tolist() == expected


def test_nothing_to_do() -> None:
    codes, errors = gptq_block_op(torch.empty(4, 0), torch.eye(4), torch.empty(4, 0), None, -8, 7, None, None)
    assert codes.shape == errors.shape == (4, 0)

"""Blocks of columns in C++: the bits of the definitions, whatever the sizes, the grid, the threads, the processor."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.test_gptq import block_of, gram_of
from torch import Tensor

from lightning_qat.native import build
from lightning_qat.native import gptq as native
from lightning_qat.native.library import FAMILIES, Family, without_native
from lightning_qat.ops.coordinate_descent import descend_block_op, reference_descend_block
from lightning_qat.ops.gptq import gptq_block_op, reference_gptq_block

pytestmark = pytest.mark.skipif(native._FAMILY.functions() is None, reason="no C++ compiler")

KINDS = ("int4", "int8", "uint3", "uint8", "nf4", "dynamic_tree")


def same(kind: str, count: int, rows: int, seed: int, dead: bool = False) -> None:
    """Raise ``AssertionError`` unless both functions give the bits of their definitions."""
    columns, factor, steps, levels = block_of(count, rows, kind, seed)
    if dead:  # a column that others say nothing about, and one of zeros; a block of zeros in a table
        factor[count // 2, count // 2 + 1 :] = 0.0
        factor[: count // 2, count // 2] = 0.0
        columns[count // 3] = 0.0
        if levels.values is not None:
            steps.step[count // 3] = 0.0
    given_ = columns.clone()
    equal(native.gptq_block(columns, factor, *steps, *levels), reference_gptq_block(columns, factor, *steps, *levels))
    assert torch.equal(columns, given_)
    gram, current = gram_of(count, seed), columns.flip(0) * 0.5
    products = gram @ (columns - current)
    equal(
        native.descend_block(products, current, gram, *steps, *levels),
        reference_descend_block(products, current, gram, *steps, *levels),
    )


def equal(found: tuple[Tensor, Tensor] | None, expected: tuple[Tensor, Tensor]) -> None:
    assert found is not None
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        # -0.0 is not 0.0 here.
        kind = torch.int16 if one.dtype == torch.int16 else torch.int32
        assert torch.equal(one.view(kind), other.view(kind))


@pytest.mark.parametrize("kind", KINDS)
@given(
    count=st.one_of(st.integers(1, 9), st.sampled_from((31, 64, 127, 128, 130))),
    rows=st.one_of(st.integers(1, 5), st.sampled_from((63, 64, 65, 128, 200))),
    seed=st.integers(0, 99),
    dead=st.booleans(),
)
@settings(max_examples=15, deadline=None)
def test_the_bits_are_the_definitions(kind: str, count: int, rows: int, seed: int, dead: bool) -> None:
    same(kind, count, rows, seed, dead)


@pytest.mark.parametrize("kind", ["int4", "uint8", "nf4"])
def test_the_number_of_threads_changes_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for threads in (2, 3, 7):
        monkeypatch.setattr(native, "threads_for", lambda _, threads=threads: threads)
        same(kind, 40, 300, 5)


def test_another_processor_gets_the_same_bits(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One without the vectors of this one: the compiler makes several narrow ones of each."""
    monkeypatch.setenv("LIGHTNING_QAT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "_machine_flags", lambda: ())
    monkeypatch.setitem(FAMILIES, "gptq", FAMILIES["gptq"])
    monkeypatch.setattr(native, "_FAMILY", Family("gptq", native._FAMILY.signatures))
    for kind in KINDS:
        same(kind, 33, 70, 1)
    assert len(list((tmp_path / "cache").iterdir())) == 1


@pytest.mark.parametrize("kind", ["int4", "uint3", "nf4"])
def test_values_that_are_huge_or_tiny_or_lie_on_a_tie(kind: str) -> None:
    columns, factor, steps, levels = block_of(16, 70, kind)
    columns[::4] *= 1e30
    columns[1::4] *= 1e-39
    columns[2::4] = steps.step[2::4] * (torch.arange(70) % 9 - 4.5)
    columns[3::8] = -0.0
    equal(native.gptq_block(columns, factor, *steps, *levels), reference_gptq_block(columns, factor, *steps, *levels))


@pytest.mark.parametrize("kind", ["int4", "nf4"])
def test_the_ops_take_it_and_what_it_has_no_kernel_for_is_left_to_pytorch(kind: str) -> None:
    columns, factor, steps, levels = block_of(40, 70, kind, 2)
    expected = reference_gptq_block(columns, factor, *steps, *levels)
    equal(gptq_block_op(columns, factor, *steps, *levels), expected)
    strided = torch.stack((columns, torch.full_like(columns, torch.nan)), dim=-1)[..., 0]
    equal(gptq_block_op(strided, factor.t().contiguous().t(), *steps, *levels), expected)
    gram, zeros = gram_of(40), torch.zeros_like(columns)
    found = descend_block_op(columns, zeros, gram, *steps, *levels)
    equal(found, reference_descend_block(columns, zeros, gram, *steps, *levels))
    assert native.gptq_block(columns.double(), factor.double(), *steps, *levels) is None
    assert native.gptq_block(columns[:, :0], factor, steps.step[:, :0], None, *levels) is None
    with without_native():
        assert native.gptq_block(columns, factor, *steps, *levels) is None
        assert native.descend_block(columns, zeros, gram, *steps, *levels) is None
        codes, _ = gptq_block_op(columns, factor, *steps, *levels)
    assert (codes == expected[0]).float().mean() > 0.99

"""The choice is the best one: all choices are the witness."""

from __future__ import annotations

import itertools
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_qat.ptq.knapsack import choose_one_each

options = st.lists(st.tuples(st.integers(0, 20), st.floats(0, 10)), min_size=1, max_size=4)


@settings(max_examples=400, deadline=None)
@given(items=st.lists(options, min_size=0, max_size=5), extra=st.integers(0, 30))
def test_no_other_choice_is_better(items, extra) -> None:
    budget = sum(min(size for size, _ in row) for row in items) + extra
    chosen = choose_one_each(items, budget)
    assert len(chosen) == len(items)
    assert sum(row[i][0] for row, i in zip(items, chosen, strict=True)) <= budget
    best = min(sum(o[1] for o in choice) for choice in itertools.product(*items) if sum(o[0] for o in choice) <= budget)
    cost = sum(row[i][1] for row, i in zip(items, chosen, strict=True))
    assert cost <= best * (1 + 1e-9) + 1e-12


def test_bounds_much_larger_than_what_they_differ_by() -> None:
    items = [
        [(2999949, 0.0), (3999932, 0.0), (4999915, 2.0), (15999728, 2.0), (1999966, 1.0)],
        [(48, 0.0), (18, 2.0), (6, 2.0)],
        [(1999966, 8.187485918566552e-09), (5999898, 6.2e-06), (15999728, 5.9e-05), (3999932, 6.1e-07)],
    ]
    assert choose_one_each(items, 3999938) == [4, 2, 0]


def test_two_hundred_layers_are_solved_at_once() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(10_000, 3_000_000, (200,), generator=generator).tolist()
    scale = torch.rand(200, generator=generator).tolist()
    items = [[(n * b, s * 4.0**-b) for b in (2, 3, 4, 6, 8)] for n, s in zip(sizes, scale, strict=True)]
    begun = time.perf_counter()
    chosen = choose_one_each(items, int(4.1 * sum(sizes)))
    assert time.perf_counter() - begun < 60
    assert sum(row[i][0] for row, i in zip(items, chosen, strict=True)) <= 4.1 * sum(sizes)


def test_too_small_a_budget() -> None:
    with pytest.raises(ValueError, match="the smallest options take 5"):
        choose_one_each([[(5, 1.0)]], 4)

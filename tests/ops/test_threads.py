"""Parts of the work on threads: all of it once, in order, whatever fails, in the mode of the caller."""

from __future__ import annotations

import threading
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_qat.ops import threads
from lightning_qat.ops.threads import in_threads, parts_of, shares


@given(st.integers(0, 1000), st.integers(1, 12))
def test_shares_cover_everything_once(count: int, parts: int) -> None:
    found = shares(count, parts)
    assert [at for share in found for at in range(count)[share]] == list(range(count))
    assert len(found) <= parts
    assert all(share.start < share.stop for share in found)


def test_as_many_parts_as_pytorch_has_threads_and_work_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert [parts_of(count, 10) for count in (0, 9, 10, 29, 30, 1000)] == [1, 1, 1, 2, 3, 3]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    assert parts_of(10**9, 10) == threads.MOST_PARTS


def test_results_are_in_order_and_the_first_task_stays_here() -> None:
    def where(index: int) -> tuple[int, int]:
        return index, threading.get_ident()

    found = in_threads([partial(where, index) for index in range(4)])
    assert [index for index, _ in found] == [0, 1, 2, 3]
    assert found[0][1] == threading.get_ident() not in {thread for _, thread in found[1:]}
    assert in_threads([partial(where, 7)]) == [(7, threading.get_ident())]


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_comes_out_after_all_have_ended(failing: int) -> None:
    ended = []

    def task(index: int) -> None:
        if index == failing:
            raise ArithmeticError(f"task {index}")
        threading.Event().wait(0.05)
        ended.append(index)

    with pytest.raises(ArithmeticError, match=f"task {failing}"):
        in_threads([partial(task, index) for index in range(3)])
    assert sorted(ended) == [index for index in range(3) if index != failing]


def test_workers_may_write_into_tensors_of_inference_mode() -> None:
    with torch.inference_mode():
        result = torch.empty(4)
        in_threads([partial(torch.add, result[part], 1.0, out=result[part].zero_()) for part in shares(4, 2)])
    assert result.tolist() == [1.0] * 4


def test_no_gradient_is_recorded() -> None:
    weight = torch.ones(2, requires_grad=True)
    assert not any(found.requires_grad for found in in_threads([lambda: weight * 2, lambda: weight * 3]))

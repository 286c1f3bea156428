"""What shares a scale: what is refused, and how blocks cover a tensor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_qat.ops.layout import channel_blocks, match_layout, resolve_layout

X, ONE = torch.ones(4, 576), torch.ones(())


@pytest.mark.parametrize(
    ("x", "scale", "axis", "group_size", "expected"),
    [
        (X, ONE, None, None, (-1, 0)),
        (X, torch.ones(1, 1), None, None, (-1, 0)),
        (X, torch.ones(4), 0, None, (0, 0)),
        (X, torch.ones(4, 1), -2, None, (0, 0)),
        (X, torch.ones(1, 576), 1, None, (1, 0)),
        (X, torch.ones(4, 9), None, 64, (-1, 64)),
        (X, torch.ones(36, 1), None, 64, (-1, 64)),
        (torch.ones(576), torch.ones(9), None, 64, (-1, 64)),
        (torch.ones(4, 6, 4), torch.ones(4, 2), None, 12, (-1, 12)),
        (X, torch.ones(4, 1), None, None, (-1, 576)),
        (torch.ones(2, 3, 5), torch.ones(2, 3, 1), None, None, (-1, 5)),
    ],
)
def test_granularities(
    x: Tensor, scale: Tensor, axis: int | None, group_size: int | None, expected: tuple[int, int]
) -> None:
    assert resolve_layout(x, scale, torch.zeros_like(scale), axis, group_size) == expected


@pytest.mark.parametrize(
    ("x", "scale", "zero_point", "kwargs", "message"),
    [
        (X, ONE.long(), None, {}, "scale has dtype torch.int64"),
        (X, ONE, torch.zeros(4), {}, r"zero_point has shape \(4,\) and scale \(\)"),
        (X, ONE, torch.zeros((), dtype=torch.bool), {}, "zero_point has dtype torch.bool"),
        (X, ONE, torch.zeros((), device="meta"), {}, "zero_point is on meta and x on cpu"),
        (X, torch.ones((), device="meta"), None, {}, "scale is on meta and x on cpu"),
        (X, torch.ones(4), None, {"axis": 2}, "axis=2 is out of range .* use -2 to 1"),
        (X, torch.ones(4), None, {"axis": 1}, r"it takes \(576,\) or \(1, 576\)"),
        (X, torch.ones(1, 4), None, {"axis": 0}, r"it takes \(4,\) or \(4, 1\)"),
        (X, torch.ones(2, 2), None, {"axis": 0}, r"it takes \(4,\)"),
        (X, torch.ones(2, 2, 1), None, {"axis": 0}, r"it takes \(4,\)"),
        (X, torch.ones(4), None, {"axis": 0, "group_size": 64}, "exclude each other"),
        (X, torch.ones(4, 4), None, {"group_size": 128}, "576 % 128 != 0; use group_size=64 or 32"),
        (torch.ones(2, 90), torch.ones(2), None, {"group_size": 64}, "90 % 64 != 0; use group_size=45 or 30"),
        (torch.ones(2, 7), torch.ones(2), None, {"group_size": 5}, "7 % 5 != 0; use group_size=1$"),
        (X, torch.ones(4, 9), None, {"group_size": 0}, "group_size=0 is not allowed; use 1 to 576"),
        (X, torch.ones(4, 8), None, {"group_size": 64}, r"36 elements, such as \(4, 9\)"),
        (X, torch.ones(9, 4), None, {"group_size": 64}, r"36 elements, such as \(4, 9\)"),
        (X, torch.ones(4), None, {}, r"one element or, per token, shape \(4, 1\)"),
        (torch.ones(4), torch.ones(4), None, {}, "it takes one element$"),
    ],
)
def test_errors_name_what_is_allowed(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, kwargs: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_layout(x, scale, zero_point, kwargs.get("axis"), kwargs.get("group_size"))


def test_a_number_is_no_scale() -> None:
    for scale, zero_point in ((0.1, None), (ONE, 3)):
        with pytest.raises(TypeError, match=r"torch\.tensor"):
            resolve_layout(X, scale, zero_point, None, None)  # type: ignore[arg-type]


@given(st.tuples(*[st.integers(1, 20)] * 3), st.integers(1, 100))
def test_blocks_cover_every_element_once(shape: tuple[int, int, int], limit: int) -> None:
    count = torch.zeros(shape)
    for block in channel_blocks(shape, limit):
        assert 0 < count[block].numel() <= limit
        count[block] += 1
    assert count.eq(1).all()


def test_a_result_in_the_right_layout_is_not_copied() -> None:
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    same, other = torch.empty_like(x), torch.randn(2, 3, 4, 5)
    assert match_layout(same, x) is same
    assert match_layout(other, x).stride() == x.stride()
    assert torch.equal(match_layout(other, x), other)

"""Channels told by powers of two: any mapping is found, and what is not multiplied channel by channel is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensors import randn
from torch import Tensor

from lightning_qat.ptq.probing import LEVELS, SILENT, agree, channels_told, factor_of, levels_between


@given(count=st.integers(1, 700), size=st.integers(1, 900), seed=st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_any_mapping_is_found(count: int, size: int, seed: int) -> None:
    channel = torch.randint(0, count, (size,), generator=torch.Generator().manual_seed(seed))
    x = randn(3, count, seed=seed)

    def probe(levels: Tensor) -> Tensor | None:
        return levels_between([x[:, channel]], [(x * factor_of(levels))[:, channel]])

    found = channels_told(count, size, probe)
    assert found is not None
    assert torch.equal(found, channel)


def test_one_to_one_takes_one_probe_and_silent_channels_are_let_pass() -> None:
    x, probes = randn(4, 300), []
    x[:, 7] = 0.0

    def probe(levels: Tensor) -> Tensor | None:
        probes.append(levels)
        return levels_between([x], [x * factor_of(levels)])

    assert channels_told(300, 300, probe).tolist() == list(range(300))
    assert len(probes) == 1
    doubled = torch.arange(300).repeat(2)
    assert channels_told(300, 600, lambda levels: probe(levels)[doubled]) is None  # which of them is silent?


def test_inputs_that_the_channels_have_no_part_in_are_of_none() -> None:
    x = randn(5, 16)
    for count in range(1, 70):
        assert channels_told(count, 16, lambda levels: levels_between([x], [x])) is None
    assert bool((factor_of(torch.arange(LEVELS)) != 1).all())  # so that a proof changes every channel


def test_what_is_not_multiplied_is_refused() -> None:
    x = randn(5, 16)
    factor = factor_of(torch.arange(16) % LEVELS)
    assert levels_between([x], [x * factor]).tolist() == [i % LEVELS for i in range(16)]
    for other in (x, x * factor + 1e-3, (x * factor).clamp_max(1.0), x * factor * 1.01, x * 2**6, -x * factor, x[:4]):
        assert levels_between([x], [other]) is None
    assert levels_between([x], [x, x]) is None
    assert levels_between([x * 0], [x * 0]).tolist() == [SILENT] * 16
    assert levels_between([x * 0], [x]) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_outputs_agree_to_rounding(dtype: torch.dtype) -> None:
    x = randn(4, 8).to(dtype)
    assert agree(x, x.clone(), 1)
    assert agree(x * (1 + torch.finfo(dtype).eps), x, 2)
    assert not agree(x * 1.5, x, 256 if dtype == torch.float32 else 16)
    masked = x.clone()
    masked[0, 0], masked[1, 1] = float("-inf"), float("nan")
    assert agree(masked, masked.clone(), 1)
    assert not agree(x, masked, 256)
    assert not agree(x[:3], x, 256)

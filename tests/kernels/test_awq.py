"""AWQ kernels: words and values of the PyTorch definition, bit for bit."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import aot
from tensors import randn
from torch import Tensor

from lightning_qat.kernels import awq as kernels
from lightning_qat.ops.affine import choose_scale_zero_point
from lightning_qat.ops.awq import reference_awq_pack, reference_awq_unpack

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: Outputs and inputs: below, at and beyond a tile.
SHAPES = ((8, 16), (24, 48), (128, 64), (136, 96), (16, 200))


def grid_of(weight: Tensor, group: int, symmetric: bool) -> tuple[Tensor, Tensor | None]:
    runs = weight.float().nan_to_num(0.0, 3.0, -3.0).reshape(len(weight), -1, group)
    return choose_scale_zero_point(runs.amin(2) / 2, runs.amax(2) / 2, bits=4, symmetric=symmetric)


@given(
    shape=st.sampled_from(SHAPES),
    group=st.sampled_from((8, 16, None)),
    symmetric=st.booleans(),
    scaled=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    odd=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=25, deadline=None)
def test_words_and_values_equal_the_definition(
    device: str,
    shape: tuple[int, int],
    group: int | None,
    symmetric: bool,
    scaled: bool,
    dtype: torch.dtype,
    odd: bool,
    seed: int,
) -> None:
    weight = randn(*shape, seed=seed).to(dtype)
    if odd:
        weight[0, :5] = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 1e-7])
        weight = weight.t().contiguous().t()
    inputs = (randn(shape[1], seed=seed + 1)).exp() if scaled else None
    whole = group is None or shape[1] % group != 0
    scale, zero = grid_of(weight, shape[1] if whole else group, symmetric)
    expected = reference_awq_pack(weight, scale, zero, inputs)
    on = [None if t is None else t.to(device) for t in (scale, zero, inputs)]
    words = kernels.launch_awq_pack(weight.to(device), *on)
    assert words.dtype == torch.int32
    assert torch.equal(words.cpu(), expected)
    values = kernels.launch_awq_unpack(words, *on, dtype)
    assert torch.equal(values.cpu(), reference_awq_unpack(expected, scale, zero, inputs, dtype))


def test_every_element_is_written(device: str, poisoned: None) -> None:
    weight = torch.arange(16.0).repeat(24, 3)[:, :40].to(device)
    scale, zero = torch.ones(24, 1, device=device), torch.zeros(24, 1, dtype=torch.int32, device=device)
    words = kernels.launch_awq_pack(weight, scale, zero, None)
    assert torch.equal(kernels.launch_awq_unpack(words, scale, zero, None, torch.float32), weight)


def test_empty(device: str) -> None:
    weight, scale = torch.empty(0, 16, device=device), torch.ones(0, 1, device=device)
    words = kernels.launch_awq_pack(weight, scale, None, None)
    assert words.shape == (16, 0)
    assert kernels.launch_awq_unpack(words, scale, None, None, torch.float16).shape == (0, 16)


@pytest.mark.parametrize("name", sorted(kernels.TUNED))
def test_compiles_without_spills(compiler: None, name: str) -> None:
    aot.check(kernels.TUNED[name])


@pytest.mark.parametrize("name", sorted(kernels.TUNED))
def test_weights_are_read_and_written_in_accesses_of_16_bytes(compiler: None, name: str) -> None:
    text = aot.ptx(kernels.TUNED[name])
    assert ("ld.global.v4.b32" if name.startswith("pack") else "st.global.v4.b32") in text
    assert ("st.global.v2.b32" if name.startswith("pack") else "ld.global.v2.b32") in text  # words: 8 bytes
    assert "div.full" not in text
    assert "div.approx" not in text

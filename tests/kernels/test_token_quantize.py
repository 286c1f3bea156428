"""Per-token quantization in one launch against the range, the scale and the codes one after the other."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernels.cases import DTYPES, SPECIAL, same, within
from torch import Tensor

from lightning_qat.kernels import token_quantize as token_file
from lightning_qat.kernels.token_quantize import token_quantize_triton
from lightning_qat.ops.affine import choose_scale_zero_point, quantize_affine


def check(x: Tensor, device: str, *, symmetric: bool) -> None:
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    scale, zero = choose_scale_zero_point(low, high, bits=8, symmetric=symmetric)
    rows = x.reshape(-1, x.shape[-1])
    zeros = None if zero is None else zero.reshape(-1)
    codes = quantize_affine(rows, scale.reshape(-1), zeros, bits=8, symmetric=symmetric, axis=0)
    found_codes, found_scale, found_zero = token_quantize_triton(x.to(device), symmetric=symmetric)
    assert same(found_scale, scale)
    assert (zero is None) == (found_zero is None)
    if zero is not None and found_zero is not None:
        assert same(found_zero, zero)
    assert same(found_codes, codes.reshape(x.shape))


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(data=st.data())
def test_equals_the_steps(device: str, poisoned: None, data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.sampled_from((1, 2, 3, 5, 16, 33, 130)), min_size=1, max_size=3))
    shape = within(shape, 3000)
    dtype = data.draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**16)))
    size = 1.0 if dtype == torch.float16 else 2.0 ** data.draw(st.sampled_from((-140, -126, -60, 0, 60, 120)))
    x = torch.randn(shape, generator=generator) * size + data.draw(st.sampled_from((0.0, size, -9 * size)))
    for value in data.draw(st.lists(st.sampled_from(SPECIAL), max_size=4)):
        x.view(-1)[int(torch.randint(x.numel(), (1,), generator=generator))] = value
    if data.draw(st.booleans()):
        x[..., :] = torch.where(torch.rand(x.shape[:-1], generator=generator)[..., None] < 0.3, 0.0, x)
    x = x.to(dtype)
    if data.draw(st.booleans()) and x.dim() > 1:
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    check(x, device, symmetric=data.draw(st.booleans()))


@pytest.mark.parametrize("columns", [8191, 8192, 8193, 20000])
@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_longer_than_a_tile(device: str, poisoned: None, columns: int, symmetric: bool) -> None:
    x = torch.randn(4, columns, generator=torch.Generator().manual_seed(0))
    x[1, -1], x[2, 0], x[3, -1] = -100.0, 100.0, math.nan
    check(x, device, symmetric=symmetric)


@pytest.mark.parametrize("symmetric", [True, False])
def test_ties_and_whole_multiples(device: str, monkeypatch: pytest.MonkeyPatch, symmetric: bool) -> None:
    monkeypatch.setattr(token_file, "MOST_COLUMNS", 64)
    steps = torch.tensor([1.0, 0.1, 3e-3, 2.0**-130, 7e35])
    x = torch.cat([(torch.arange(-254, 255) / 2)[None] * steps[:, None], 127 * steps[:, None]], dim=1)
    check(x, device, symmetric=symmetric)

"""Observation and fake quantization in one pass: each as it is alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from kernels.cases import Case, cases, same

from lightning_qat.kernels import tiles as tiles_file
from lightning_qat.kernels.observe import observe_triton
from lightning_qat.ops.fake_quantize import reference_fake_quantize


def expected_range(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    axis, group = case.grid[2:]
    if axis >= 0:
        rows = case.x.movedim(axis, 0).reshape(case.x.shape[axis], -1)
    else:
        rows = case.x.reshape(-1, group or case.x.numel())
    return torch.aminmax(rows.float(), dim=1)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(case=cases())
def test_equals_both_alone(device: str, poisoned: None, case: Case) -> None:
    arguments = case.on(device)
    result, low, high = observe_triton(*arguments)
    assert same(result, reference_fake_quantize(case.x, case.scale, case.zero_point, *case.grid))
    assert result.stride() == torch.empty_like(arguments[0]).stride()
    for actual, expected in zip((low, high), expected_range(case), strict=True):
        assert same(actual, expected.reshape(case.scale.shape))


@pytest.mark.parametrize("axis", [-1, 0, 1])
def test_one_nan_among_many_tiles(device: str, poisoned: None, monkeypatch: pytest.MonkeyPatch, axis: int) -> None:
    monkeypatch.setattr(tiles_file, "_FEW_BYTES", 512)
    x = torch.randn(30, 300, generator=torch.Generator().manual_seed(0))
    x[17, 200] = torch.nan
    x[3, 4], x[29, 299] = 50.0, -60.0
    scale = torch.ones(x.shape[axis] if axis >= 0 else 1, device=device)
    _, low, high = observe_triton(x.to(device), scale, None, -8, 7, axis, 0)
    rows = x.movedim(axis, 0) if axis >= 0 else x.reshape(1, -1)
    expected = torch.aminmax(rows, dim=1)
    assert same(low, expected.min)
    assert same(high, expected.max)

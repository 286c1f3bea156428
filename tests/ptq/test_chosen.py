"""The loss of codes is that of a layer's outputs."""

from __future__ import annotations

import pytest
import torch
from tensors import randn

from lightning_qat.ptq import chosen
from lightning_qat.ptq.chosen import output_error


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (7, 30), (30, 7), (65, 129)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_is_the_squared_error_of_the_outputs(
    monkeypatch: pytest.MonkeyPatch, rows: int, columns: int, dtype: torch.dtype
) -> None:
    inputs = randn(50, columns)
    weight, values = randn(rows, columns, seed=1).to(dtype), randn(rows, columns, seed=2).to(dtype)
    expected = float((inputs.double() @ (weight.double() - values.double()).t()).square().sum())
    gram = inputs.t() @ inputs
    for error_rows, error_columns in ((512, 1024), (16, 10), (1, 1)):
        monkeypatch.setattr(chosen, "_ERROR_ROWS", error_rows)
        monkeypatch.setattr(chosen, "_ERROR_COLUMNS", error_columns)
        assert output_error(weight, values, gram) == pytest.approx(expected, rel=1e-5)
    assert output_error(weight, weight, gram) == 0.0

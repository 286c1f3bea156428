"""The kernel that walks through columns: codes and errors of the definitions, bit for bit."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import aot
from tensors import randn
from torch import Tensor

from lightning_qat.kernels import gptq as kernels
from lightning_qat.ops.codebook_tables import bin_codes, codebook, thresholds
from lightning_qat.ops.coordinate_descent import reference_descend_block
from lightning_qat.ops.gptq import reference_gptq_block

GRIDS = ("int4", "uint3", "int8", "nf4", "dynamic_tree")


def levels(grid: str, device: str) -> tuple[int, int, Tensor | None, Tensor | None]:
    if grid in ("nf4", "fp4", "dynamic_tree"):
        order = bin_codes(grid, "cpu", device).long()
        return 0, len(order) - 1, codebook(grid, device)[order], thresholds(grid, "cpu", device)
    bits = int(grid[-1])
    return (0, 2**bits - 1, None, None) if grid[0] == "u" else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1, None, None)


@st.composite
def blocks(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """Return columns, the matrix that links them and steps."""
    count, rows = draw(st.sampled_from((1, 5, 17))), draw(st.sampled_from((1, 15, 18)))
    seed = draw(st.integers(0, 2**16))
    columns, step = randn(count, rows, seed=seed), randn(count, rows, seed=seed + 1).abs() + 0.05
    matrix = randn(count, count, seed=seed + 2) * 0.3
    matrix.diagonal().copy_(randn(count, seed=seed + 3).abs() + 0.2)
    if draw(st.booleans()):
        columns.view(-1)[: min(3, columns.numel())] = 0.0
    if draw(st.booleans()):
        columns = columns.t().contiguous().t()
    return columns, matrix, step


def on(device: str, *tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.to(device) for t in tensors]


@pytest.mark.parametrize("grid", GRIDS)
@given(block=blocks())
@settings(max_examples=5, deadline=None)
def test_codes_and_errors_equal_the_definitions(device: str, grid: str, block: tuple[Tensor, Tensor, Tensor]) -> None:
    columns, matrix, step = block
    zero = torch.randint(0, 2 ** int(grid[-1]), step.shape).float() if grid.startswith("u") else None
    grid_ = levels(grid, "cpu")
    low, high, values, limits = levels(grid, device)
    arguments = (*on(device, matrix, step, zero), low, high, values, limits)
    codes, errors = kernels.launch_gptq_block(columns.to(device), *arguments)
    expected, exact = reference_gptq_block(columns, matrix, step, zero, *grid_)
    assert codes.dtype == torch.int16
    assert torch.equal(codes.cpu(), expected)
    assert torch.equal(errors.cpu(), exact)
    current = randn(*columns.shape, seed=9)
    codes, errors = kernels.launch_descend_block(columns.to(device), current.to(device), *arguments)
    expected, exact = reference_descend_block(columns, current, matrix, step, zero, *grid_)
    assert torch.equal(codes.cpu(), expected)
    assert torch.equal(errors.cpu(), exact)


def test_a_whole_block(device: str) -> None:
    columns, matrix, step = randn(128, 5), randn(128, 128, seed=1) * 0.1, randn(128, 5, seed=2).abs() + 0.05
    matrix.diagonal().fill_(1.5)
    codes, errors = kernels.launch_gptq_block(*on(device, columns, matrix, step, None), -8, 7, None, None)
    expected, exact = reference_gptq_block(columns, matrix, step, None, -8, 7, None, None)
    assert torch.equal(codes.cpu(), expected)
    assert torch.equal(errors.cpu(), exact)


@pytest.mark.parametrize("grid", ["int4", "nf4"])
def test_everything_is_written_and_nothing_else(device: str, grid: str, poisoned: None) -> None:
    columns, matrix = randn(40, 21), torch.eye(40) + randn(40, 40, seed=1).triu(1) * 0.1
    step = torch.ones(40, 21)
    step[3] = 0.0 if grid == "nf4" else 1.0  # a block of zeros
    arguments = (*on(device, columns, matrix, step, None), *levels(grid, device))
    codes, errors = kernels.launch_gptq_block(*arguments)
    expected, exact = reference_gptq_block(columns, matrix, step, None, *levels(grid, "cpu"))
    assert torch.equal(codes.cpu(), expected)
    assert torch.equal(errors.cpu(), exact)


def test_ties_go_to_the_even_code(device: str) -> None:
    halves = (torch.arange(-20, 20) / 2).reshape(1, -1)
    one = torch.ones(1, 1, device=device)
    codes, _ = kernels.launch_gptq_block(
        halves.to(device), one, torch.ones_like(halves).to(device), None, -8, 7, None, None
    )
    assert codes.cpu().tolist()[0] == [min(max(round(h), -8), 7) for h in halves.tolist()[0]]


def test_nan_in_a_table_is_last(device: str) -> None:
    x = torch.tensor([[math.nan, 0.3]])
    one = torch.ones(1, 1, device=device)
    codes, _ = kernels.launch_gptq_block(
        x.to(device), one, torch.ones(1, 2, device=device), None, *levels("nf4", device)
    )
    expected, _ = reference_gptq_block(x, torch.ones(1, 1), torch.ones(1, 2), None, *levels("nf4", "cpu"))
    assert torch.equal(codes.cpu(), expected)


def test_empty_and_too_much(device: str) -> None:
    def launch(count: int, rows: int, table: Tensor | None = None) -> tuple[Tensor, Tensor]:
        block = torch.ones(count, rows, device=device)
        return kernels.launch_gptq_block(block, torch.eye(count, device=device), block, None, -8, 7, table, table)

    assert launch(3, 0)[0].shape == launch(0, 3)[1].T.shape == (3, 0)
    with pytest.raises(ValueError, match="129 columns have no kernel; use blocks of up to 128"):
        launch(129, 2)
    with pytest.raises(ValueError, match="a table of 5 values has no kernel"):
        launch(2, 2, torch.ones(5, device=device))


# --- the compiler ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(kernels.TUNED))
def test_compiles_without_spills(compiler: None, name: str) -> None:
    aot.check(kernels.TUNED[name])


@pytest.mark.parametrize("name", ["gptq-symmetric", "descend-zero"])
def test_quotients_are_rounded_and_nothing_is_fused(compiler: None, name: str) -> None:
    text = aot.ptx(kernels.TUNED[name])
    assert "div.rn.f32" in text
    assert "fma" not in text
    assert "div.full" not in text

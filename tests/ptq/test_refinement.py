"""Codes and scales in turn: the loss never grows, whatever shares a scale; and scales of least weighted error."""

from __future__ import annotations

import pytest
import torch
from ptq.test_gptq import CONFIGS, layer
from torch import Tensor

from lightning_qat.ops.gptq import values_of_levels
from lightning_qat.ptq.column_grid import codes_of_levels, column_grid, part_columns
from lightning_qat.ptq.refinement import refine
from lightning_qat.ptq.scale_search import search_scales
from lightning_qat.schemes import CodebookScheme, TensorFormat, get_scheme, rows_of, weight_format

NAMES = [name for name in CONFIGS if "nested" not in name]


def started(name: str) -> tuple[Tensor, Tensor, TensorFormat, Tensor, object]:
    """Return weight, damped Gram matrix, format, nearest codes as the ops have them, and their grid."""
    weight, gram = layer(20, 192)
    gram.diagonal().add_(0.01 * gram.diagonal().mean())
    fmt = weight_format(CONFIGS[name], weight.shape)
    scheme = get_scheme(fmt.scheme)
    scale, zero = scheme.parameters_of(weight, fmt)
    grid = column_grid(fmt, weight.shape, scale, zero)
    codes = scheme.quantize(weight, scale, zero, fmt)
    if isinstance(scheme, CodebookScheme):
        order = codes_of_levels(torch.arange(len(grid.levels.values), dtype=torch.int16)[None], fmt).reshape(-1)
        codes = (codes[..., None] == order).int().argmax(-1)
    return weight, gram, fmt, codes.t().to(torch.int16).contiguous(), grid


def loss(weight: Tensor, gram: Tensor, codes: Tensor, grid) -> float:
    columns = torch.arange(len(codes))
    difference = weight.t().double() - values_of_levels(codes, grid.of(columns), grid.levels).double()
    return float(((gram.double() @ difference) * difference).sum())


@pytest.mark.parametrize("name", NAMES)
def test_the_grid_stands_for_the_values_of_the_scheme(name: str) -> None:
    weight, _, fmt, codes, grid = started(name)
    scheme = get_scheme(fmt.scheme)
    values = values_of_levels(codes, grid.of(torch.arange(192)), grid.levels).t()
    expected = scheme.fake_quantize(weight, *scheme.parameters_of(weight, fmt), fmt)
    torch.testing.assert_close(values, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("refits", [True, False])
@pytest.mark.parametrize("block_size", [48, 128, 512])
def test_each_sweep_loses_less(name: str, refits: bool, block_size: int) -> None:
    weight, gram, fmt, codes, grid = started(name)
    width = part_columns(fmt, weight.shape) if refits else None
    shared = fmt.axis is None and fmt.group_size is None and fmt.block_size is None
    losses, steps = [loss(weight, gram, codes, grid)], grid.step.clone()
    for sweeps in (1, 2, 4):
        found, other, told = refine(
            weight.t().contiguous(), codes, gram, grid, sweeps=sweeps, width=width, shared_by_rows=shared,
            block_size=block_size,
        )  # fmt: skip
        assert torch.equal(grid.step, steps)
        losses.append(loss(weight, gram, found, other))
        assert told == pytest.approx(losses[-1], rel=1e-4)
        assert torch.equal(other.step, steps) == (width is None)
        if shared:
            assert other.step.unique().numel() == 1
    assert all(after <= before * (1 + 1e-6) for before, after in zip(losses, losses[1:], strict=False))  # noqa: RUF007
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("name", ["int4 groups", "int4 groups asymmetric", "int8 rows", "int4 tensor", "nf4"])
def test_a_refitted_scale_is_that_of_least_squares(name: str) -> None:
    """After many sweeps nothing moves any more: the derivative of the loss by each scale is zero."""
    weight, gram, fmt, codes, grid = started(name)
    shared = name == "int4 tensor"
    for _ in range(6):
        codes, grid, _ = refine(
            weight.t().contiguous(), codes, gram, grid, sweeps=30, width=part_columns(fmt, weight.shape),
            shared_by_rows=shared,
        )  # fmt: skip
    step = grid.step.double().requires_grad_()
    zero = 0 if grid.zero is None else grid.zero[grid.part_of].double()
    units = codes.double() - zero if grid.levels.values is None else grid.levels.values[codes.long()].double()
    difference = weight.t().double() - units * step[grid.part_of]
    ((gram.double() @ difference) * difference).sum().backward()
    slopes = step.grad.sum()[None] if shared else step.grad
    curvature = torch.stack([
        (gram[p][:, p].double() @ units[p] * units[p]).sum(0) for p in
        ((grid.part_of == i).nonzero().squeeze(1) for i in range(len(step)))
    ])  # fmt: skip
    moves = (slopes / curvature).abs() / step.detach() if not shared else slopes.abs() / curvature.sum() / step[0, 0]
    assert float(moves.detach().max()) < 0.01


@pytest.mark.parametrize("name", list(CONFIGS))
def test_searched_scales_lose_no_more_than_those_of_the_extremes(name: str) -> None:
    weight, gram = layer(20, 192)
    fmt = weight_format(CONFIGS[name], weight.shape)
    scheme, importance = get_scheme(fmt.scheme), gram.diagonal()
    errors = []
    for scale, zero in (scheme.parameters_of(weight, fmt), search_scales(weight, fmt, importance)):
        errors.append(rows_of((scheme.fake_quantize(weight, scale, zero, fmt) - weight) ** 2 * importance, fmt).sum(1))
    if fmt.nested:  # stored scales depend on each other
        assert errors[1].sum() < errors[0].sum()
    else:
        assert bool((errors[1] <= errors[0] * (1 + 1e-6)).all())
        assert errors[1].sum() < 0.97 * errors[0].sum()


def test_the_search_finds_what_a_finer_one_finds() -> None:
    weight, gram = layer(20, 64)
    importance, fmt = gram.diagonal(), TensorFormat("int4", 3, True, axis=0)
    scheme = get_scheme("int4")
    scale, _ = search_scales(weight, fmt, importance)
    error = ((scheme.fake_quantize(weight, scale, None, fmt) - weight) ** 2 * importance).sum(1)
    own = scheme.parameters_of(weight, fmt)[0]
    best = torch.stack([
        ((scheme.fake_quantize(weight, own * share, None, fmt) - weight) ** 2 * importance).sum(1)
        for share in torch.linspace(0.3, 1.0, 300)
    ]).amin(0)  # fmt: skip
    assert error.sum() < 1.1 * best.sum()


def test_a_row_of_zeros_keeps_a_scale() -> None:
    weight = torch.zeros(3, 64)
    for fmt in (TensorFormat("int4", 4, True, group_size=32), TensorFormat("int4", 4, False, axis=0)):
        scale, _ = search_scales(weight, fmt, torch.ones(64))
        assert bool((scale > 0).all())

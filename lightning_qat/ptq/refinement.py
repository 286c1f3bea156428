"""Codes and scales that are made better in turn, each with all others fixed: the loss never grows."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_qat.ops.coordinate_descent import descend_block_op
from lightning_qat.ops.gptq import units_of_levels, values_of_levels
from lightning_qat.ptq.column_grid import ColumnGrid

#: Columns whose changes reach the products of all others at once: those of fewer are slow, for they go through memory
#: as often. 4096 x 4096, a sweep: 1.0 s, and 1.5 s with 128 (one core of a busy machine).
_PANEL = 512
#: Sweeps end once one makes the loss smaller by less than this share.
_LEAST_GAIN = 1e-3
#: A refitted scale keeps at least this share of what it was: negative ones would turn codes around.
_LEAST_SCALE = 0.25


@dataclass(eq=False)
class _State:
    """Transposed, ``[in_features, out_features]``: codes, values ``Q`` and products ``P = H (W - Q)^T``."""

    codes: Tensor
    values: Tensor
    products: Tensor


def refine(
    weight: Tensor,
    codes: Tensor,
    hessian: Tensor,
    grid: ColumnGrid,
    *,
    sweeps: int,
    width: int | None,
    shared_by_rows: bool = False,
    block_size: int = 128,
) -> tuple[Tensor, ColumnGrid, float]:
    """Return better codes for a weight, the grid with refitted scales, and ``tr((W - Q) H (W - Q)^T)``.

    Args:
        weight: float32 ``[in_features, out_features]``, transposed.
        codes: as :func:`lightning_qat.ops.gptq.gptq_columns` returns them.
        hessian: float32 ``[in_features, in_features]``, symmetric, with a positive diagonal.
        grid: that codes are of.
        sweeps: most passes over all columns.
        width: neighbouring columns that share scales, which are then refitted by least squares; None keeps them.
        shared_by_rows: whether all rows have the same scale.
        block_size: columns of a block.
    """
    columns = torch.arange(len(weight), device=weight.device)
    grid = replace(grid, step=grid.step.clone())
    state = _State(codes.clone(), values_of_levels(codes, grid.of(columns), grid.levels), torch.empty_like(weight))
    torch.mm(hessian, weight - state.values, out=state.products)
    loss = _loss(weight, state)
    for _ in range(sweeps):
        before = loss
        _sweep(state, hessian, grid, width, shared_by_rows, block_size)
        loss = _loss(weight, state)
        if loss > before * (1 - _LEAST_GAIN):
            break
    return state.codes, grid, loss


def _loss(weight: Tensor, state: _State) -> float:
    return float((weight - state.values).mul_(state.products).sum(1).sum(dtype=torch.float64))


def _sweep(
    state: _State, hessian: Tensor, grid: ColumnGrid, width: int | None, shared_by_rows: bool, block_size: int
) -> None:
    size = len(hessian)
    if width is not None and width > block_size:
        for start in range(0, size, width):
            stop = min(start + width, size)
            change = _refit(state, hessian[start:stop, start:stop], grid, start, stop, None, shared_by_rows)
            state.products.addmm_(hessian[:, start:stop], change, alpha=-1)
        width = None
    step = block_size if width is None else max(block_size // width, 1) * width
    panel = max(_PANEL // step, 1) * step
    for first in range(0, size, panel):
        last = min(first + panel, size)
        before = state.values[first:last].clone()
        for start in range(first, last, step):
            local = state.products[start : min(start + step, size)].clone()
            if start > first:
                changes = state.values[first:start] - before[: start - first]
                local.addmm_(hessian[start : start + len(local), first:start], changes, alpha=-1)
            _sweep_block(state, local, hessian, grid, start, width, shared_by_rows)
        state.products.addmm_(hessian[:, first:last], before.sub_(state.values[first:last]))


def _sweep_block(
    state: _State, local: Tensor, hessian: Tensor, grid: ColumnGrid, start: int, width: int | None, shared_by_rows: bool
) -> None:
    """Refit and round the columns from ``start`` on, part by part; ``local`` are their products, **changed**."""
    stop = start + len(local)
    inside = hessian[start:stop, start:stop].contiguous()
    for first in range(start, stop, width or stop - start):
        last = min(first + width, stop) if width else stop
        here = slice(first - start, last - start)
        own = inside[here, here].contiguous()
        if width is not None:
            change = _refit(state, own, grid, first, last, local[here], shared_by_rows)
            local[here.start :].addmm_(inside[here.start :, here], change, alpha=-1)
        steps = grid.of(torch.arange(first, last, device=local.device))
        codes, change = descend_block_op(local[here], state.values[first:last], own, *steps, *grid.levels)
        state.codes[first:last] = codes
        state.values[first:last] += change
        if here.stop < len(local):
            local[here.stop :].addmm_(inside[here.stop :, here], change, alpha=-1)


def _refit(
    state: _State,
    own: Tensor,
    grid: ColumnGrid,
    start: int,
    stop: int,
    products: Tensor | None,
    shared_by_rows: bool,
) -> Tensor:
    """Give a part the scales of least loss for its codes; return what they add to its values."""
    products = state.products[start:stop] if products is None else products
    part = int(grid.part_of[start])
    zero = None if grid.zero is None else grid.zero[part]
    units = units_of_levels(state.codes[start:stop], zero, grid.levels)
    gain, curvature = (units * products).sum(0), ((own @ units) * units).sum(0)
    if shared_by_rows:
        gain, curvature = gain.sum().expand_as(gain), curvature.sum().expand_as(curvature)
    old = grid.step[part].clone()
    best = old + torch.where(curvature > 0, gain / curvature, 0.0)
    new = torch.where(torch.isfinite(best), torch.maximum(best, old * _LEAST_SCALE), old)
    grid.step[part] = new
    change = units * new - state.values[start:stop]
    state.values[start:stop] += change
    return change

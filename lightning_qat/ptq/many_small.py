"""Codes for the many small matrices of a grouped convolution, all at once.

A depthwise convolution of 960 channels is 960 problems of one row and 9 columns. Coordinate descent from the nearest
codes solves them together: for each column in turn every row takes the code that is best with all others as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_qat.ptq.chosen import ChosenCodes
from lightning_qat.schemes import TensorFormat, get_scheme

_SWEEPS = 8


@torch.no_grad()
def choose_many_small(
    weight: Tensor,
    grams: Tensor,
    fmt: TensorFormat,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
) -> ChosenCodes:
    """Return codes that no change of a single one makes better; the loss is at most that of the nearest codes.

    Args:
        weight: ``[groups * N, K]``.
        grams: ``[groups, K, K]``, of the inputs of each group.
        fmt: of the codes; any whose scales do not depend on them.
        scale: of a given grid, shaped as the format says; None takes that of the extremes.
        zero_point: of a given grid.
    """
    scheme, groups = get_scheme(fmt.scheme), len(grams)
    weight = weight.float()
    extremes = scheme.parameters_of(weight, fmt)
    steps, zero = extremes if scale is None else (scale, zero_point)
    effective = scheme.effective_scale(steps, fmt)

    def on_grid(x: Tensor) -> Tensor:
        return scheme.dequantize(scheme.quantize(x, steps, zero, fmt), effective, zero, fmt, torch.float32)

    values = on_grid(weight)
    power = grams.diagonal(dim1=-2, dim2=-1)  # [groups, K]
    per_row = power.repeat_interleave(len(weight) // groups, 0)
    nearest_loss = float(_losses(weight - values, grams).sum())
    for _ in range(_SWEEPS):
        before = values.clone()
        for k in range(weight.shape[1]):
            error = weight - values
            pull = torch.bmm(error.unflatten(0, (groups, -1)), grams[:, :, k : k + 1]).flatten()
            wanted = values.clone()
            alive = per_row[:, k] > 0
            wanted[:, k] = torch.where(alive, values[:, k] + pull / per_row[:, k].clamp_min(1e-30), values[:, k])
            moved = values.clone()
            moved[:, k] = on_grid(wanted)[:, k]
            # Rounding to the nearest code is the best one up to float rounding: a row that would lose stays.
            gains = _losses(weight - moved, grams) < _losses(weight - values, grams)
            values = torch.where(gains.unsqueeze(1), moved, values)
        if torch.equal(before, values):
            break
    codes = scheme.quantize(values, steps, zero, fmt)
    loss = float(_losses(weight - values, grams).sum())
    plain = nearest_loss
    if scale is not None:
        rounded = scheme.quantize(weight, *extremes, fmt)
        base = scheme.effective_scale(extremes[0], fmt)
        plain = float(_losses(weight - scheme.dequantize(rounded, base, extremes[1], fmt, torch.float32), grams).sum())
    return ChosenCodes(codes, steps, None if fmt.symmetric else zero, fmt, loss, plain)


def _losses(error: Tensor, grams: Tensor) -> Tensor:
    """Return the loss of each row, float64."""
    parts = error.unflatten(0, (len(grams), -1)).double()
    return (torch.bmm(parts, grams.double()) * parts).sum(-1).flatten()

"""Stochastic rounding: to one of the two neighbours, so that the expectation is the value.

Source: Gupta et al. 2015, "Deep Learning with Limited Numerical Precision".
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_qat.ops.affine import codes_dtype
from lightning_qat.ops.fake_quantize import resolve_grid
from lightning_qat.ops.layout import match_layout, resolve_layout, view_parameter, view_runs


def round_stochastically(values: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Return float32 ``values`` rounded down, or up with the probability of their fraction; whole numbers stay.

    Args:
        values: float32, any shape.
        generator: of the random numbers, on the device of ``values``; None is PyTorch's own.
    """
    below = torch.floor(values)
    # Not floor(values + noise): that sum is rounded, which lifts whole numbers now and then.
    noise = torch.rand(values.shape, generator=generator, device=values.device, dtype=torch.float32)
    return below + (noise < values - below)


def quantize_affine_stochastically(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    bits: int,
    symmetric: bool,
    axis: int | None = None,
    group_size: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return integer codes of ``x`` rounded stochastically; arguments and errors as in ``quantize_affine``.

    Unbiased for values within the range; beyond it they are clamped.
    """
    quant_min, quant_max = resolve_grid(zero_point, bits, symmetric)
    op_axis, group = resolve_layout(x, scale, zero_point, axis, group_size)
    dtype = codes_dtype(bits, symmetric)
    if x.numel() == 0:
        return torch.empty_like(x, dtype=dtype)
    values = view_runs(x, group).to(torch.float32)
    codes = round_stochastically(values / view_parameter(scale, x.dim(), op_axis, group), generator)
    if zero_point is not None:
        codes = codes + torch.round(view_parameter(zero_point, x.dim(), op_axis, group))
    return match_layout(codes.clamp(quant_min, quant_max).to(dtype).reshape(x.shape), x)

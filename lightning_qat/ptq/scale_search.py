"""Scales of least squared error: a part of the range that the weights have, tried in steps."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_qat.schemes import TensorFormat, get_scheme, rows_of, scale_shape

#: Smallest share of the range that is tried, and the steps up to the whole: first coarse ones, then fine ones between
#: the neighbours of the best.
LEAST_SHARE, COARSE, FINE = 0.4, 12, 6


def search_scales(weight: Tensor, fmt: TensorFormat, importance: Tensor) -> tuple[Tensor, Tensor]:
    """Return scale and zero point with the least ``importance * (value - weight)**2`` of each part that shares them.

    Each scale is that of the weights' own range, made smaller by a factor of its own; what lies beyond is cut.

    Args:
        weight: float32 ``[out_features, in_features]``.
        fmt: integers or a codebook.
        importance: of the columns, float32 ``[in_features]``, not negative; the diagonal of the Gram matrix makes the
            error that of the outputs as far as inputs are uncorrelated.

    Returns:
        Both shaped as ``scale_shape(weight.shape, fmt)``, as ``Scheme.parameters`` gives them.
    """
    scheme, shape, rows = get_scheme(fmt.scheme), scale_shape(weight.shape, fmt), rows_of(weight, fmt)
    low, high = rows.amin(1), rows.amax(1)
    if fmt.symmetric:
        high = torch.maximum(high, -low)
        low = -high
    factors = importance.expand_as(weight)
    best = torch.full_like(high, torch.inf)
    share = torch.ones_like(high)

    def attempt(shares: Tensor) -> None:
        scale, zero = scheme.parameters((low * shares).reshape(shape), (high * shares).reshape(shape), fmt)
        errors = scheme.fake_quantize(weight, scale, zero, fmt).sub_(weight).square_().mul_(factors)
        error = rows_of(errors, fmt).sum(1)
        better = error < best
        torch.where(better, error, best, out=best)
        torch.where(better, shares, share, out=share)

    for step in range(COARSE + 1):
        attempt(torch.full_like(high, 1 - (1 - LEAST_SHARE) * step / COARSE))
    width, middle = (1 - LEAST_SHARE) / COARSE, share.clone()
    for step in range(1, FINE):
        offset = width * (2 * step / FINE - 1)
        if offset:
            attempt((middle + offset).clamp(LEAST_SHARE / 2, 1.0))
    scale, zero = scheme.parameters((low * share).reshape(shape), (high * share).reshape(shape), fmt)
    return scale, zero

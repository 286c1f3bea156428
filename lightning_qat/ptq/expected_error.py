"""Input scales of least expected error: a convex problem.

Rounding errors are spread evenly over a step and independent of each other, so a weight ``W`` that is quantized as
``Q(W s) / s`` is expected to lose ``sum_ij step_ig(s)**2 / 12 * c_j / s_j**2``, where ``step_ig`` is the step of row
``i`` in the group ``g`` that column ``j`` belongs to, proportional to ``max_j |W_ij| s_j``, and ``c`` is what an error
of a column costs: the diagonal of the Gram matrix where codes are rounded to nearest, the conditional variances of the
inputs where the columns that follow make up for it, as in GPTQ. In ``log s`` this is a sum of largest exponentials of
linear functions: convex, so that descent from anywhere ends at the best there is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_qat.ptq.column_grid import part_columns
from lightning_qat.schemes import TensorFormat

#: Of Adam, in units of ``log s``; it falls to nothing over the steps.
_RATE = 0.02
_BETAS = (0.9, 0.99)


def conditional_variances(gram: Tensor, damping: float) -> Tensor:
    """Return what is left of each input's power once those that come after it are known, float32 ``[K]``.

    They come in the order of falling power, as GPTQ takes them. The Cholesky factor of the Gram matrix, reversed, has
    their roots on its diagonal.

    Args:
        gram: ``[K, K]``.
        damping: share of the mean diagonal that is added to the diagonal.
    """
    power = gram.diagonal().double()
    order = power.argsort(descending=False, stable=True)
    ordered = gram[order][:, order].double()
    added, least = damping * float(power.mean()), 1e-6 * float(power.mean()) or 1.0
    while True:
        damped = ordered.clone()
        damped.diagonal().add_(added)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not bool(failed):
            break
        added = max(10 * added, least)
    left = torch.empty_like(power)
    left[order] = factor.diagonal().square()
    return left.float()


def least_expected_error(
    weights: Sequence[Tensor],
    formats: Sequence[TensorFormat],
    cost: Tensor,
    start: Tensor,
    *,
    steps: int,
    tied: Tensor | None = None,
) -> Tensor:
    """Return the scales of least expected error, float32 ``[K]``.

    Args:
        weights: float32 ``[N_i, K]``; some of the rows are enough.
        formats: of the weights.
        cost: of an error in each column, ``[K]``, not negative.
        start: scales to begin with, ``[K]``.
        steps: of the descent.
        tied: see :func:`lightning_qat.ptq.awq.search_scales`.
    """
    cost = cost / cost.mean().clamp_min(1e-30)
    logs = start.log() if tied is None else start.log()[first_of_each(tied)]
    mean, square = torch.zeros_like(logs), torch.zeros_like(logs)
    for step in range(steps):
        scales = (logs if tied is None else logs[tied]).exp()
        error, gradient = _error_and_gradient(weights, formats, cost, scales)
        gradient = gradient / max(error, 1e-30)
        if tied is not None:
            gradient = torch.zeros_like(logs).index_add_(0, tied, gradient)
        mean = _BETAS[0] * mean + (1 - _BETAS[0]) * gradient
        square = _BETAS[1] * square + (1 - _BETAS[1]) * gradient.square()
        unbiased = mean / (1 - _BETAS[0] ** (step + 1))
        size = (square / (1 - _BETAS[1] ** (step + 1))).sqrt().add_(1e-12)
        logs = logs - _RATE * (1 - step / steps) * unbiased / size
    return logs.exp() if tied is None else logs.exp()[tied]


def first_of_each(tied: Tensor) -> Tensor:
    """Return where each of the values ``0 .. max`` of ``tied`` stands first."""
    count = int(tied.max()) + 1
    places = torch.arange(len(tied), device=tied.device)
    return torch.full((count,), len(tied), device=tied.device).scatter_reduce_(0, tied, places, "amin")


def _error_and_gradient(
    weights: Sequence[Tensor], formats: Sequence[TensorFormat], cost: Tensor, scales: Tensor
) -> tuple[float, Tensor]:
    """Return the expected error, but for a factor, and its gradient with respect to the logarithms of the scales."""
    total, gradient = 0.0, torch.zeros_like(scales)
    share = cost / scales.square()
    for weight, fmt in zip(weights, formats, strict=True):
        width = part_columns(fmt, weight.shape) or weight.shape[1]
        groups = (weight * scales).view(len(weight), -1, width)
        in_group = share.view(-1, width)
        if fmt.symmetric:
            high, at = groups.abs().max(2)
            extremes = [(high, at)]
            span = 2 * high
        else:
            (high, at), (low, low_at) = groups.max(2), groups.neg_().max(2)
            span = high.clamp_min(0) + low.clamp_min(0)
            extremes = [(high.clamp_min(0), at), (low.clamp_min(0), low_at)]
        steps = span / (2**fmt.bits - 1)
        power, costs = steps.square().sum(0), in_group.sum(1)  # of each group
        total += float((power * costs).sum())
        own = torch.zeros_like(in_group)
        for bound, place in extremes:
            # The step grows with the logarithm of the scale at its extreme by bound / span of itself.
            part = steps.square() * (bound / span.clamp_min(1e-30)) * (1.0 if len(extremes) == 2 else 2.0)
            own.scatter_add_(1, place.t().contiguous(), part.t().contiguous())
        gradient += (2 * (own * costs.unsqueeze(1) - power.unsqueeze(1) * in_group)).view(-1)
    return total, gradient

"""Moving the outliers of activations into weights before both are quantized (Xiao et al. 2023, SmoothQuant).

Where inputs and weights have 8 bits, scales ``s`` that weights are multiplied by and inputs divided even out the
channels of inputs, which share one step, at the cost of the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_qat.ptq.awq import check_group, of_first, scaled_loss
from lightning_qat.ptq.expected_error import first_of_each
from lightning_qat.ptq.statistics import InputStatistics
from lightning_qat.schemes import TensorFormat
from lightning_qat.validation import check_bool, check_fraction, check_int

#: As in the published code.
_LEAST = 1e-5
#: Scales have to bring the loss below this share of what it is without.
_LEAST_GAIN = 0.999


@dataclass(frozen=True, kw_only=True)
class SmoothingOptions:
    """How scales are chosen.

    Args:
        alpha: how much of the difficulty goes to the weights: ``s = max|x|**alpha / max|w|**(1 - alpha)``; None takes
            the value of least expected error, which may be to leave everything as it is.
        grid_points: values of ``alpha`` that are tried then, from 0 to 1.
        activation_bits: of the inputs, which share one step; in a prepared model those of its layers.
        keep_scales: see :class:`lightning_qat.ptq.awq.AWQOptions`.
    """

    alpha: float | None = None
    grid_points: int = 20
    activation_bits: int = 8
    keep_scales: bool = True

    def __post_init__(self) -> None:
        if self.alpha is not None:
            check_fraction("alpha", self.alpha, include_one=True)
        check_bool("keep_scales", self.keep_scales)
        check_int("grid_points", self.grid_points, 1)
        check_int("activation_bits", self.activation_bits, 2, 16)


@dataclass(frozen=True, eq=False)
class SmoothingScales:
    """What was chosen for weights that share an input.

    Args:
        scales: float32 ``[K]``: weights are to be multiplied by them, inputs divided.
        alpha: that gave them; None where leaving everything as it is is best.
        loss: expected squared error of the outputs.
        plain_loss: the same without scales.
    """

    scales: Tensor
    alpha: float | None
    loss: float
    plain_loss: float


def smoothing_scale(
    input_magnitude: Tensor, weights: Sequence[Tensor], alpha: float, tied: Tensor | None = None
) -> Tensor:
    """Return ``max|x|**alpha / max|w|**(1 - alpha)``, float32 ``[K]``; 1 where a channel is 0.

    Args:
        input_magnitude: largest ``|x|`` of each channel, ``[K]``.
        weights: ``[N_i, K]`` each.
        alpha: 0 to 1.
        tied: inputs with the same number get the same scale, that of the largest among them.
    """
    largest = input_magnitude.float()
    of_weights = torch.stack([weight.float().abs().amax(0) for weight in weights]).amax(0)
    if tied is not None:
        largest, of_weights = _largest_of_tied(largest, tied), _largest_of_tied(of_weights, tied)
    scale = largest.clamp_min(_LEAST).pow(alpha) / of_weights.clamp_min(_LEAST).pow(1 - alpha)
    return of_first(torch.where((largest > 0) & (of_weights > 0), scale.clamp_min(_LEAST), 1.0), tied)


@torch.no_grad()
def search_smoothing(
    weights: Sequence[Tensor],
    statistics: InputStatistics,
    formats: Sequence[TensorFormat],
    options: SmoothingOptions | None = None,
    tied: Tensor | None = None,
) -> SmoothingScales:
    """Return scales for weights that share an input which is quantized too.

    The expected error is that of the weights, from the Gram matrix, and that of inputs rounded with one step for all
    channels, ``step**2 / 12`` for each.

    Args:
        weights: ``[N_i, K]`` each.
        statistics: of the inputs.
        formats: of the weights.
        options: see :class:`SmoothingOptions`.
        tied: see :func:`lightning_qat.ptq.awq.search_scales`.

    Raises:
        ValueError: if shapes do not agree or there is no weight.
    """
    options = options or SmoothingOptions()
    check_group(weights, statistics.gram, statistics.max_magnitude, formats)
    weights = [weight.float() for weight in weights]
    ones = torch.ones_like(statistics.max_magnitude)
    plain = _expected_loss(weights, statistics, formats, ones, options.activation_bits)
    best = SmoothingScales(ones, None, plain, plain)
    points = range(options.grid_points + 1)
    for alpha in [i / options.grid_points for i in points] if options.alpha is None else [options.alpha]:
        scale = smoothing_scale(statistics.max_magnitude, weights, alpha, tied)
        loss = _expected_loss(weights, statistics, formats, scale, options.activation_bits)
        # What gains next to nothing is rounding: then all stays as it is.
        if loss < min(best.loss, _LEAST_GAIN * plain) or options.alpha is not None:
            best = SmoothingScales(scale, alpha, loss, plain)
    return best


def _expected_loss(
    weights: Sequence[Tensor],
    statistics: InputStatistics,
    formats: Sequence[TensorFormat],
    scale: Tensor,
    bits: int,
) -> float:
    step = 2 * float((statistics.max_magnitude / scale).max()) / (2**bits - 1)
    total = 0.0
    for weight, fmt in zip(weights, formats, strict=True):
        power = float((weight * scale).square().sum(dtype=torch.float64))
        total += scaled_loss(weight, scale, statistics.gram, fmt) + statistics.count * step**2 / 12 * power
    return total


def _largest_of_tied(values: Tensor, tied: Tensor) -> Tensor:
    largest = torch.zeros(len(first_of_each(tied)), device=values.device)
    return largest.scatter_reduce_(0, tied, values, "amax")[tied]

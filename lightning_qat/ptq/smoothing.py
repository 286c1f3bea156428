"""Moving the outliers of activations into weights before both are quantized (Xiao et al. 2023, SmoothQuant).

Where inputs and weights have 8 bits, scales ``s`` that weights are multiplied by and inputs divided even out the
channels of inputs, which share one step, at the cost of the weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_qat.ptq.awq import CODES, check_group, of_first, scaled_loss
from lightning_qat.ptq.expected_error import conditional_variances, first_of_each
from lightning_qat.ptq.statistics import InputStatistics
from lightning_qat.schemes import TensorFormat
from lightning_qat.validation import check_bool, check_choice, check_fraction, check_int

#: As in the published code.
_LEAST = 1e-5
#: Scales have to bring the loss below this share of what it is without.
_LEAST_GAIN = 0.999
#: The largest of a token's numbers is taken for their 8-norm, whose mean follows from their powers where the eighth
#: moment is known: 105 if they are normal, 1 if they are always as large. Halfway, in logarithms, the root mean square
#: of the largest came out at 0.8 to 1.2 times what it is for the inputs of MiniLM's layers.
_NORM, _MOMENT = 8, 105.0**0.5
#: Of values of ``alpha`` that lose next to the same, the least is taken, which trusts the batches least.
_NEXT_TO_THE_SAME = 1.1
#: Share of the mean diagonal that is added to a Gram matrix where it is factored, as :class:`AWQOptions` has it.
_DAMPING = 0.01


@dataclass(frozen=True, kw_only=True)
class SmoothingOptions:
    """How scales are chosen.

    Args:
        alpha: how much of the difficulty goes to the weights: ``s = max|x|**alpha / max|w|**(1 - alpha)``; None takes
            the value of least expected error, which may be to leave everything as it is.
        grid_points: values of ``alpha`` that are tried then, from 0 to 1, each with the largest weight of a column and
            with its root mean square in the place of ``max|w|``.
        activation_bits: of the inputs, which share one step; in a prepared model those of its layers.
        activation_range: what shares it: ``"tensor"`` or each ``"token"``; in a prepared model likewise.
        codes: how the weights' are chosen afterwards: ``"nearest"``, or ``"gptq"``, which lets later columns make up
            for an error.
        keep_scales: see :class:`lightning_qat.ptq.awq.AWQOptions`.
    """

    alpha: float | None = None
    grid_points: int = 20
    activation_bits: int = 8
    activation_range: str = "tensor"
    codes: str = "nearest"
    keep_scales: bool = True

    def __post_init__(self) -> None:
        if self.alpha is not None:
            check_fraction("alpha", self.alpha, include_one=True)
        check_bool("keep_scales", self.keep_scales)
        check_int("grid_points", self.grid_points, 1)
        check_int("activation_bits", self.activation_bits, 2, 16)
        check_choice("activation_range", self.activation_range, ("tensor", "token"))
        check_choice("codes", self.codes, CODES)


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
    input_magnitude: Tensor,
    weights: Sequence[Tensor],
    alpha: float,
    tied: Tensor | None = None,
    *,
    mean_square: bool = False,
) -> Tensor:
    """Return ``max|x|**alpha / max|w|**(1 - alpha)``, float32 ``[K]``; 1 where a channel is 0.

    Args:
        input_magnitude: largest ``|x|`` of each channel, ``[K]``.
        weights: ``[N_i, K]`` each.
        alpha: 0 to 1.
        tied: inputs with the same number get the same scale, that of the largest among them.
        mean_square: take the root mean square of a column for ``max|w|``.
    """
    largest = input_magnitude.float()
    of_weights = torch.cat([weight.float() for weight in weights])
    of_weights = of_weights.square().mean(0).sqrt() if mean_square else of_weights.abs().amax(0)
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
    *,
    calibrated: bool = False,
) -> SmoothingScales:
    """Return scales for weights that share an input which is quantized too.

    The expected error is that of the weights, from the Gram matrix, and that of inputs rounded with one step for all
    channels, ``step**2 / 12`` for each; a token's own step is worked out from the mean power of its channels. Ranges
    that are calibrated cut what other inputs have beyond them, the more the more channels fill the range.

    Args:
        weights: ``[N_i, K]`` each.
        statistics: of the inputs.
        formats: of the weights.
        options: see :class:`SmoothingOptions`.
        tied: see :func:`lightning_qat.ptq.awq.search_scales`.
        calibrated: whether the inputs' range is that of these statistics, instead of being found at run time.

    Raises:
        ValueError: if shapes do not agree or there is no weight.
    """
    options = options or SmoothingOptions()
    check_group(weights, statistics.gram, statistics.max_magnitude, formats)
    weights = [weight.float() for weight in weights]
    ones = torch.ones_like(statistics.max_magnitude)
    nearest = options.codes == "nearest" or statistics.gram.dim() == 1
    gram = statistics.gram if nearest else conditional_variances(statistics.gram, _DAMPING)

    def loss_of(scale: Tensor) -> float:
        lost = sum(scaled_loss(weight, scale, gram, fmt) for weight, fmt in zip(weights, formats, strict=True))
        power = torch.stack([(weight * scale).square().sum(0, dtype=torch.float64) for weight in weights]).sum(0)
        error = _step_square(statistics, scale, options) / 12 + (_cut(statistics, scale) if calibrated else 0.0)
        return lost + statistics.count * float((error * power).sum())

    plain = loss_of(ones)
    found: list[SmoothingScales] = []
    grid = [(i / options.grid_points, square) for i in range(options.grid_points + 1) for square in (False, True)]
    for alpha, square in grid if options.alpha is None else [(options.alpha, False)]:
        scale = smoothing_scale(statistics.max_magnitude, weights, alpha, tied, mean_square=square)
        loss = loss_of(scale)
        found.append(SmoothingScales(scale, alpha, loss, plain))
    least = min(each.loss for each in found)
    # What gains next to nothing is rounding: then all stays as it is.
    if options.alpha is None and not least < _LEAST_GAIN * plain:
        return SmoothingScales(ones, None, plain, plain)
    near = [each for each in found if each.loss <= min(_NEXT_TO_THE_SAME * least, _LEAST_GAIN * plain)] or found
    return min(near, key=lambda each: (each.alpha, each.loss))


def _step_square(statistics: InputStatistics, scale: Tensor, options: SmoothingOptions) -> float:
    """Return the mean square of the step of inputs divided by ``scale``."""
    largest = float((statistics.max_magnitude / scale).max())
    if options.activation_range == "token":
        gram = statistics.gram
        power = (gram if gram.dim() == 1 else gram.diagonal()).double() / max(statistics.count, 1) / scale.square()
        largest = min(largest, float(power.pow(_NORM // 2).mul(_MOMENT).sum().pow(1 / _NORM)))
    return (2 * largest / (2**options.activation_bits - 1)) ** 2


def _cut(statistics: InputStatistics, scale: Tensor) -> Tensor:
    """Return the mean square, ``[K]``, of what other inputs have beyond the largest that was seen in any channel.

    Tails are taken to be normal: of ``n`` numbers the largest ``m`` is the one that ``1 / n`` go beyond, then
    ``n**-(l / m)**2`` go beyond ``l``, by ``m**2 / (2 l log n)`` on the average. With few tokens this is far more than
    rounding where every channel fills the range: 7 times with 400, a fifteenth with 16,000.
    """
    largest = (statistics.max_magnitude / scale).double()
    limit, log = largest.max().clamp_min(1e-300), math.log(max(statistics.count, 2))
    beyond = torch.exp(-log * (limit / largest.clamp_min(1e-300)).square())
    return 2 * (largest.square() / (2 * limit * log)).square() * beyond


def _largest_of_tied(values: Tensor, tied: Tensor) -> Tensor:
    largest = torch.zeros(len(first_of_each(tied)), device=values.device)
    return largest.scatter_reduce_(0, tied, values, "amax")[tied]

"""What channels of inputs are divided by before these are quantized, and what that is worth.

Inputs with calibrated ranges have one step for all channels, so that a channel whose numbers are small gets few codes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lightning_qat.nn import QATLayer
from lightning_qat.quantizers.fake_quantizer import ActivationQuantizer
from lightning_qat.schemes import TensorFormat, get_scheme, rows_of, rows_to
from lightning_qat.validation import check_fraction, check_int

#: The least share of the largest channel that is told from nothing.
_LEAST_SHARE = 2.0**-10
#: The largest exponent where a clamp lies between: an image of another kind has larger numbers in some channels.
_MOST_CLAMPED = 0.5


@dataclass(frozen=True, kw_only=True)
class EqualizationOptions:
    """How channels are evened out.

    Args:
        alpha: how much, 0 to 1: scales are ``(max|x| / max of all channels) ** alpha``. At 1 every channel fills the
            range, and what calibration has not seen may leave it; at 0.5 half of the distance, in decibels, stays. None
            takes for each group of channels the value of least expected error; at most 0.5 where a clamp lies between,
            which would cut the rest off.
        grid_points: values of ``alpha`` that are tried then.
    """

    alpha: float | None = None
    grid_points: int = 10

    def __post_init__(self) -> None:
        if self.alpha is not None:
            check_fraction("alpha", self.alpha, include_one=True)
        check_int("grid_points", self.grid_points, 2)

    def alphas(self, ceiling: float) -> list[float]:
        """Return what is tried for channels that were clamped at ``ceiling``."""
        if self.alpha is not None:
            return [self.alpha]
        most = 1.0 if ceiling == math.inf else _MOST_CLAMPED
        points = (i / self.grid_points for i in range(1, self.grid_points + 1))
        return [alpha for alpha in points if alpha <= most]


@dataclass(frozen=True, eq=False)
class ChannelRange:
    """What was seen of the channels of one layer's inputs.

    Args:
        low, high: ``[channels]``.
        square: sum of ``x**2``, float64 ``[channels]``.
        count: how many numbers each channel had.
    """

    low: Tensor
    high: Tensor
    square: Tensor
    count: int

    def merged(self, other: ChannelRange) -> ChannelRange:
        """Return what was seen in both."""
        low, high = torch.minimum(self.low, other.low), torch.maximum(self.high, other.high)
        return ChannelRange(low, high, self.square + other.square.to(low.device), self.count + other.count)

    def divided_by(self, scale: Tensor) -> ChannelRange:
        """Return what would be seen of inputs divided by ``scale``, ``[channels]``."""
        return replace(self, low=self.low / scale, high=self.high / scale, square=self.square / scale.double().square())

    @property
    def largest(self) -> Tensor:
        """Largest ``|x|`` of each channel."""
        return torch.maximum(-self.low, self.high).clamp_min(0)


def equalizing_scales(
    largest: Sequence[Tensor], alpha: float, ceiling: float = math.inf, *, exact: bool = False
) -> Tensor:
    """Return what channels are to be divided by, float32 ``[channels]``, at most 1; 1 where a channel is 0.

    Args:
        largest: of each reader, the largest ``|x|`` of each channel.
        alpha: see :class:`EqualizationOptions`.
        ceiling: at which inputs were clamped; what was seen below it stays below it, but for rounding.
        exact: take powers of two, which no dtype rounds.
    """
    tiny = torch.finfo(torch.float32).tiny
    largest = [torch.where(values < tiny, 0.0, values.float()) for values in largest]
    tops = [values.max().clamp_min(tiny) if ceiling == math.inf else ceiling for values in largest]
    share = torch.stack([values / top for values, top in zip(largest, tops, strict=True)]).amax(0)
    exponent = alpha * share.clamp(_LEAST_SHARE, 1.0).log2()
    scales = torch.exp2(exponent.ceil() if exact else exponent)
    return torch.where(share > 0, scales, 1.0)


def by_input_channel(layer: nn.Module, weight: Tensor, factor: Tensor) -> Tensor:
    """Return the weight of a Linear or a convolution multiplied by ``factor``, one for each channel of its input."""
    groups = layer.groups if isinstance(layer, _ConvNd) else 1
    columns = factor.to(weight.device, weight.dtype).view(groups, 1, -1, 1)
    rows = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    return (rows * columns).reshape(weight.shape)


def expected_loss(layer: QATLayer, weight: Tensor, seen: ChannelRange) -> float:
    """Return the squared error that an output of ``layer`` is to be expected to have, summed over channels.

    Rounding is taken for noise of variance ``step**2 / 12``, independent from number to number.

    Args:
        layer: prepared.
        weight: that it would have.
        seen: what it would get.
    """
    steps = get_scheme(layer.weight_quantizer.format.scheme).parameters_of(weight, layer.weight_quantizer.format)[0]
    spread = _element_steps(steps, weight, layer.weight_quantizer.format).square() / 12
    loss = output_power(layer, spread.sqrt(), seen)
    quantizer = layer.input_quantizer
    if quantizer is not None and has_range(quantizer):
        low, high = seen.low.min().clamp(max=0), seen.high.max().clamp(min=0)
        if quantizer.format.symmetric:
            low = -torch.maximum(-low, high)
            high = -low
        step = float(high - low) / (2**quantizer.bits - 1)
        loss += step**2 / 12 * float(weight.square().sum(dtype=torch.float64))
    return loss


def _element_steps(steps: Tensor, weight: Tensor, fmt: TensorFormat) -> Tensor:
    """Return the step of each element of a weight."""
    rows = rows_of(weight, fmt)
    return rows_to(steps.reshape(-1, 1).expand(rows.shape), weight, fmt)


def output_power(layer: nn.Module, weight: Tensor, seen: ChannelRange) -> float:
    """Return the mean square of an output, summed over channels, as if the inputs were independent."""
    mean = (seen.square / max(seen.count, 1)).sqrt()
    return float(by_input_channel(layer, weight.double(), mean).square().sum())


def has_range(quantizer: ActivationQuantizer | None) -> bool:
    """Return whether inputs are quantized with a calibrated range."""
    return quantizer is not None and quantizer.observer is not None

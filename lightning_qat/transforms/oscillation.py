"""Weights that flip between two points of their grid, step after step: measured, dampened and frozen.

A straight-through gradient pushes a weight over the border between two codes and back. After Nagel et al. 2022,
"Overcoming Oscillations in Quantization-Aware Training" (https://arxiv.org/abs/2203.08797): a weight oscillates in a
step if its code changes in the other direction than it did the last time; how often is a moving average.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qat.nn import QATLayer
from lightning_qat.nn.computed_weight import weight_now
from lightning_qat.ops.fake_quantize import quant_range
from lightning_qat.quantizers.weight_quantizer import WeightQuantizer
from lightning_qat.schemes import IntegerScheme
from lightning_qat.transforms.penalty import add_gradient, weight_to_move

#: Weights that flip more often are said to oscillate, as in the paper's tables.
OSCILLATING = 0.005


def has_ordered_codes(layer: QATLayer) -> bool:
    """Whether the codes of the layer's weight are integers, between which there is a direction."""
    return isinstance(layer.weight_quantizer.scheme, IntegerScheme)


class LayerOscillation:
    """What is known of the codes of one layer's weight, all in the shape of the weight.

    It takes, for each weight, 1 byte of codes (2 above 8 bits), 1 of directions and 4 of frequencies; with freezing 4
    more of averages and 1 of the mask.

    Attributes:
        codes: of the step before.
        direction: int8, of the last change: -1, 1, or 0 before there was one.
        frequency: float32, moving average of whether a weight oscillates in a step, from 0 to 1.
        average: float32, moving average of the codes; None without freezing.
        frozen: which weights stay at their code; None without freezing.
        bits: of the codes; they mean something else once these change.
    """

    def __init__(self, codes: Tensor, bits: int, *, freezing: bool) -> None:
        self.codes, self.bits = codes, bits
        self.direction = torch.zeros_like(codes, dtype=torch.int8)
        self.frequency = torch.zeros_like(codes, dtype=torch.float32)
        self.average = codes.float() if freezing else None
        self.frozen = torch.zeros_like(codes, dtype=torch.bool) if freezing else None

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and the bits."""
        return {name: value for name, value in vars(self).items() if value is not None}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any], *, freezing: bool) -> LayerOscillation:
        """Return what :meth:`state_dict` described; averages begin at the codes if they were not kept."""
        made = cls(state["codes"], int(state["bits"]), freezing=freezing)
        names = ("direction", "frequency", *(("average", "frozen") if freezing else ()))
        vars(made).update({name: state[name] for name in names if name in state})
        return made

    def to(self, device: torch.device) -> None:
        """Move to ``device``, where nothing is done if it is there."""
        if self.codes.device != device:
            vars(self).update({k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)})

    @torch.no_grad()
    def observe(self, codes: Tensor, momentum: float) -> None:
        """Take in the codes of a step.

        Args:
            codes: of the weight now, of the same bits.
            momentum: how much this step counts.
        """
        if self.frozen is not None:
            codes = torch.where(self.frozen, self.codes, codes)
        # One byte is read and written in each of these passes, where a difference of codes would need two.
        change = (codes > self.codes).view(torch.int8) - (codes < self.codes).view(torch.int8)
        back = (change * self.direction).lt_(0)  # int8: 1 where a weight turns round
        self.frequency.mul_(1 - momentum).add_(back, alpha=momentum)
        self.direction = torch.where(change == 0, self.direction, change)
        if self.average is not None:
            self.average.mul_(1 - momentum).add_(codes, alpha=momentum)
        self.codes = codes

    @torch.no_grad()
    def freeze(self, threshold: float, ends: tuple[int, int] | None) -> None:
        """Let weights that flip more often than ``threshold`` stay at their average code.

        Args:
            threshold: of the frequency.
            ends: codes that no weight is frozen at; None allows all.
        """
        check_freezing(self)
        target = self.average.round()  # type: ignore[union-attr]
        caught = (self.frequency > threshold) & ~self.frozen  # type: ignore[operator]
        if ends is not None:
            caught &= (target > ends[0]) & (target < ends[1])
        self.codes = torch.where(caught, target.to(self.codes.dtype), self.codes)
        self.frozen |= caught  # type: ignore[operator]


def is_in_parameter(layer: QATLayer) -> bool:
    """Whether the weight of ``layer`` is a parameter or a part of one, as a projection of an attention: no copy."""
    return _holder(layer) is not None


def _holder(layer: QATLayer) -> nn.Parameter | None:
    """Return the parameter that the weight is, or is a part of."""
    own = layer._parameters.get("weight")
    if own is not None:
        return own
    weight, holders = weight_now(layer), layer.weight_parameters()
    same = len(holders) == 1 and weight.untyped_storage().data_ptr() == holders[0].untyped_storage().data_ptr()
    return holders[0] if same else None


def gradient_of(layer: QATLayer) -> Tensor | None:
    """Return the gradient of the weight, where it is; None where there is none."""
    holder = _holder(layer)
    if holder is None or holder.grad is None:
        return None
    weight = layer.weight
    if holder.grad.is_sparse or weight.shape == holder.shape:
        return holder.grad
    start = (weight.storage_offset() - holder.storage_offset()) // weight.stride(0)  # rows, whatever strides grad has
    return holder.grad[start : start + weight.shape[0]]


def check_freezing(state: LayerOscillation) -> None:
    """Raise ``ValueError`` if ``state`` was made without what freezing needs."""
    if state.average is None or state.frozen is None:
        raise ValueError("this LayerOscillation keeps no averages to freeze weights at; make it with freezing=True")


def untouchable_ends(quantizer: WeightQuantizer) -> tuple[int, int] | None:
    """Return the codes at which weights must stay free: those of the extremes, while the scale is found from them.

    An extreme that was moved to its grid point, half a step inside, would make the scale smaller, with it the grid
    point, and so on to nothing.
    """
    if quantizer.frozen or quantizer.learned is not None:
        return None
    return quant_range(quantizer.bits, quantizer.format.symmetric)


@torch.no_grad()
def hold_frozen(layer: QATLayer, state: LayerOscillation) -> None:
    """Put the frozen weights of ``layer`` to what their codes stand for now."""
    check_freezing(state)
    quantizer, weight = layer.weight_quantizer, layer.weight
    scale, zero_point = (t.detach() for t in quantizer.parameters_for(weight.detach()))
    scale = quantizer.scheme.effective_scale(scale, quantizer.format)
    values = quantizer.scheme.dequantize(state.codes, scale, zero_point, quantizer.format, weight.dtype)
    weight.copy_(torch.where(state.frozen, values, weight))  # type: ignore[arg-type]


@torch.no_grad()
def add_dampening_gradient(
    layers: Mapping[str, QATLayer], factor: float, parameters: Collection[int] | None = None
) -> None:
    """Add to ``.grad`` what a loss of ``factor * sum ||q - clip(w)||^2`` over the layers would, without a graph.

    ``q`` is the fake-quantized weight, taken as a constant, and ``clip`` cuts at the grid's last points: weights
    beyond them, which do not oscillate, are left alone.

    Args:
        layers: prepared; those in float are left out.
        factor: of the loss.
        parameters: ``id`` of those that may be given a gradient; None is all that are trained.
    """
    for name, layer in layers.items():
        moved = weight_to_move(layer, parameters)
        if moved is None:
            continue
        weight, quantizer, scheme = moved[0].detach(), layer.weight_quantizer, layer.weight_quantizer.scheme
        scale, zero_point, fmt = *quantizer.parameters_for(weight), quantizer.format
        codes = scheme.quantize(weight, scale, zero_point, fmt)
        points = scheme.dequantize(codes, scheme.effective_scale(scale, fmt), zero_point, fmt, weight.dtype)
        difference = weight - points
        low, high = quant_range(fmt.bits, fmt.symmetric)
        beyond = ((codes == low) & (difference < 0)) | ((codes == high) & (difference > 0))
        add_gradient(name, *moved, difference.masked_fill_(beyond, 0).mul_(2 * factor))


def codes_now(layer: QATLayer) -> Tensor:
    """Return the codes that an evaluation would compute with now."""
    return layer.weight_quantizer.codes(weight_now(layer))

"""What an algorithm of post-training quantization decides for one weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_qat.schemes import TensorFormat, get_scheme


@dataclass(frozen=True, eq=False)
class ChosenCodes:
    """The codes of one weight matrix, the grid they stand on, and what they lose.

    Args:
        codes: integers, ``[out_features, in_features]``, as ``format``'s scheme gives them.
        scale: as ``scale_shape(codes.shape, format)`` says, float32.
        zero_point: int32, shaped as ``scale``; None for formats without one.
        format: how to read the codes.
        loss: ``tr((W - Q) G (W - Q)^T)`` with the Gram matrix ``G`` of the layer's inputs: the squared error of its
            outputs, summed over everything seen in calibration.
        nearest_loss: the same for every weight rounded to its nearest code on the grid of its extremes.
        damping: share of the mean diagonal that was added to ``G``'s; 0 where nothing was solved.
        notes: what a reader of the report should know: dead columns, a rescue and its reason.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    format: TensorFormat
    loss: float
    nearest_loss: float
    damping: float = 0.0
    notes: tuple[str, ...] = ()

    def values(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return what the codes stand for."""
        scheme = get_scheme(self.format.scheme)
        scale = scheme.effective_scale(self.scale, self.format)
        return scheme.dequantize(self.codes, scale, self.zero_point, self.format, dtype)


def output_error(weight: Tensor, values: Tensor, gram: Tensor) -> float:
    """Return ``tr((W - Q) G (W - Q)^T)``, summed in float64.

    Args:
        weight: ``W``, ``[out_features, in_features]``.
        values: ``Q``, shaped as ``weight``.
        gram: ``G``, ``[in_features, in_features]``, the sum of ``x x^T`` over inputs ``x``.
    """
    difference = weight.float() - values.float()
    return float(torch.mm(difference, gram.float()).mul_(difference).sum(dtype=torch.float64))

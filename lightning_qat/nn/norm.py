"""BatchNorm that a layer has taken in."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

LayerT = TypeVar("LayerT", bound=nn.Module)


class FoldedBatchNorm(nn.Module):
    """Where a BatchNorm stood that is folded into the layer before it: passes its input on."""

    def forward(self, input: Tensor) -> Tensor:
        return input

    def __getattr__(self, name: str) -> Any:
        if name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            raise AttributeError(
                f"this BatchNorm was folded into the layer before it and has no {name!r} any more; "
                "keep it with BatchNormFolding(False) or QATConfig(fold_batchnorm=False)"
            )
        return super().__getattr__(name)


def norm_factor_and_shift(norm: nn.Module, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return what an evaluated BatchNorm does to a layer before it, in float64.

    ``norm(w x + b) = f (w x) + shift`` with ``f = gamma / sqrt(var + eps)`` and
    ``shift = beta + (b - mean) f``, both of shape ``[channels]``.
    """
    if not isinstance(norm, _BatchNorm) or norm.running_var is None or norm.running_mean is None:
        raise ValueError(
            f"{type(norm).__name__} has no running statistics to fold; use BatchNorm with track_running_stats=True"
        )
    mean, var = norm.running_mean.detach().double(), norm.running_var.detach().double()
    gamma = torch.ones_like(var) if norm.weight is None else norm.weight.detach().double()
    beta = torch.zeros_like(var) if norm.bias is None else norm.bias.detach().double()
    factor = gamma / torch.sqrt(var + norm.eps)
    offset = -mean if bias is None else bias.detach().double() - mean
    return factor, beta + offset * factor


def fold_bn_into_conv(conv: LayerT, bn: nn.Module) -> LayerT:
    """Return a new float layer that computes ``bn(conv(x))`` of an evaluated ``bn``.

    Args:
        conv: Linear or convolution, weight ``[out_channels, ...]``; a transposed convolution without groups.
        bn: BatchNorm over its output channels. A gamma of 0 gives a weight of 0.

    Raises:
        ValueError: if the channels do not match or ``bn`` has no running statistics.
    """
    source: Any = conv
    transposed = isinstance(conv, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d))
    if transposed and source.groups != 1:
        raise ValueError(
            f"a transposed convolution with groups={source.groups} cannot take in a BatchNorm; use groups=1"
        )
    axis = 1 if transposed else 0
    weight = source.weight
    if isinstance(bn, _BatchNorm) and weight.shape[axis] != bn.num_features:
        raise ValueError(f"the layer has {weight.shape[axis]} output channels but the BatchNorm has {bn.num_features}")
    factor, shift = norm_factor_and_shift(bn, source.bias)
    shape = [1] * weight.dim()
    shape[axis] = -1
    values = (weight.detach().double() * factor.view(shape)).to(weight.dtype)
    folded = copy.deepcopy(conv)
    folded.weight = nn.Parameter(values, weight.requires_grad)
    folded.bias = nn.Parameter(shift.to(weight.dtype), weight.requires_grad)
    return folded

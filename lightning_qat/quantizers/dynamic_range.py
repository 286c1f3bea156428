"""Ranges of activations that are found at run time, in training and in a converted layer alike."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lightning_qat.schemes import TensorFormat, get_scheme


@torch.no_grad()
def dynamic_parameters(x: Tensor, fmt: TensorFormat, spatial_dims: int | None) -> tuple[Tensor, Tensor, TensorFormat]:
    """Return scale, zero point and format of the ranges of ``x``, found now: one for each token, or one.

    Args:
        x: a layer's input, ``[..., features]``, or a convolution's, ``[N, C, *spatial]`` or ``[C, *spatial]``.
        fmt: bits, symmetry, and what a range covers.
        spatial_dims: of a convolution, whose ranges are per sample where others are per token; None otherwise.
    """
    scheme, x = get_scheme(fmt.scheme), x.detach()  # from tangents of forward mode too
    if scheme.finds_ranges:
        return x.new_ones((), dtype=torch.float32), x.new_zeros((), dtype=torch.int32), fmt
    if fmt.dynamic_range == "tensor":
        low, high = (bound.float() for bound in torch.aminmax(x))
        return *scheme.parameters(low, high, fmt), fmt
    dims, keep = [-1], True
    if spatial_dims is not None:
        batched = x.dim() == spatial_dims + 2
        dims, keep = list(range(1 if batched else 0, x.dim())), False
        fmt = replace(fmt, axis=0 if batched else None)
    low, high = (bound.float() for bound in (x.amin(dims, keepdim=keep), x.amax(dims, keepdim=keep)))
    return *scheme.parameters(low, high, fmt), fmt

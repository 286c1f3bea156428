"""GPTQ as Frantar et al. 2023 published it, in plain PyTorch and with nothing of ours: the witness of the tests.

Cholesky decomposition, inverse and upper Cholesky decomposition of the inverse; columns one by one in blocks; scales of
``x.abs().max() / 7.5`` and the like, found when a group is reached or, with static groups, before.
"""

from __future__ import annotations

import torch
from torch import Tensor


def grid(x: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Return scale and zero point of every row; symmetric codes are here 0 .. 2**bits - 1 around 2**(bits - 1)."""
    most = 2**bits - 1
    low, high = x.amin(1).clamp(max=0), x.amax(1).clamp(min=0)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    scale = (high - low) / most
    zero = torch.full_like(scale, (most + 1) // 2) if symmetric else torch.round(-low / scale)
    return scale, zero


def published(
    weight: Tensor,
    gram: Tensor,
    *,
    bits: int,
    symmetric: bool,
    group_size: int,
    damping: float = 0.01,
    activation_order: bool = False,
    static_groups: bool = False,
    block_size: int = 128,
) -> tuple[Tensor, Tensor]:
    """Return codes from 0 on and values of ``weight``, in its dtype."""
    weight, hessian = weight.clone(), gram.to(weight.dtype)
    columns, most = weight.shape[1], 2**bits - 1
    groups = [grid(weight[:, g : g + group_size], bits, symmetric) for g in range(0, columns, group_size)]
    order = torch.argsort(hessian.diagonal(), descending=True) if activation_order else torch.arange(columns)
    weight, hessian = weight[:, order], hessian[order][:, order]
    hessian = hessian + damping * hessian.diagonal().mean() * torch.eye(columns, dtype=weight.dtype)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factor = torch.linalg.cholesky(inverse, upper=True)
    codes, values = torch.empty_like(weight), torch.empty_like(weight)
    for start in range(0, columns, block_size):
        stop = min(start + block_size, columns)
        block, errors = weight[:, start:stop].clone(), torch.empty_like(weight[:, start:stop])
        for i in range(stop - start):
            column = start + i
            if not static_groups and column % group_size == 0:
                groups[column // group_size] = grid(weight[:, column : column + group_size], bits, symmetric)
            scale, zero = groups[(int(order[column]) if static_groups else column) // group_size]
            code = torch.clamp(torch.round(block[:, i] / scale) + zero, 0, most)
            codes[:, column], values[:, column] = code, scale * (code - zero)
            errors[:, i] = (block[:, i] - values[:, column]) / factor[column, column]
            block[:, i:] -= errors[:, i : i + 1] * factor[column, column:stop]
        weight[:, stop:] -= errors @ factor[start:stop, stop:]
    back = torch.argsort(order)
    return codes[:, back], values[:, back]

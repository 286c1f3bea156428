"""Which of several ranges loses least in one group of columns, for every row."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_qat.native.library import Family, threads_for

_FAMILY = Family("clipping", {"best_shares": "pppppffqqqpppi"})

#: Rows that go through a group together.
_LANES = 64


def best_shares(
    weight: Tensor,
    own: Tensor,
    others: Tensor | None,
    step: Tensor,
    zero: Tensor | None,
    bounds: tuple[int, int],
) -> Tensor | None:
    """Return for each row which grid gives the least ``e G e^T + 2 e o^T``, the first of equal ones.

    ``e`` are the errors ``Q - W`` of one group of columns and ``o`` the products of all other errors with these.

    Args:
        weight: float32 ``[rows, width]``.
        own: ``G``, float32 ``[width, width]``, symmetric.
        others: ``o``, shaped as ``weight``; None is 0.
        step: the scales that are tried, float32 ``[tries, rows]``.
        zero: their zero points, whole numbers in float32 shaped so; None is 0.
        bounds: the smallest and the largest code.

    Returns:
        int64 ``[rows]``, 0 where no loss is finite; None where there is no kernel.
    """
    given = [tensor for tensor in (weight, own, others, step, zero) if tensor is not None]
    functions = _FAMILY.functions()
    if functions is None or any(tensor.dtype != torch.float32 or tensor.device.type != "cpu" for tensor in given):
        return None
    rows, width = weight.shape
    least = torch.full((rows,), torch.inf, dtype=torch.float32, device="cpu")
    choice = torch.zeros(rows, dtype=torch.int64, device="cpu")
    threads = threads_for(rows * width * len(step))
    scratch = torch.empty(threads * 3 * width * _LANES, dtype=torch.float32, device="cpu")
    lying = [None if tensor is None else tensor.contiguous() for tensor in (weight, own, others, step, zero)]
    functions.best_shares(
        *(None if tensor is None else tensor.data_ptr() for tensor in lying), *bounds, len(step), rows, width,
        least.data_ptr(), choice.data_ptr(), scratch.data_ptr(), threads,
    )  # fmt: skip
    return choice

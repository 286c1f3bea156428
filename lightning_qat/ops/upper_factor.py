"""The upper triangular factor of a Gram matrix, in float64: what GPTQ solves its least squares with."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_qat.native import upper_factor as native
from lightning_qat.ops.workspace import advise_huge_pages

#: Columns that are decomposed at once, between products with all that are done. 4096 x 4096 on one core: 0.48 s, where
#: LAPACK's decomposition takes 0.65 s and the copies around it 0.2 s more. Half of what a block's inverse is multiplied
#: by is zero: twice the columns take 5 to 15 % longer.
_BLOCK = 128


def upper_factor(
    matrix: Tensor, diagonal: Tensor, order: Tensor | None = None, unit: Tensor | None = None
) -> Tensor | None:
    """Return the upper triangular ``R`` with ``R R^T`` the matrix; None if there is none.

    That is the Cholesky factor of rows and columns in reverse, and ``R^-1`` the factor ``U`` of the inverse ``U^T U``.
    The few huge inputs of language models need float64.

    Args:
        matrix: symmetric, float32 ``[size, size]``; its own diagonal is not looked at.
        diagonal: float32 ``[size]``, in the order of the result.
        order: int64 ``[size]``: which row and column of ``matrix`` each of the result is; None is as they lie.
        unit: what ``matrix`` is divided by, one value; None is 1.

    Returns:
        float32, with zeros below the diagonal; None where the matrix is not positive definite or not finite.
    """
    size, work = len(matrix), _gathered(matrix, order, unit)
    work.diagonal().copy_(diagonal)
    factor = advise_huge_pages(torch.empty((size, size), dtype=torch.float32, device=matrix.device)).zero_()
    block = _BLOCK if matrix.device.type == "cpu" else size
    for stop in range(size, 0, -block):
        start = max(stop - block, 0)
        panel = work[:stop, start:stop]
        if stop < size:
            panel.addmm_(work[:stop, stop:], work[start:stop, stop:].t(), alpha=-1)
        lower, info = torch.linalg.cholesky_ex(panel[start:].flip(0, 1))
        if int(info):
            return None
        panel[start:] = lower.flip(0, 1)
        if start:
            panel[:start] = panel[:start] @ inverse_of_upper(panel[start:]).t()
        factor[start:stop, start:] = work[start:stop, start:]
    ends = torch.stack(torch.aminmax(factor.diagonal()))
    return factor if bool((torch.isfinite(ends) & (ends > 0)).all()) else None


def inverse_of_upper(upper: Tensor) -> Tensor:
    """Return the inverse of an upper triangle."""
    identity = torch.eye(len(upper), dtype=upper.dtype, device=upper.device)
    return torch.linalg.solve_triangular(upper, identity, upper=True)


def _gathered(matrix: Tensor, order: Tensor | None, unit: Tensor | None) -> Tensor:
    """Return the upper triangle of ``matrix / unit`` in ``order``, float64; what lies below is left open."""
    if matrix.is_cpu:
        work = advise_huge_pages(torch.empty(matrix.shape, dtype=torch.float64, device="cpu"))
        if native.gather_upper(matrix, order, unit, work) is not None:
            return work
    matrix = matrix if unit is None else matrix / unit
    if order is not None:
        matrix = matrix.index_select(0, order).index_select(1, order)
    return matrix.to(torch.float64)

"""GPTQ on tensors: columns of a weight are rounded one after the other, and those left make up for each error.

The loss ``tr((W - Q) H (W - Q)^T)`` has rows that are independent of each other once the upper factor ``U`` of
``H^-1 = U^T U`` is known. Column ``j`` is rounded to ``q``; with ``e = (w_j - q) / U_jj`` every column ``k`` after it
becomes ``w_k - U_jk e``. Within a block of columns that happens one by one (:func:`reference_gptq_block`, the
definition, in plain PyTorch for every device); all columns after the block follow in one product. The kernels for
CUDA and, compiled, for the CPU equal the definition bit for bit; where nothing is compiled, the one for the CPU does up
to the order of summation.

Everything here is transposed: a row of a tensor is a column of the weight, so that what belongs together lies together.

Sources: Frantar et al. 2023 (GPTQ); Frantar and Alistarh 2022 (OBQ).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: Columns whose inverse is found by substitution; larger triangles are cut into products.
_SMALL_TRIANGLE = 256


class Levels(NamedTuple):
    """The values that a step is multiplied by: integers, or the ascending values of a table.

    Args:
        low: smallest integer code, zero point included; unused with a table.
        high: largest.
        values: float32 ``[levels]``, ascending; a code is then an index into it. None for integers.
        thresholds: float32 ``[levels - 1]``, ascending: a code is how many of them lie below the value.
    """

    low: int
    high: int
    values: Tensor | None = None
    thresholds: Tensor | None = None


class Steps(NamedTuple):
    """What the levels of some columns are multiplied by.

    Args:
        step: float32, shaped as the columns: their scales; of a table the largest magnitudes of their blocks.
        zero: the codes of 0.0, whole numbers in float32; None is 0.
    """

    step: Tensor
    zero: Tensor | None


def gptq_columns(
    columns: Tensor,
    factor: Tensor,
    steps_of: Callable[[int, int, Tensor], Steps],
    levels: Levels,
    block_size: int = 128,
) -> tuple[Tensor, Tensor]:
    """Return the code of every weight, and the loss of them all.

    Args:
        columns: float32 ``[in_features, out_features]``, contiguous; **changed**: each column ends as it was when it
            was rounded.
        factor: ``U``, float32 ``[in_features, in_features]``, see :func:`inverse_factor`.
        steps_of: called as ``steps_of(start, stop, columns)`` when a block is reached, with all columns as they are by
            then; returns the steps of the columns ``start`` to ``stop``.
        levels: see :class:`Levels`.
        block_size: columns of a block.

    Returns:
        int16, shaped as ``columns``: integers of ``low`` to ``high``, or indices into the table; and ``tr((W - Q) H (W
        - Q)^T)``, which is the sum of all ``e^2``, float64 without dimensions.
    """
    loss = torch.zeros((), dtype=torch.float64, device=columns.device)
    codes = torch.empty(columns.shape, dtype=torch.int16, device=columns.device)
    for start in range(0, len(columns), block_size):
        stop = min(start + block_size, len(columns))
        block, inside = columns[start:stop], factor[start:stop, start:stop].contiguous()
        chosen, errors = gptq_block_op(block, inside, *steps_of(start, stop, columns), *levels)
        codes[start:stop] = chosen
        loss += errors.view(-1).dot(errors.view(-1))
        if stop < len(columns):
            columns[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)
    return codes, loss


def inverse_factor(hessian: Tensor) -> Tensor | None:
    """Return the upper triangular ``U`` with ``U^T U`` the inverse of ``hessian``; None if that has none.

    With rows and columns in reverse, ``hessian`` is ``L L^T``; then ``U`` is the inverse of ``L``, reversed again: one
    Cholesky decomposition in float64, which the few huge inputs of language models need, and one triangular inverse,
    for which float32 will do: ``L`` has the root of the condition number.

    Args:
        hessian: symmetric positive definite, ``[in_features, in_features]``.

    Returns:
        float32, with zeros below the diagonal; None where it is not positive definite or not finite.
    """
    lower, info = torch.linalg.cholesky_ex(hessian.flip(0, 1).to(torch.float64))
    if int(info):
        return None
    factor = _inverse_of_lower(lower.to(torch.float32)).flip(0, 1)
    whole = bool(torch.isfinite(torch.stack(torch.aminmax(factor))).all()) and bool((factor.diagonal() > 0).all())
    return factor if whole else None


def _inverse_of_lower(lower: Tensor) -> Tensor:
    """Return the inverse of a lower triangle in products of its halves, which substitution does not have."""
    size = len(lower)
    if size <= _SMALL_TRIANGLE:
        identity = torch.eye(size, dtype=lower.dtype, device=lower.device)
        return torch.linalg.solve_triangular(lower, identity, upper=False)
    half = size // 2
    result = torch.zeros_like(lower)
    first = result[:half, :half] = _inverse_of_lower(lower[:half, :half])
    last = result[half:, half:] = _inverse_of_lower(lower[half:, half:])
    torch.mm(last @ lower[half:, :half], first, out=result[half:, :half]).neg_()
    return result


# --- the definition -------------------------------------------------------------------------------


def nearest_level(
    x: Tensor,
    step: Tensor,
    zero: Tensor | None,
    low: int,
    high: int,
    values: Tensor | None = None,
    thresholds: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the codes of float32 ``x``, int16, and the values that they stand for; arguments as in :class:`Levels`."""
    if values is not None and thresholds is not None:
        codes = torch.bucketize(x * _reciprocal(step), thresholds)
        return codes.to(torch.int16), values[codes] * step
    codes = torch.round(x / step)
    if zero is None:
        codes = codes.clamp(low, high)
        return codes.to(torch.int16), codes * step
    codes = (codes + zero).clamp(low, high)
    return codes.to(torch.int16), (codes - zero) * step


def _reciprocal(step: Tensor) -> Tensor:
    """Return ``1 / step``; 0 for a block of zeros, all of whose values are 0 whatever their codes."""
    return torch.where(step > 0, 1.0 / step, 0.0)


def reference_gptq_block(
    columns: Tensor,
    factor: Tensor,
    step: Tensor,
    zero: Tensor | None,
    low: int,
    high: int,
    values: Tensor | None,
    thresholds: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return the codes of a block of columns and their errors ``e``, both shaped as ``columns``.

    Args:
        columns: float32 ``[count, out_features]``.
        factor: ``U`` of these columns, ``[count, count]``.
        step: shaped as ``columns``.
        zero: shaped as ``columns``, or None.
        low: see :class:`Levels`, as are the rest.
        high: see there.
        values: see there.
        thresholds: see there.
    """
    left = columns.clone()
    codes, errors = torch.empty_like(left, dtype=torch.int16), torch.empty_like(left)
    for j in range(len(left)):
        at_zero = None if zero is None else zero[j]
        codes[j], rounded = nearest_level(left[j], step[j], at_zero, low, high, values, thresholds)
        errors[j] = (left[j] - rounded) / factor[j, j]
        left[j + 1 :] -= factor[j, j + 1 :, None] * errors[j]
    return codes, errors


# --- the op ---------------------------------------------------------------------------------------


@torch.library.custom_op("lightning_qat::gptq_block", mutates_args=())
def gptq_block_op(
    columns: Tensor,
    factor: Tensor,
    step: Tensor,
    zero: Tensor | None,
    low: int,
    high: int,
    values: Tensor | None,
    thresholds: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Unchecked: the codes of a block of columns, int16, and their errors; see :func:`reference_gptq_block`."""
    return reference_gptq_block(columns, factor, step, zero, low, high, values, thresholds)


@gptq_block_op.register_fake
def _(columns: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(columns, dtype=torch.int16), torch.empty_like(columns)


# The kernel of the CPU registers itself and needs what is defined above, that of CUDA what coordinate descent defines.
from lightning_qat.ops import coordinate_descent as _descent  # noqa: E402, F401
from lightning_qat.ops import gptq_cpu as _cpu  # noqa: E402, F401

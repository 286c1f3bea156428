"""GPTQ on tensors: columns of a weight are rounded one after the other, and those left make up for each error.

The loss ``tr((W - Q) H (W - Q)^T)`` has rows that are independent of each other once the upper factor ``U`` of
``H^-1 = U^T U`` is known. Column ``j`` is rounded to ``q``; with ``e = (w_j - q) / U_jj`` every column ``k`` after it
becomes ``w_k - U_jk e``. Within a block of columns that happens one by one (:func:`reference_gptq_block`, the
definition, in plain PyTorch for every device); a block begins with what all columns before it leave to make up for, in
products. These take ``R`` with ``H = R R^T``, the inverse of ``U``, which is nowhere worked out as a whole: within a
block ``b`` with the columns ``s`` before it, ``U_bb`` is the inverse of ``R_bb``, and ``W_b`` begins as
``W_b + (W - Q)_s R_sb U_bb``. The kernels for CUDA and, compiled, for the CPU equal the definition bit for bit; where
nothing is compiled, the one for the CPU does up to the order of summation.

Everything here is transposed: a row of a tensor is a column of the weight, so that what belongs together lies together.

Sources: Frantar et al. 2023 (GPTQ); Frantar and Alistarh 2022 (OBQ); Chee et al. 2023 (QuIP: the same with ``R``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_qat.native import gptq as native
from lightning_qat.ops.upper_factor import inverse_of_upper
from lightning_qat.ops.workspace import advise_huge_pages

#: Columns whose products with all before them are one: of fewer at a time these are slow.
_PANEL = 512


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


#: Given the first and the end of some columns, returns these as they are once all before a block are rounded.
Reached = Callable[[int, int], Tensor]


def gptq_columns(
    columns: Tensor,
    upper: Tensor,
    steps_of: Callable[[int, int, Reached], Steps],
    levels: Levels,
    block_size: int = 128,
) -> tuple[Tensor, Tensor]:
    """Return the code of every weight, and the loss of them all.

    Args:
        columns: float32 ``[in_features, out_features]``, contiguous; **changed**: ends as ``W - Q``.
        upper: ``R``, float32 ``[in_features, in_features]``, see :func:`lightning_qat.ops.upper_factor.upper_factor`.
        steps_of: called as ``steps_of(start, stop, reached)`` when a block is reached; returns the steps of the
            columns ``start`` to ``stop``. ``reached(first, last)`` gives columns from ``start`` on as they are by then.
        levels: see :class:`Levels`.
        block_size: columns of a block.

    Returns:
        int16, shaped as ``columns``: integers of ``low`` to ``high``, or indices into the table; and ``tr((W - Q) H (W
        - Q)^T)``, which is the sum of all ``e^2``, float64 without dimensions.
    """
    size, panel = len(columns), max(_PANEL // block_size, 1) * block_size
    loss = torch.zeros((), dtype=torch.float64, device=columns.device)
    codes = advise_huge_pages(torch.empty(columns.shape, dtype=torch.int16, device=columns.device))
    pulled = torch.empty((0, 0), device=columns.device)
    for start in range(0, size, block_size):
        first, stop = start - start % panel, min(start + block_size, size)
        if start == first:
            pulled = upper[:first, first : first + panel].t() @ columns[:first]
        here = pulled[start - first : stop - first]
        if start > first:
            here.addmm_(upper[first:start, start:stop].t(), columns[first:start])
        factor = inverse_of_upper(upper[start:stop, start:stop])
        left = torch.addmm(columns[start:stop], factor.t(), here)

        def reached(a: int, b: int, start: int = start, left: Tensor = left) -> Tensor:
            return (left if b - start <= len(left) else _reached(columns, upper, start, b))[a - start : b - start]

        steps = steps_of(start, stop, reached)
        codes[start:stop], errors = gptq_block_op(left, factor, *steps, *levels)
        loss += errors.view(-1).dot(errors.view(-1))
        columns[start:stop] -= values_of_levels(codes[start:stop], steps, levels)
    return codes, loss


def ordered_columns(weight: Tensor, order: Tensor) -> Tensor:
    """Return ``weight[:, order]``, float32, transposed: ``[in_features, out_features]``, contiguous."""
    if weight.is_cpu:
        columns = advise_huge_pages(torch.empty(weight.shape[::-1], dtype=torch.float32, device="cpu"))
        if native.gather_columns(weight, order, columns):
            return columns
    return weight.t().contiguous().index_select(0, order)


def placed_codes(codes: Tensor, order: Tensor, table: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return codes in the layout of the weight, ``[out_features, in_features]``, contiguous.

    Args:
        codes: int16 ``[in_features, out_features]``.
        order: int64 ``[in_features]``: which column of the weight each row of ``codes`` is.
        table: uint8: what the codes, indices into it, are to become. None leaves them as they are.
        dtype: int8 or uint8; that of ``table`` where it is given.
    """
    dtype = dtype if table is None else table.dtype
    if codes.is_cpu:
        placed = advise_huge_pages(torch.empty(codes.shape[::-1], dtype=dtype, device="cpu"))
        if native.place_codes(codes, order, table, placed):
            return placed
    lying = torch.empty_like(codes).index_copy_(0, order, codes).t()
    return (lying.to(dtype) if table is None else table[lying.to(torch.int64)]).contiguous()


def _reached(columns: Tensor, upper: Tensor, start: int, stop: int) -> Tensor:
    """Return the columns ``start`` to ``stop`` once all before are rounded."""
    pulled = upper[:start, start:stop].t() @ columns[:start]
    return torch.addmm(columns[start:stop], inverse_of_upper(upper[start:stop, start:stop]).t(), pulled)


def values_of_levels(chosen: Tensor, steps: Steps, levels: Levels) -> Tensor:
    """Return what codes stand for, float32 shaped as ``chosen`` and the steps."""
    return units_of_levels(chosen, steps.zero, levels) * steps.step


def units_of_levels(chosen: Tensor, zero: Tensor | None, levels: Levels) -> Tensor:
    """Return values in units of their step: float32, shaped as ``chosen``."""
    if levels.values is not None:
        return levels.values[chosen.to(torch.int64)]
    units = chosen.to(torch.float32)
    return units if zero is None else units.sub_(zero)


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

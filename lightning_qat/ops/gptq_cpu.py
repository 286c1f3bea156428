"""A block of GPTQ on the CPU: compiled, or few calls for each column and products where the definition has single ones.

Compiled it has the bits of :func:`lightning_qat.ops.gptq.reference_gptq_block`; otherwise it is equal to that up to the
order of summation.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_qat.native import gptq as native
from lightning_qat.ops.gptq import gptq_block_op, nearest_level, reference_gptq_block

#: Columns that take up the errors before them one by one; all others of the block follow in one product.
_SUB_BLOCK = 32


def gptq_block_cpu(
    columns: Tensor,
    factor: Tensor,
    step: Tensor,
    zero: Tensor | None,
    low: int,
    high: int,
    values: Tensor | None,
    thresholds: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The definition, with each column's updates taken together when it is reached."""
    done = native.gptq_block(columns, factor, step, zero, low, high, values, thresholds)
    if done is not None:
        return done
    if columns.dtype != torch.float32 or not columns.numel():
        return reference_gptq_block(columns, factor, step, zero, low, high, values, thresholds)
    if values is not None:
        return _table_block(columns, factor, step, low, high, values, thresholds)
    left, errors, codes = columns.clone(), torch.empty_like(columns), torch.empty_like(columns)
    bounds = None if zero is None else ((low - zero).unbind(), (high - zero).unbind())
    steps, xs, es, cs = step.unbind(), left.unbind(), errors.unbind(), codes.unbind()

    def choose(j: int) -> None:
        code = cs[j]
        torch.div(xs[j], steps[j], out=code)
        # Clamping before rounding is the same between integer bounds.
        if bounds is None:
            code.clamp_(low, high).round_()
        else:
            torch.clamp(code, bounds[0][j], bounds[1][j], out=code).round_()
        torch.addcmul(xs[j], code, steps[j], value=-1, out=es[j])

    diagonal = factor.diagonal()[:, None]
    walk(left, errors, factor / diagonal, choose)
    return (codes if zero is None else codes.add_(zero)).to(torch.int16), errors.div_(diagonal)


def _table_block(
    columns: Tensor,
    factor: Tensor,
    step: Tensor,
    low: int,
    high: int,
    values: Tensor,
    thresholds: Tensor | None,
) -> tuple[Tensor, Tensor]:
    left, errors = columns.clone(), torch.empty_like(columns)
    codes = torch.empty_like(columns, dtype=torch.int16)
    steps, xs, es, cs = step.unbind(), left.unbind(), errors.unbind(), codes.unbind()

    def choose(j: int) -> None:
        code, rounded = nearest_level(xs[j], steps[j], None, low, high, values, thresholds)
        cs[j].copy_(code)
        torch.sub(xs[j], rounded, out=es[j])

    diagonal = factor.diagonal()[:, None]
    walk(left, errors, factor / diagonal, choose)
    return codes, errors.div_(diagonal)


def walk(left: Tensor, errors: Tensor, factor: Tensor, choose: Callable[[int], None]) -> None:
    """Call ``choose`` for one column after the other, each with the errors before it made up for.

    Args:
        left: the columns, ``[count, out_features]``; **changed**.
        errors: what ``choose(j)`` writes the error of column ``j`` into, shaped so.
        factor: what column ``k`` loses for an error of column ``j``, ``[count, count]``.
        choose: called once ``left[j]`` is what it is to round.
    """
    count, xs, before, shares = len(left), left.unbind(), errors.t(), factor.t().contiguous().unbind()
    for start in range(0, count, _SUB_BLOCK):
        stop = min(start + _SUB_BLOCK, count)
        for j in range(start, stop):
            if j > start:
                xs[j].addmv_(before[:, start:j], shares[j][start:j], alpha=-1)
            choose(j)
        if stop < count:
            left[stop:].addmm_(factor[start:stop, stop:].t(), errors[start:stop], alpha=-1)


gptq_block_op.register_kernel("cpu")(gptq_block_cpu)

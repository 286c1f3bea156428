"""Better codes for a weight that has some: each column is rounded again, given all others.

The loss ``tr((W - Q) H (W - Q)^T)`` is a quadratic of each element of ``Q`` with all others fixed, least at
``q_j + P_j / H_jj`` with the products ``P = H (W - Q)^T``. The nearest value of the grid is thus the best one, and no
step makes the loss larger. Tensors are transposed as in :mod:`lightning_qat.ops.gptq`.

Source: Behdin et al. 2023 (QuantEase).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_qat.native import gptq as native
from lightning_qat.ops.gptq import nearest_level
from lightning_qat.ops.gptq_cpu import walk


def reference_descend_block(
    products: Tensor,
    current: Tensor,
    hessian: Tensor,
    step: Tensor,
    zero: Tensor | None,
    low: int,
    high: int,
    values: Tensor | None,
    thresholds: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return the codes of a block of columns, int16, and what they add to the values that it has.

    Args:
        products: ``P`` of these columns, float32 ``[count, out_features]``.
        current: ``Q``, shaped so.
        hessian: ``H`` of these columns, ``[count, count]``.
        step: see :func:`lightning_qat.ops.gptq.reference_gptq_block`, as are the rest.
        zero: see there.
        low: see there.
        high: see there.
        values: see there.
        thresholds: see there.
    """
    left = products.clone()
    codes, changes = torch.empty_like(left, dtype=torch.int16), torch.empty_like(left)
    for j in range(len(left)):
        best, at_zero = current[j] + left[j] / hessian[j, j], None if zero is None else zero[j]
        codes[j], rounded = nearest_level(best, step[j], at_zero, low, high, values, thresholds)
        changes[j] = rounded - current[j]
        left[j + 1 :] -= hessian[j, j + 1 :, None] * changes[j]
    return codes, changes


@torch.library.custom_op("lightning_qat::descend_block", mutates_args=())
def descend_block_op(
    products: Tensor,
    current: Tensor,
    hessian: Tensor,
    step: Tensor,
    zero: Tensor | None,
    low: int,
    high: int,
    values: Tensor | None,
    thresholds: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Unchecked; see :func:`reference_descend_block`."""
    return reference_descend_block(products, current, hessian, step, zero, low, high, values, thresholds)


@descend_block_op.register_fake
def _(products: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(products, dtype=torch.int16), torch.empty_like(products)


@descend_block_op.register_kernel("cpu")
def descend_block_cpu(
    products: Tensor,
    current: Tensor,
    hessian: Tensor,
    step: Tensor,
    zero: Tensor | None,
    low: int,
    high: int,
    values: Tensor | None,
    thresholds: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The definition, or up to rounding, as :func:`lightning_qat.ops.gptq_cpu.gptq_block_cpu`."""
    done = native.descend_block(products, current, hessian, step, zero, low, high, values, thresholds)
    if done is not None:
        return done
    if products.dtype != torch.float32 or not products.numel():
        return reference_descend_block(products, current, hessian, step, zero, low, high, values, thresholds)
    left, changes, scratch = products.clone(), torch.empty_like(products), torch.empty_like(products[0])
    shares = hessian.diagonal().reciprocal().tolist()
    lefts, currents, added, steps = left.unbind(), current.unbind(), changes.unbind(), step.unbind()
    if values is not None:
        codes = torch.empty_like(products, dtype=torch.int16)

        def look_up(j: int) -> None:
            torch.add(currents[j], lefts[j], alpha=shares[j], out=scratch)
            code, rounded = nearest_level(scratch, steps[j], None, low, high, values, thresholds)
            codes[j] = code
            torch.sub(rounded, currents[j], out=added[j])

        walk(left, changes, hessian, look_up)
        return codes, changes
    units = torch.empty_like(products)
    chosen = units.unbind()
    bounds = None if zero is None else ((low - zero).unbind(), (high - zero).unbind())

    def round_(j: int) -> None:
        code = chosen[j]
        torch.add(currents[j], lefts[j], alpha=shares[j], out=code).div_(steps[j])
        if bounds is None:
            code.clamp_(low, high).round_()
        else:
            torch.clamp(code, bounds[0][j], bounds[1][j], out=code).round_()
        torch.mul(code, steps[j], out=added[j]).sub_(currents[j])

    walk(left, changes, hessian, round_)
    return (units if zero is None else units.add_(zero)).to(torch.int16), changes


# The kernel of CUDA registers itself for this op and for GPTQ's; it needs both.
from lightning_qat.ops import gptq_cuda as _cuda  # noqa: E402, F401

"""LLM.int8() products on the CPU: int8 codes in oneDNN's kernel, the few columns with outliers in float."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_qat.ops.integer_linear import SIGNED_OFFSET, LinearWeight, multiply_codes, pack_linear
from lightning_qat.ops.vectorwise import PER_CODE, vectorwise_quantize_op
from lightning_qat.ops.vectorwise_codes import columns_above_quantile


@dataclass(frozen=True)
class OutlierWeight:
    """A weight for products of both kinds."""

    packed: LinearWeight
    #: The same int8 codes, ``[out_features, in_features]``, of which columns are read.
    codes: Tensor


def pack_with_outliers(codes: Tensor, row_absmax: Tensor) -> OutlierWeight:
    """Return a weight as :func:`outlier_linear` reads it.

    Args:
        codes: int8, ``[out_features, in_features]``.
        row_absmax: float32, ``[out_features]``; a code stands for ``code * absmax / 127``.
    """
    return OutlierWeight(pack_linear(codes, row_absmax * PER_CODE), codes)


def outlier_linear(x: Tensor, threshold: float, weight: OutlierWeight, bias: Tensor | None) -> Tensor:
    """Return ``x @ weight.T + bias``, every token on its own grid but for the columns with outliers.

    A token that holds NaN gives NaN.

    Args:
        x: ``[..., in_features]``.
        threshold: above 1 magnitudes of at least this are outliers; up to 1 it is a quantile of the columns, see
            :func:`columns_above_quantile`; 0.0 is none.
        weight: of :func:`pack_with_outliers`.
        bias: ``[out_features]`` or None.
    """
    rows = x.reshape(-1, x.shape[-1])
    if threshold > 1:
        codes, absmax, is_outlier = vectorwise_quantize_op(rows, threshold)
    else:
        is_outlier = columns_above_quantile(rows, threshold)
        codes, absmax, _ = vectorwise_quantize_op(rows.masked_fill(is_outlier, 0.0) if threshold else rows, 0.0)
    # Adding 128 modulo 256 is flipping the highest bit.
    unsigned = codes.view(torch.uint8).bitwise_xor_(SIGNED_OFFSET)
    result = multiply_codes(unsigned, 1.0, SIGNED_OFFSET, weight.packed, None)
    result.mul_((absmax * PER_CODE).unsqueeze(1))
    columns = is_outlier.nonzero().view(-1) if threshold > 0 else is_outlier[:0]
    if columns.numel():
        parts = weight.codes[:, columns].to(torch.float32).mul_(weight.packed.scale.unsqueeze(1))
        result.addmm_(rows[:, columns].to(torch.float32), parts.T)
    if bias is not None:
        result.add_(bias)
    return result.view(*x.shape[:-1], result.shape[-1]).to(x.dtype)

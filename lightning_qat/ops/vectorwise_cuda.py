"""The Triton kernels of vector-wise int8, for CUDA tensors; float64 and empty tensors take the definition itself."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_qat.ops.fake_quantize_cuda import HAS_TRITON
from lightning_qat.ops.layout import match_layout
from lightning_qat.ops.vectorwise import (
    PER_CODE,
    reference_dequantize,
    reference_fake_quantize,
    reference_fake_quantize_beside,
    reference_quantize,
    vectorwise_dequantize_op,
    vectorwise_fake_quantize_beside_op,
    vectorwise_fake_quantize_op,
    vectorwise_quantize_op,
)
from lightning_qat.ops.vectorwise_codes import (
    column_absmax_op,
    reference_codes,
    reference_column_absmax,
    vectorwise_codes_op,
)

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _takes(x: Tensor, dtype: torch.dtype | None = None) -> bool:
    return (dtype or x.dtype) in _DTYPES and x.numel() > 0


def _limit(threshold: float) -> float | None:
    """Return the smallest outlier, rounded as float16 does."""
    return torch.tensor(threshold, dtype=torch.float16, device="cpu").item() if threshold > 0 else None


def vectorwise_quantize_cuda(x: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """The definition in one launch, and with a threshold another one for the columns with outliers."""
    if not _takes(x):
        return reference_quantize(x, threshold)
    from lightning_qat.kernels.vectorwise import vectorwise_quantize_triton

    return vectorwise_quantize_triton(x, _limit(threshold))


def vectorwise_fake_quantize_cuda(x: Tensor, threshold: float) -> Tensor:
    """The definition in one launch, and with a threshold another one for the columns with outliers."""
    if not _takes(x):
        return reference_fake_quantize(x, threshold)
    from lightning_qat.kernels.vectorwise import vectorwise_fake_quantize_triton

    return vectorwise_fake_quantize_triton(x, _limit(threshold), PER_CODE)


def vectorwise_fake_quantize_beside_cuda(x: Tensor, kept: Tensor) -> Tensor:
    """The definition in one launch, and another one for the columns that stay."""
    if not _takes(x):
        return match_layout(reference_fake_quantize_beside(x, kept), x)
    from lightning_qat.kernels.vectorwise import vectorwise_fake_quantize_triton

    return vectorwise_fake_quantize_triton(x, None, PER_CODE, kept)


def column_absmax_cuda(rows: Tensor) -> Tensor:
    """The definition in one launch and the largest of some numbers for each column."""
    if not _takes(rows):
        return reference_column_absmax(rows)
    from lightning_qat.kernels.vectorwise import column_absmax_triton

    return column_absmax_triton(rows)


def vectorwise_codes_cuda(x: Tensor, absmax: Tensor) -> Tensor:
    """The definition in one launch."""
    if not _takes(x) or absmax.dtype != torch.float32 or absmax.device != x.device:
        return reference_codes(x, absmax)
    from lightning_qat.kernels.vectorwise_codes import vectorwise_codes_triton

    return vectorwise_codes_triton(x, absmax)


def vectorwise_dequantize_cuda(codes: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    """The definition in one launch."""
    if not _takes(codes, dtype):
        return reference_dequantize(codes, absmax, dtype)
    from lightning_qat.kernels.vectorwise_codes import vectorwise_dequantize_triton

    return vectorwise_dequantize_triton(codes, absmax, dtype, PER_CODE)


if HAS_TRITON:
    vectorwise_quantize_op.register_kernel("cuda")(vectorwise_quantize_cuda)
    vectorwise_fake_quantize_op.register_kernel("cuda")(vectorwise_fake_quantize_cuda)
    vectorwise_fake_quantize_beside_op.register_kernel("cuda")(vectorwise_fake_quantize_beside_cuda)
    column_absmax_op.register_kernel("cuda")(column_absmax_cuda)
    vectorwise_codes_op.register_kernel("cuda")(vectorwise_codes_cuda)
    vectorwise_dequantize_op.register_kernel("cuda")(vectorwise_dequantize_cuda)

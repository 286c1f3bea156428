"""The Triton kernels of AWQ's packed layout, for CUDA tensors; without Triton these get the definition."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_qat.ops.awq import awq_pack_op, awq_unpack_op, reference_awq_pack, reference_awq_unpack
from lightning_qat.ops.fake_quantize_cuda import HAS_TRITON

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def awq_pack_cuda(weight: Tensor, scale: Tensor, zero_point: Tensor | None, input_scale: Tensor | None) -> Tensor:
    """The definition in one launch."""
    if weight.dtype not in _DTYPES:
        return reference_awq_pack(weight, scale, zero_point, input_scale)
    from lightning_qat.kernels.awq import launch_awq_pack

    return launch_awq_pack(weight, scale, zero_point, input_scale)


def awq_unpack_cuda(
    words: Tensor, scale: Tensor, zero_point: Tensor | None, input_scale: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The definition in one launch."""
    if dtype not in _DTYPES:
        return reference_awq_unpack(words, scale, zero_point, input_scale, dtype)
    from lightning_qat.kernels.awq import launch_awq_unpack

    return launch_awq_unpack(words, scale, zero_point, input_scale, dtype)


if HAS_TRITON:
    awq_pack_op.register_kernel("cuda")(awq_pack_cuda)
    awq_unpack_op.register_kernel("cuda")(awq_unpack_cuda)

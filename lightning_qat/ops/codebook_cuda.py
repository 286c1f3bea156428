"""The Triton kernels of the codebook formats and of packed integers, for CUDA tensors.

Without Triton, for float64 and for blocks that are no power of two from 16 to 4096 these get the definition.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from lightning_qat.ops.codebook import (
    codebook_absmax_op,
    codebook_dequantize_op,
    codebook_fake_quantize_backward_op,
    codebook_fake_quantize_op,
    codebook_quantize_op,
    reference_absmax,
    reference_dequantize,
    reference_fake_quantize,
    reference_fake_quantize_backward,
    reference_quantize,
)
from lightning_qat.ops.codebook_tables import (
    CODEBOOK_BITS,
    bin_codes,
    codebook,
    divides_last_block,
    least_absmax,
    nan_code,
    thresholds,
    zero_code,
)
from lightning_qat.ops.fake_quantize_cuda import HAS_TRITON
from lightning_qat.ops.int4_dequantize import int4_dequantize_op, reference_int4_dequantize

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _takes(block_size: int, dtype: torch.dtype, numel: int) -> bool:
    return numel > 0 and dtype in _DTYPES and 16 <= block_size <= 4096 and block_size & (block_size - 1) == 0


def codebook_absmax_cuda(x: Tensor, name: str, block_size: int, rule: str) -> Tensor:
    """The definition in one launch."""
    if not _takes(block_size, x.dtype, x.numel()):
        return reference_absmax(x.reshape(-1), name, block_size, rule)
    from lightning_qat.kernels.codebook import launch_codebook_absmax

    least = least_absmax(name, rule) if divides_last_block(name, rule) else 0.0
    return launch_codebook_absmax(x, block_size=block_size, least_absmax=least)


def codebook_quantize_cuda(
    x: Tensor, absmax: Tensor | None, name: str, block_size: int, rule: str
) -> tuple[Tensor, Tensor]:
    """The definition in one launch."""
    if not _takes(block_size, x.dtype, x.numel()):
        return reference_quantize(x, absmax, name, block_size, rule)
    from lightning_qat.kernels.codebook import launch_codebook_quantize

    codes, scales = launch_codebook_quantize(
        x, absmax, _search(name, rule, x.device), bits=CODEBOOK_BITS[name], block_size=block_size,
        nan_code=nan_code(name, rule), zero_code=zero_code(name), least_absmax=least_absmax(name, rule),
        divide_last_block=divides_last_block(name, rule),
    )  # fmt: skip
    return codes, scales if absmax is None else scales.clone()  # an op's results are memory of their own


def codebook_dequantize_cuda(
    packed: Tensor, absmax: Tensor, numel: int, name: str, block_size: int, dtype: torch.dtype
) -> Tensor:
    """The definition in one launch."""
    if not _takes(block_size, dtype, numel):
        return reference_dequantize(packed, absmax, numel, name, block_size, dtype)
    from lightning_qat.kernels.codebook import launch_codebook_dequantize

    table = codebook(name, packed.device)
    return launch_codebook_dequantize(packed, absmax, table, numel, block_size=block_size, dtype=dtype)


def codebook_fake_quantize_cuda(
    x: Tensor, absmax: Tensor, stored: Tensor | None, name: str, block_size: int, rule: str
) -> Tensor:
    """The definition in one launch, without codes in memory."""
    if not _takes(block_size, x.dtype, x.numel()):
        return reference_fake_quantize(x, absmax, stored, name, block_size, rule)
    from lightning_qat.kernels.codebook_fake_quantize import launch_codebook_fake_quantize

    return launch_codebook_fake_quantize(
        x, absmax, stored, _search(name, rule, x.device), codebook(name, x.device), block_size=block_size,
        nan_code=nan_code(name, rule), least_absmax=least_absmax(name, rule),
        divide_last_block=divides_last_block(name, rule),
    )  # fmt: skip


def codebook_fake_quantize_backward_cuda(grad: Tensor, x: Tensor, absmax: Tensor, block_size: int) -> Tensor:
    """The definition in one launch."""
    if not _takes(block_size, x.dtype, x.numel()) or grad.dtype != x.dtype:
        return reference_fake_quantize_backward(grad, x, absmax, block_size)
    from lightning_qat.kernels.codebook_fake_quantize import launch_codebook_fake_quantize_backward

    return launch_codebook_fake_quantize_backward(grad, x, absmax, block_size=block_size)


def int4_dequantize_cuda(
    packed: Tensor, scale: Tensor, zero_point: Tensor | None, numel: int, run: int, dtype: torch.dtype
) -> Tensor:
    """The definition in one launch."""
    if dtype not in _DTYPES or not numel:
        return reference_int4_dequantize(packed, scale, zero_point, numel, run, dtype)
    from lightning_qat.kernels.affine import launch_unpack_dequantize

    return launch_unpack_dequantize(
        packed, scale, zero_point, (numel,), bits=4, symmetric=zero_point is None, group_size=run, dtype=dtype
    )


@lru_cache(maxsize=16)
def _search(name: str, rule: str, device: torch.device) -> Tensor:
    from lightning_qat.kernels.codebook import cell_table

    limits = thresholds(name, rule, device)
    return cell_table(limits, bin_codes(name, rule, device)) if CODEBOOK_BITS[name] == 4 else limits


if HAS_TRITON:
    codebook_absmax_op.register_kernel("cuda")(codebook_absmax_cuda)
    codebook_quantize_op.register_kernel("cuda")(codebook_quantize_cuda)
    codebook_dequantize_op.register_kernel("cuda")(codebook_dequantize_cuda)
    codebook_fake_quantize_op.register_kernel("cuda")(codebook_fake_quantize_cuda)
    codebook_fake_quantize_backward_op.register_kernel("cuda")(codebook_fake_quantize_backward_cuda)
    int4_dequantize_op.register_kernel("cuda")(int4_dequantize_cuda)

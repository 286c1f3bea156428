"""The Triton kernel of GPTQ and coordinate descent, for CUDA tensors; without Triton these get the definitions."""

from __future__ import annotations

from torch import Tensor

from lightning_qat.ops.coordinate_descent import descend_block_op, reference_descend_block
from lightning_qat.ops.fake_quantize_cuda import HAS_TRITON
from lightning_qat.ops.gptq import gptq_block_op, reference_gptq_block


def _takes(columns: Tensor, values: Tensor | None) -> bool:
    from lightning_qat.kernels.gptq import MOST_COLUMNS

    fits = len(columns) <= MOST_COLUMNS and columns.numel() > 0
    return fits and (values is None or len(values) in (16, 256))


def gptq_block_cuda(
    columns: Tensor,
    factor: Tensor,
    step: Tensor,
    zero: Tensor | None,
    low: int,
    high: int,
    values: Tensor | None,
    thresholds: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The definition in one launch; blocks of more than 128 columns take the definition itself."""
    if not _takes(columns, values):
        return reference_gptq_block(columns, factor, step, zero, low, high, values, thresholds)
    from lightning_qat.kernels.gptq import launch_gptq_block

    return launch_gptq_block(columns, factor, step, zero, low, high, values, thresholds)


def descend_block_cuda(
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
    """The definition in one launch; blocks of more than 128 columns take the definition itself."""
    if not _takes(products, values):
        return reference_descend_block(products, current, hessian, step, zero, low, high, values, thresholds)
    from lightning_qat.kernels.gptq import launch_descend_block

    return launch_descend_block(products, current, hessian, step, zero, low, high, values, thresholds)


if HAS_TRITON:
    gptq_block_op.register_kernel("cuda")(gptq_block_cuda)
    descend_block_op.register_kernel("cuda")(descend_block_cuda)

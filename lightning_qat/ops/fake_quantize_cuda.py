"""The Triton kernels of fake quantization, for CUDA tensors; without Triton these get the definition."""

from __future__ import annotations

from importlib.util import find_spec

from torch import Tensor

from lightning_qat.ops.fake_quantize import (
    fake_quantize_backward_op,
    fake_quantize_op,
    reference_fake_quantize,
    reference_fake_quantize_backward,
)

#: Triton is installed on Linux only.
HAS_TRITON = find_spec("triton") is not None


def fake_quantize_cuda(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, quant_min: int, quant_max: int, axis: int, group: int
) -> Tensor:
    """The definition in one launch; float64 and empty tensors take the definition itself."""
    from lightning_qat.kernels.fake_quantize import DTYPES, fake_quantize_triton

    function = fake_quantize_triton if x.dtype in DTYPES and x.numel() else reference_fake_quantize
    return function(x, scale, zero_point, quant_min, quant_max, axis, group)


def fake_quantize_backward_cuda(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
    axis: int,
    group: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition in one launch and the sums of a few thousand numbers; other dtypes take the definition itself."""
    from lightning_qat.kernels.fake_quantize import DTYPES
    from lightning_qat.kernels.fake_quantize_backward import fake_quantize_backward_triton

    fits = x.dtype in DTYPES and grad.dtype == x.dtype and x.numel()
    function = fake_quantize_backward_triton if fits else reference_fake_quantize_backward
    return function(grad, x, scale, zero_point, quant_min, quant_max, axis, group, needs)


if HAS_TRITON:
    fake_quantize_op.register_kernel("cuda")(fake_quantize_cuda)
    fake_quantize_backward_op.register_kernel("cuda")(fake_quantize_backward_cuda)

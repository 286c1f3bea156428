"""What a converted Linear computes with on a GPU: Triton kernels that read the packed weight as it is stored.

Weight-only formats of four bits are dequantized in registers; 8-bit weights and inputs are multiplied as integers. The
grids are the trained ones, as on a CPU.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_qat.ops.affine import quantize_affine
from lightning_qat.ops.codebook_tables import codebook
from lightning_qat.ops.fake_quantize_cuda import HAS_TRITON
from lightning_qat.ops.int4_dequantize import int4_run
from lightning_qat.ops.integer_linear import MAX_TERMS
from lightning_qat.schemes import CodebookScheme, IntegerScheme, get_scheme

if TYPE_CHECKING:
    from lightning_qat.nn.layer import QuantizedLayer

#: Computes a layer's output from its input and bias.
TritonKernel = Callable[[Tensor, "Tensor | None"], Tensor]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

#: From so many rows on the weight is dequantized, for this product alone, and multiplied by the library. The kernel,
#: which dequantizes for every tile, took 3.3 ms for 8192 rows of 8192 x 8192 bfloat16 on an H100, the dense product 1.4
#: and dequantizing 0.07; for 256 rows 0.08 where dense takes 0.06.
_MANY_ROWS = 512


def triton_execution(layer: QuantizedLayer) -> str | None:
    """Return the kernel that a converted Linear has on a GPU, or None for the reference."""
    weight, grid = layer.weight_format, layer.input_format
    scheme = get_scheme(weight.scheme)
    if not HAS_TRITON or layer.training or layer.weight_dtype not in _DTYPES or not layer.weight_shape.numel():
        return None
    if grid is None:
        even = layer.weight_shape[1] % 2 == 0
        if weight.bits != 4 or not even:
            return None
        integer = type(scheme) is IntegerScheme and int4_run(layer.weight_shape, weight.axis, weight.group_size)
        return "triton w4a16" if integer or isinstance(scheme, CodebookScheme) else None
    whole = type(scheme) is IntegerScheme and weight.bits == 8 and weight.symmetric and weight.group_size is None
    if not whole or weight.axis not in (None, 0) or layer.weight_shape[1] > MAX_TERMS:
        return None
    if type(get_scheme(grid.scheme)) is not IntegerScheme or grid.bits != 8:
        return None
    if not grid.dynamic:
        return "triton int8"
    return "triton int8 per token" if grid.dynamic_range == "token" and grid.symmetric else None


def takes_triton(layer: QuantizedLayer, x: Tensor) -> bool:
    """Return whether this call can go to a kernel on a GPU, if the layer has one."""
    if x.device.type != "cuda" or torch.compiler.is_compiling() or torch.jit.is_tracing() or type(x) is not Tensor:
        return False
    if torch._C._functorch.maybe_current_level() is not None or torch.is_autocast_enabled("cuda"):
        return False
    if x.dtype != layer.weight_dtype or not x.numel() or x.shape[-1] != layer.weight_shape[1]:
        return False
    bias: Any = layer.bias
    return not (torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)))


def triton_kernel(layer: QuantizedLayer) -> TritonKernel | None:
    """Return what computes a converted Linear, as it is now, from tensors on its device; None for the reference."""
    execution = triton_execution(layer)
    if execution is None:
        return None
    if execution == "triton w4a16":
        return _weight_only(layer)
    return _per_token(layer) if execution == "triton int8 per token" else _static(layer)


def _weight_only(layer: QuantizedLayer) -> TritonKernel:
    from lightning_qat.kernels.w4a16_matmul import launch_w4a16_matmul

    fmt, packed = layer.weight_format, layer.weight_packed
    size: Any = fmt.block_size or int4_run(layer.weight_shape, fmt.axis, fmt.group_size)
    # One scale for the tensor is one for each row: the kernel's groups do not reach beyond a row.
    rows, columns = layer.weight_shape
    scale, zero_point = layer.scale.reshape(-1), layer.weight_zero_point
    zero = None if fmt.symmetric or zero_point is None else zero_point.reshape(-1)
    if fmt.block_size is None and size > columns:
        size, scale = columns, scale.expand(rows).contiguous()
        zero = None if zero is None else zero.expand(rows).contiguous()
    table = codebook(fmt.scheme, packed.device) if fmt.block_size is not None else None

    owner = weakref.ref(layer)  # which keeps the kernel

    def kernel(x: Tensor, bias: Tensor | None) -> Tensor:
        flat = x.reshape(-1, columns)
        if len(flat) >= _MANY_ROWS and x.dtype != torch.float32:
            alive: Any = owner()
            return F.linear(x, alive.weight, bias)
        result = launch_w4a16_matmul(
            flat, packed, scale, zero, bias, group_size=size, table=table, signed=fmt.symmetric
        )
        return result.view(*x.shape[:-1], rows)

    return kernel


def _per_token(layer: QuantizedLayer) -> TritonKernel:
    from lightning_qat.kernels.token_quantize import token_quantize_triton
    from lightning_qat.kernels.w8a8_matmul import launch_w8a8_matmul

    codes, scale = layer.codes, layer.weight_scale.reshape(-1)

    def kernel(x: Tensor, bias: Tensor | None) -> Tensor:
        rows, steps, _ = token_quantize_triton(x.reshape(-1, x.shape[-1]))
        result = launch_w8a8_matmul(rows, steps, codes, scale, bias, dtype=x.dtype)
        return result.view(*x.shape[:-1], codes.shape[0])

    return kernel


def _static(layer: QuantizedLayer) -> TritonKernel:
    from lightning_qat.kernels.w8a8_matmul import launch_w8a8_matmul

    codes, scale = layer.codes, layer.weight_scale.reshape(-1)
    fmt: Any = layer.input_format
    step: Any = layer.input_scale
    zero_point = layer.input_zero_point
    sums = codes.sum(1, dtype=torch.int32) if zero_point is not None else None
    shifted = None if zero_point is None else torch.round(zero_point.float()).to(torch.int32) - 128

    def kernel(x: Tensor, bias: Tensor | None) -> Tensor:
        rows = quantize_affine(x.reshape(-1, x.shape[-1]), step, zero_point, bits=8, symmetric=fmt.symmetric)
        if shifted is not None:
            rows = (rows ^ 128).view(torch.int8)
        result = launch_w8a8_matmul(
            rows, step.reshape(1), codes, scale, bias, a_zero_point=shifted, b_sums=sums, dtype=x.dtype
        )
        return result.view(*x.shape[:-1], codes.shape[0])

    return kernel

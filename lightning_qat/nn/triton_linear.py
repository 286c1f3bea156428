"""What a converted Linear computes with on a GPU, and in compiled graphs: kernels that read the weight as it is stored.

Weight-only formats of four bits are dequantized in registers; 8-bit weights and inputs are multiplied as integers. The
grids are the trained ones, as on a CPU.

An eager call launches the kernels itself: a dispatcher's call takes 20 to 35 microseconds, the product of one token 26.
Under ``torch.compile`` the ops that launch them are traced, so weights stay packed in the graph. There the sums of
8-bit codes, which an asymmetric static input needs, are made in every call; ``torch._inductor.config.freezing`` keeps
them.
What ``torch.export`` makes has the float form.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from lightning_qat.ops.codebook_tables import codebook
from lightning_qat.ops.fake_quantize_cuda import HAS_TRITON
from lightning_qat.ops.int4_dequantize import int4_run
from lightning_qat.ops.integer_linear import MAX_TERMS
from lightning_qat.ops.quantize_packed import quantize_packed_op
from lightning_qat.ops.token_quantize import token_quantize_op
from lightning_qat.ops.w4a16_matmul import MANY_ROWS, w4a16_matmul_op
from lightning_qat.ops.w8a8_matmul import w8a8_matmul_op
from lightning_qat.schemes import CodebookScheme, IntegerScheme, get_scheme

if TYPE_CHECKING:
    from lightning_qat.nn.layer import QuantizedLayer

#: Computes a layer's output from its input and bias.
TritonKernel = Callable[[Tensor, "Tensor | None"], Tensor]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

#: Whether PyTorch multiplies int8 fast on this CPU: elsewhere its loop is scalar, and slower than floats.
_INT8_ON_CPU = torch.backends.cpu.get_cpu_capability() == "AVX512"
#: The products of which a graph for the CPU then has the ops.
_OPS_ON_CPU: tuple[str | None, ...] = ("int8", "int8 per token")


def triton_execution(layer: QuantizedLayer) -> str | None:
    """Return the kernel that a converted Linear has on a GPU, or None for the reference."""
    product = _product(layer) if HAS_TRITON else None
    return None if product is None else f"triton {product}"


def _product(layer: QuantizedLayer) -> str | None:
    """Return which product a converted Linear is, or None where there are no ops for it."""
    weight, grid = layer.weight_format, layer.input_format
    scheme = get_scheme(weight.scheme)
    if layer.training or layer.weight_dtype not in _DTYPES or not layer.weight_shape.numel():
        return None
    if grid is None:
        even = layer.weight_shape[1] % 2 == 0
        if weight.bits != 4 or not even:
            return None
        integer = type(scheme) is IntegerScheme and int4_run(layer.weight_shape, weight.axis, weight.group_size)
        return "w4a16" if integer or isinstance(scheme, CodebookScheme) else None
    whole = type(scheme) is IntegerScheme and weight.bits == 8 and weight.symmetric and weight.group_size is None
    if not whole or weight.axis not in (None, 0) or layer.weight_shape[1] > MAX_TERMS:
        return None
    if type(get_scheme(grid.scheme)) is not IntegerScheme or grid.bits != 8:
        return None
    if not grid.dynamic:
        return "int8"
    return "int8 per token" if grid.dynamic_range == "token" and grid.symmetric else None


def takes_triton(layer: QuantizedLayer, x: Tensor) -> bool:
    """Return whether this call can go to a kernel on a GPU, if the layer has one."""
    if not x.is_cuda or torch.compiler.is_compiling() or torch.jit.is_tracing() or type(x) is not Tensor:
        return False
    if torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0:
        return False
    return _fits(layer, x) and bool(x.numel())


def takes_ops(layer: QuantizedLayer, x: Tensor) -> bool:
    """Return whether the graph that is being compiled gets the ops instead of the float form.

    On a CPU those of integer products do: one token and 2048 x 2048 float32 took a third of the time, 64 a seventh. So
    do those of 4-bit weights, which are read as they are stored for few tokens: one took an eighth of the time.
    """
    if not torch.compiler.is_compiling() or torch.compiler.is_exporting() or x.device.type not in ("cpu", "cuda"):
        return False
    product = _product(layer) if _fits(layer, x) else None
    if x.device.type == "cpu":
        return product == "w4a16" or (_INT8_ON_CPU and product in _OPS_ON_CPU)
    return HAS_TRITON and product is not None


def _fits(layer: QuantizedLayer, x: Tensor) -> bool:
    if x.dtype != layer.weight_dtype or x.shape[-1] != layer.weight_shape[1]:
        return False
    if torch.is_autocast_enabled(x.device.type):
        return False
    bias: Any = layer.bias
    if bias is not None and bias.shape != layer.weight_shape[:1]:
        return False
    return not (torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)))


# --- in a compiled graph --------------------------------------------------------------------------


def linear_by_ops(layer: QuantizedLayer, x: Tensor, bias: Tensor | None) -> Tensor:
    """Return what the kernel of :func:`triton_kernel` does, in ops; :func:`takes_ops` holds."""
    product, flat = _product(layer), x.reshape(-1, x.shape[-1])
    if product == "w4a16":
        scale, zero, size, name = four_bit_groups(layer)
        result = w4a16_matmul_op(flat, layer.weight_packed, scale, zero, bias, layer.weight_shape[0], size, name)
    else:
        weight = (layer.codes, layer.weight_scale.reshape(-1))
        if product == "int8 per token":
            codes, steps, _ = token_quantize_op(flat, True)
            result = w8a8_matmul_op(codes, steps, *weight, bias, None, None, x.dtype)
        else:
            fmt, step, shifted = _static_input(layer)
            codes = quantize_packed_op(flat, step, layer.input_zero_point, 8, fmt.symmetric, max(flat.numel(), 1))
            signed = codes if shifted is None else (codes ^ 128).view(torch.int8)
            result = w8a8_matmul_op(signed, step, *weight, bias, shifted, None, x.dtype)
    return result.view(*x.shape[:-1], layer.weight_shape[0])


# --- in an eager call -----------------------------------------------------------------------------


def triton_kernel(layer: QuantizedLayer) -> TritonKernel | None:
    """Return what computes a converted Linear, as it is now, from tensors on its device; None for the reference."""
    execution = triton_execution(layer)
    if execution is None:
        return None
    if execution == "triton w4a16":
        return _weight_only(layer)
    return _per_token(layer) if execution == "triton int8 per token" else _static(layer)


def four_bit_groups(layer: QuantizedLayer) -> tuple[Tensor, Tensor | None, int, str | None]:
    """Return scale and zero point of the groups of a 4-bit weight, their size, and the name of the codebook."""
    fmt, (rows, columns) = layer.weight_format, layer.weight_shape
    size: Any = fmt.block_size or int4_run(layer.weight_shape, fmt.axis, fmt.group_size)
    scale, zero_point = layer.held_scale().reshape(-1), layer.weight_zero_point
    zero = None if fmt.symmetric or zero_point is None else zero_point.reshape(-1)
    # One scale for the tensor is one for each row: the kernel's groups do not reach beyond a row.
    if fmt.block_size is None and size > columns:
        size, scale = columns, scale.expand(rows).contiguous()
        zero = None if zero is None else zero.expand(rows).contiguous()
    return scale, zero, size, fmt.scheme if fmt.block_size is not None else None


def _static_input(layer: QuantizedLayer) -> tuple[Any, Tensor, Tensor | None]:
    """Return format and scale of a calibrated input, and the zero point that its codes have as int8."""
    step: Any = layer.input_scale
    zero_point = layer.input_zero_point
    shifted = None if zero_point is None else torch.round(zero_point.float()).to(torch.int32).reshape(1) - 128
    return layer.input_format, step.reshape(1), shifted


def _weight_only(layer: QuantizedLayer) -> TritonKernel:
    from lightning_qat.kernels.w4a16_matmul import launch_w4a16_matmul

    packed, signed, (rows, columns) = layer.weight_packed, layer.weight_format.symmetric, layer.weight_shape
    scale, zero, size, name = four_bit_groups(layer)
    table = None if name is None else codebook(name, packed.device)
    owner = weakref.ref(layer)  # which keeps the kernel

    def kernel(x: Tensor, bias: Tensor | None) -> Tensor:
        flat = x.reshape(-1, columns)
        if len(flat) >= MANY_ROWS and x.dtype != torch.float32:
            alive: Any = owner()
            return F.linear(x, alive.weight, bias)
        result = launch_w4a16_matmul(flat, packed, scale, zero, bias, group_size=size, table=table, signed=signed)
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
    from lightning_qat.kernels.affine import launch_quantize_pack
    from lightning_qat.kernels.w8a8_matmul import launch_w8a8_matmul

    codes, scale = layer.codes, layer.weight_scale.reshape(-1)
    fmt, step, shifted = _static_input(layer)
    zero_point, symmetric = layer.input_zero_point, fmt.symmetric
    sums = codes.sum(1, dtype=torch.int32) if shifted is not None else None

    def kernel(x: Tensor, bias: Tensor | None) -> Tensor:
        rows = launch_quantize_pack(x.reshape(-1, x.shape[-1]), step, zero_point, bits=8, symmetric=symmetric)
        if shifted is not None:
            rows = (rows ^ 128).view(torch.int8)
        result = launch_w8a8_matmul(rows, step, codes, scale, bias, a_zero_point=shifted, b_sums=sums, dtype=x.dtype)
        return result.view(*x.shape[:-1], codes.shape[0])

    return kernel

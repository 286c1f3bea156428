"""Floating-point rows times a packed 4-bit weight: integers in groups, or a codebook in blocks.

The definition multiplies the dequantized weight, in float32, and sums in float32. Kernels differ from it by the order
of these sums, and may round each weight, in units of its scale or scaled, to the dtype of ``x`` as a dense layer holds
it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_qat.ops.codebook import codebook_dequantize_op, reference_dequantize
from lightning_qat.ops.codebook_tables import CODEBOOK_BITS, check_codebook
from lightning_qat.ops.codebook_tables import codebook as codebook_values
from lightning_qat.ops.fake_quantize_cuda import HAS_TRITON
from lightning_qat.ops.float_linear import float_linear, four_bits_fit, most_tokens, of_four_bits
from lightning_qat.ops.forward_mode import refuse_tangents
from lightning_qat.ops.int4_dequantize import int4_dequantize_op, reference_int4_dequantize

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

#: From so many rows on the weight is dequantized, for this product alone, and multiplied by the library. The kernel,
#: which dequantizes for every tile, took 3.3 ms for 8192 rows of 8192 x 8192 bfloat16 on an H100, the dense product 1.4
#: and dequantizing 0.07; for 256 rows 0.08 where dense takes 0.06.
MANY_ROWS = 512


def w4a16_matmul(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    out_features: int,
    group_size: int,
    codebook: str | None = None,
) -> Tensor:
    """Return ``x @ weight.T + bias`` in the dtype of ``x``; ``x`` and ``bias`` have a gradient.

    Args:
        x: float16, bfloat16 or float32 ``[..., K]``.
        packed: uint8, the ``out_features * K`` codes of the flattened weight, two to a byte: integers as ``pack_bits``
            stores them, codebooks as ``pack_nibbles`` does.
        scale: float32, one for each ``group_size`` codes; with ``codebook`` the absmax.
        zero_point: of unsigned integers, shaped as ``scale``; None says that they are signed.
        bias: ``[out_features]`` or None.
        out_features: rows of the weight.
        group_size: codes that share a scale. Integers: a divisor of ``K``. A codebook: any, and the last block may be
            short.
        codebook: "nf4" or "fp4"; None for integers.

    Raises:
        ValueError: if a dtype, size, device or name does not fit, naming what is allowed.
        NotImplementedError: under ``torch.func.jvp`` and its kin, in forward mode.
    """
    if x.dtype not in _DTYPES or not x.dim():
        raise ValueError(f"x is {x.dtype} of shape {tuple(x.shape)}; use [..., K] of float16, bfloat16 or float32")
    columns = x.shape[-1]
    _check_weight(packed, scale, zero_point, out_features, columns, group_size, codebook)
    for name, tensor in (("packed", packed), ("scale", scale), ("zero_point", zero_point), ("bias", bias)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device} and x on {x.device}; move it to {x.device}")
    if bias is not None and bias.numel() != out_features:
        raise ValueError(f"bias has {bias.numel()} elements; use out_features={out_features}")
    refuse_tangents(x, bias, what="w4a16_matmul has a gradient")
    flat = x.reshape(x.shape[:-1].numel(), columns)
    result = w4a16_matmul_op(flat, packed, scale, zero_point, bias, out_features, group_size, codebook)
    return result.view(*x.shape[:-1], out_features)


def _check_weight(
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    rows: int,
    columns: int,
    group_size: int,
    codebook: str | None,
) -> None:
    if codebook is not None:
        check_codebook(codebook)
        if CODEBOOK_BITS[codebook] != 4:
            raise ValueError(f"codebook={codebook!r} has {CODEBOOK_BITS[codebook]} bits; use 'nf4' or 'fp4'")
        if zero_point is not None:
            raise ValueError(f"zero_point is given with codebook={codebook!r}, which has none; leave it out")
    if group_size < 1 or (codebook is None and columns % group_size):
        raise ValueError(f"group_size must divide K: {columns} % {group_size} != 0")
    count = rows * columns
    if packed.dtype != torch.uint8 or packed.numel() != (count + 1) // 2:
        raise ValueError(
            f"packed is {packed.dtype} with {packed.numel()} elements; a weight [{rows}, {columns}] takes "
            f"{(count + 1) // 2} of torch.uint8"
        )
    groups = -(-count // group_size)
    for name, tensor in (("scale", scale), ("zero_point", zero_point)):
        if tensor is not None and tensor.numel() != groups:
            raise ValueError(f"{name} has {tensor.numel()} elements; groups of {group_size} take {groups}")


def reference_w4a16_matmul(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    group_size: int,
    codebook: str | None,
) -> Tensor:
    """The definition."""
    count = out_features * x.shape[1]
    flat = packed.reshape(-1)
    if codebook is None:
        values = reference_int4_dequantize(flat, scale, zero_point, count, group_size, torch.float32)
    else:
        values = reference_dequantize(flat, scale.reshape(-1), count, codebook, group_size, torch.float32)
    result = x.to(torch.float32) @ values.view(out_features, x.shape[1]).t()
    return (result if bias is None else result + bias.to(torch.float32)).to(x.dtype)


@torch.library.custom_op("lightning_qat::w4a16_matmul", mutates_args=())
def w4a16_matmul_op(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    group_size: int,
    codebook: str | None,
) -> Tensor:
    """The unchecked op behind :func:`w4a16_matmul`, of ``[M, K]``; see :func:`reference_w4a16_matmul`."""
    return reference_w4a16_matmul(x, packed, scale, zero_point, bias, out_features, group_size, codebook)


@w4a16_matmul_op.register_fake
def _(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    group_size: int,
    codebook: str | None,
) -> Tensor:
    return x.new_empty((x.shape[0], out_features))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, scale, zero_point, bias, ctx.out_features, ctx.group_size, ctx.codebook = inputs
    ctx.columns, ctx.bias_dtype = x.shape[1], None if bias is None else bias.dtype
    ctx.save_for_backward(packed, scale, zero_point)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        packed, scale, zero_point = ctx.saved_tensors
        shape = (ctx.out_features, ctx.columns)
        grad_x = grad @ _dequantized(packed, scale, zero_point, shape, ctx.group_size, ctx.codebook, grad.dtype)
    if ctx.needs_input_grad[4]:
        grad_bias = grad.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    return grad_x, None, None, None, grad_bias, None, None, None


w4a16_matmul_op.register_autograd(_backward, setup_context=_setup_context)


def _dequantized(
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    shape: tuple[int, int],
    group_size: int,
    codebook: str | None,
    dtype: torch.dtype,
) -> Tensor:
    """Return the weight by the kernels of its device."""
    flat, count = packed.reshape(-1), shape[0] * shape[1]
    if codebook is None:
        return int4_dequantize_op(flat, scale, zero_point, count, group_size, dtype).view(shape)
    return codebook_dequantize_op(flat, scale.reshape(-1), count, codebook, group_size, dtype).view(shape)


def _dense(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    group_size: int,
    codebook: str | None,
) -> Tensor:
    """Return the product by the library, with the weight in the dtype of ``x``."""
    shape = (out_features, x.shape[1])
    weight = _dequantized(packed, scale, zero_point, shape, group_size, codebook, x.dtype)
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


@w4a16_matmul_op.register_kernel("cpu")
def w4a16_matmul_cpu(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    group_size: int,
    codebook: str | None,
) -> Tensor:
    """The definition for few rows, as a converted layer computes it from the weight as it is stored; else dense."""
    rows, columns = x.shape
    few = rows and four_bits_fit(out_features, columns, group_size)
    if not few or rows > most_tokens(4, out_features, columns, group_size, x.dtype):
        return _dense(x, packed, scale, zero_point, bias, out_features, group_size, codebook)
    weight = of_four_bits(packed.reshape(-1), scale, zero_point, out_features, group_size, codebook)
    return float_linear(x, weight, bias)


def w4a16_matmul_cuda(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    group_size: int,
    codebook: str | None,
) -> Tensor:
    """The definition with the weight dequantized in registers; rows of odd length take the definition itself."""
    arguments = (x, packed, scale, zero_point, bias, out_features, group_size, codebook)
    if not x.numel() or not packed.numel() or x.shape[1] % 2 or x.dtype not in _DTYPES:
        return reference_w4a16_matmul(*arguments)
    if len(x) >= MANY_ROWS and x.dtype != torch.float32:
        return _dense(*arguments)
    from lightning_qat.kernels.w4a16_matmul import launch_w4a16_matmul

    table = None if codebook is None else codebook_values(codebook, x.device)
    return launch_w4a16_matmul(
        x, packed, scale, zero_point, bias, group_size=group_size, table=table, signed=zero_point is None
    )


if HAS_TRITON:
    w4a16_matmul_op.register_kernel("cuda")(w4a16_matmul_cuda)

"""Per-token quantization at run time: the range of every row, the scale it gives and 8-bit codes."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_qat.native.linear_int8 import quantize_by_range
from lightning_qat.ops.affine import choose_scale_zero_point, quantize_affine
from lightning_qat.ops.fake_quantize_cuda import HAS_TRITON

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def token_quantize(x: Tensor, *, symmetric: bool = True) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return 8-bit codes of ``x``, the scale of each of its rows, and their zero points (None if symmetric).

    Scale, zero point and codes are those of ``choose_scale_zero_point`` over the last dimension and of
    ``quantize_affine``, bit for bit. No gradient passes.

    Args:
        x: floating point, ``[..., K]``, any strides.
        symmetric: codes from -127 to 127; otherwise from 0 to 255.

    Returns:
        Codes, int8 or uint8, contiguous in the shape of ``x``; the scale, float32 ``[..., 1]``; and the zero
        point, int32 ``[..., 1]``.

    Raises:
        ValueError: if ``x`` is not floating point or has no elements in a row.
    """
    if not x.is_floating_point():
        raise ValueError(f"x has dtype {x.dtype}; use a floating-point dtype")
    if not x.dim() or not x.shape[-1]:
        raise ValueError(f"x has shape {tuple(x.shape)}; rows of one element or more have a range")
    codes, scale, zero = token_quantize_op(x, symmetric)
    return codes, scale, None if symmetric else zero


def reference_token_quantize(x: Tensor, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The definition; the zero point of symmetric codes is empty."""
    rows = x.reshape(-1, x.shape[-1])
    low, high = torch.aminmax(rows, dim=1)
    scale, zero = choose_scale_zero_point(low, high, bits=8, symmetric=symmetric)
    codes = quantize_affine(rows.contiguous(), scale, zero, bits=8, symmetric=symmetric, axis=0)
    kept = (*x.shape[:-1], 1)
    zero = scale.new_empty(0, dtype=torch.int32) if zero is None else zero.view(kept)
    return codes.view(x.shape), scale.view(kept), zero


@torch.library.custom_op("lightning_qat::token_quantize", mutates_args=())
def token_quantize_op(x: Tensor, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The unchecked op behind :func:`token_quantize`; see :func:`reference_token_quantize`."""
    return reference_token_quantize(x, symmetric)


@token_quantize_op.register_fake
def _(x: Tensor, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    kept = (*x.shape[:-1], 1)
    codes = x.new_empty(x.shape, dtype=torch.int8 if symmetric else torch.uint8)
    zero = x.new_empty(0 if symmetric else kept, dtype=torch.int32)
    return codes, x.new_empty(kept, dtype=torch.float32), zero


@token_quantize_op.register_kernel("cpu")
def token_quantize_cpu(x: Tensor, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The definition in one pass over each row, for symmetric codes, where there is a compiler."""
    if symmetric and x.dtype in _DTYPES and x.numel():
        found = quantize_by_range(x.reshape(-1, x.shape[-1]).float().contiguous(), -127, 127, 127.0, per_token=True)
        if found is not None:
            codes, scale, _ = found
            signed = codes.bitwise_xor_(128).view(torch.int8).view(x.shape)  # adding 128 modulo 256
            return signed, scale.view(*x.shape[:-1], 1), scale.new_empty(0, dtype=torch.int32)
    return reference_token_quantize(x, symmetric)


def token_quantize_cuda(x: Tensor, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The definition in one launch; float64 and empty tensors take the definition itself."""
    if x.dtype not in _DTYPES or not x.numel():
        return reference_token_quantize(x, symmetric)
    from lightning_qat.kernels.token_quantize import token_quantize_triton

    codes, scale, zero = token_quantize_triton(x, symmetric=symmetric)
    return codes, scale, scale.new_empty(0, dtype=torch.int32) if zero is None else zero


if HAS_TRITON:
    token_quantize_op.register_kernel("cuda")(token_quantize_cuda)

"""int8 times int8 with exact sums, scaled, shifted and rounded: the product of a layer with 8-bit weights and inputs.

``out = (a - a_zero_point) @ b.T * (a_scale * b_scale) + bias``: the sum is exact, then in float32 one rounding for the
product of the scales, one for the conversion, one for the product and one for the sum, and the one of the result's
dtype. Every kernel gives these bits, for integer sums have no order.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from lightning_qat.native.linear_int8 import multiply_codes_native
from lightning_qat.ops.fake_quantize_cuda import HAS_TRITON
from lightning_qat.ops.integer_linear import FEW_ROWS, MAX_TERMS, SIGNED_OFFSET, few_rows


def w8a8_matmul(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    bias: Tensor | None = None,
    *,
    a_zero_point: Tensor | int | None = None,
    b_sums: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return ``(a - a_zero_point) * a_scale @ (b * b_scale).T + bias``. No gradient passes.

    Args:
        a: int8 ``[..., K]``. Codes of 0 to 255 become int8 by ``(codes ^ 128).view(torch.int8)``, their zero point by
            subtracting 128.
        a_scale: float32, one element or one for each row of ``a``.
        b: int8 ``[N, K]``.
        b_scale: float32, one element or one for each row of ``b``.
        bias: ``[N]``, any floating dtype.
        a_zero_point: -128 to 127; a tensor has one element or one for each row of ``a``.
        b_sums: int32 ``[N]``, the sum of each row of ``b``; found here, which reads all of ``b``, where it is None.
        dtype: of the result, floating point.

    Raises:
        ValueError: if a dtype, size or device does not fit, or a sum could leave int32.
    """
    if a.dtype != torch.int8 or b.dtype != torch.int8 or not a.dim() or b.dim() != 2 or a.shape[-1] != b.shape[1]:
        raise ValueError(
            f"a is {a.dtype} of shape {tuple(a.shape)} and b {b.dtype} of shape {tuple(b.shape)}; use torch.int8 of "
            f"[..., K] and [N, K]"
        )
    if b.shape[1] > MAX_TERMS:
        raise ValueError(f"sums of {b.shape[1]} products may leave int32; use {MAX_TERMS} columns at most")
    if not dtype.is_floating_point:
        raise ValueError(f"dtype={dtype} is not allowed; use a floating-point dtype")
    rows, columns = a.shape[:-1].numel(), b.shape[0]
    zero = torch.full((1,), a_zero_point, dtype=torch.int32, device=a.device) if isinstance(a_zero_point, int) else None
    if isinstance(a_zero_point, Tensor):
        zero = a_zero_point
    sizes = {"a_scale": (a_scale, rows), "b_scale": (b_scale, columns), "a_zero_point": (zero, rows)}
    for name, (tensor, most) in sizes.items():
        if tensor is not None and (tensor.numel() not in (1, most) or tensor.device != a.device):
            raise ValueError(f"{name} has {tensor.numel()} elements on {tensor.device}; use 1 or {most} on {a.device}")
    for name, vector in (("bias", bias), ("b_sums", b_sums)):
        if vector is not None and (vector.numel() != columns or vector.device != a.device):
            raise ValueError(f"{name} has {vector.numel()} elements on {vector.device}; use {columns} on {a.device}")
    flat = a.reshape(rows, b.shape[1])
    return w8a8_matmul_op(flat, a_scale, b, b_scale, bias, zero, b_sums, dtype).view(*a.shape[:-1], columns)


def reference_w8a8_matmul(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    a_zero_point: Tensor | None,
    b_sums: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """The definition, with sums in float64, which holds every one of them."""
    rows = a.to(torch.float64)
    if a_zero_point is not None:
        rows = rows - a_zero_point.reshape(-1, 1).to(torch.float64)
    return _scaled(rows @ b.to(torch.float64).t(), a_scale, b_scale, bias, dtype)


def _scaled(sums: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    factors = a_scale.to(torch.float32).reshape(-1, 1) * b_scale.to(torch.float32).reshape(1, -1)
    value = sums.to(torch.float32) * factors
    return (value if bias is None else value + bias.to(torch.float32)).to(dtype)


@torch.library.custom_op("lightning_qat::w8a8_matmul", mutates_args=())
def w8a8_matmul_op(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    a_zero_point: Tensor | None,
    b_sums: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """The unchecked op behind :func:`w8a8_matmul`, of ``[M, K]`` and ``[N, K]``; see :func:`reference_w8a8_matmul`."""
    return reference_w8a8_matmul(a, a_scale, b, b_scale, bias, a_zero_point, b_sums, dtype)


@w8a8_matmul_op.register_fake
def _(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    a_zero_point: Tensor | None,
    b_sums: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[0]), dtype=dtype)


@w8a8_matmul_op.register_kernel("cpu")
def w8a8_matmul_cpu(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    a_zero_point: Tensor | None,
    b_sums: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """The definition with oneDNN's sums in int32, where the CPU has instructions that do not saturate.

    For few rows with those of the kernel that a converted layer has, where the sums of ``b`` are needed. 4096 x 4096,
    one core, milliseconds of it and of oneDNN: one row 1.6 and 3.0, eight 2.2 and 3.3; 0.8, 1.5, 1.4 and 1.7 with sums.
    """
    few = _of_few_rows(a, a_scale, b, b_scale, bias, a_zero_point, b_sums, dtype)
    if few is not None:
        return few
    # PyTorch 2.13 gives wrong sums of a single product, whose strides are those of both layouts.
    if a.shape[1] < 2 or not a.numel() or not b.numel() or not sums_are_exact():
        return reference_w8a8_matmul(a, a_scale, b, b_scale, bias, a_zero_point, b_sums, dtype)
    sums = torch._int_mm(a, b.t())
    if a_zero_point is not None:
        if b_sums is None:
            b_sums = _row_sums(b)
        if b_sums is None:  # a tenth of the time of b.sum(1)
            b_sums = torch._int_mm(b, torch.ones(b.shape[1], 1, dtype=torch.int8)).view(-1)
        sums.sub_(a_zero_point.to(torch.int32).reshape(-1, 1) * b_sums)
    return _scaled(sums, a_scale, b_scale, bias, dtype)


def _of_few_rows(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    a_zero_point: Tensor | None,
    b_sums: Tensor | None,
    dtype: torch.dtype,
) -> Tensor | None:
    """Return the product by our own kernel, or None where there is none, or it is not faster."""
    if not a.numel() or not b.numel() or not b.is_contiguous() or len(a) > min(few_rows(b.numel()), FEW_ROWS):
        return None
    if a_zero_point is None and b_sums is None:  # the kernel needs sums, and finding them takes all that it gains
        return None
    if a_zero_point is not None and a_zero_point.numel() != 1:
        return None
    sums = _row_sums(b) if b_sums is None else b_sums.to(torch.int32).contiguous()
    if sums is None:
        return None
    codes = a.contiguous().view(torch.uint8) ^ SIGNED_OFFSET
    zero = SIGNED_OFFSET if a_zero_point is None else a_zero_point.to(torch.int32).reshape(1) + SIGNED_OFFSET
    if a_scale.numel() > 1:  # the kernel would scale by rows last
        exact = multiply_codes_native(codes, 1.0, zero, b, sums, torch.ones(1, device="cpu"), None)
        return None if exact is None else _scaled(exact, a_scale, b_scale, bias, dtype)
    steps = [scale.to(torch.float32).reshape(-1).contiguous() for scale in (a_scale, b_scale)]
    shift = None if bias is None else bias.to(torch.float32).contiguous()
    result = multiply_codes_native(codes, steps[0], zero, b, sums, steps[1], shift)
    return None if result is None else result.to(dtype)


def _row_sums(b: Tensor) -> Tensor | None:
    """Return the sum of each row, int32, by the product with a row of ones; None where there is no kernel."""
    if not b.is_contiguous() or b.shape[1] * 128 > 2**24:  # float32 holds every sum
        return None
    ones, one = torch.ones((1, b.shape[1]), dtype=torch.uint8, device="cpu"), torch.ones(1, device="cpu")
    none = torch.zeros(len(b), dtype=torch.int32, device="cpu")
    sums = multiply_codes_native(ones, 1.0, 0, b, none, one, None)
    return None if sums is None else sums.view(-1).to(torch.int32)


@lru_cache(maxsize=1)
def sums_are_exact() -> bool:
    """Return whether this CPU multiplies int8 fast and exactly; found once, by the products that saturate first."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":  # elsewhere it is a scalar loop
        return False
    a = torch.full((3, 70), -128, dtype=torch.int8)
    b = torch.full((5, 70), -128, dtype=torch.int8)
    a[1], b[1], b[2, ::2] = 127, 127, 3
    try:
        sums = torch._int_mm(a, b.t())
    except RuntimeError:  # a build of PyTorch without it
        return False
    return torch.equal(sums.long(), a.long() @ b.long().t())


def w8a8_matmul_cuda(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    a_zero_point: Tensor | None,
    b_sums: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """The definition on the matrix units, in one launch; float64 results and empty tensors take the definition."""
    if not a.numel() or not b.numel() or dtype == torch.float64:
        return reference_w8a8_matmul(a, a_scale, b, b_scale, bias, a_zero_point, b_sums, dtype)
    from lightning_qat.kernels.w8a8_matmul import launch_w8a8_matmul

    return launch_w8a8_matmul(a, a_scale, b, b_scale, bias, a_zero_point=a_zero_point, b_sums=b_sums, dtype=dtype)


if HAS_TRITON:
    w8a8_matmul_op.register_kernel("cuda")(w8a8_matmul_cuda)

"""Floats to integer codes as they are stored, of 4 and 8 bits, where neighbouring elements share a scale.

With 8 bits the codes themselves; with 4 the bytes of :func:`lightning_qat.ops.packing.pack_bits`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_qat.native import affine as native
from lightning_qat.ops.affine import quantize_affine
from lightning_qat.ops.fake_quantize import quant_range
from lightning_qat.ops.fake_quantize_cuda import HAS_TRITON
from lightning_qat.ops.packing import pack_bits
from lightning_qat.ops.workspace import advise_huge_pages

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def quantize_packed(
    x: Tensor, scale: Tensor, zero_point: Tensor | None = None, *, bits: int, symmetric: bool, run: int | None = None
) -> Tensor:
    """Return the codes of ``quantize_affine`` as they are stored, bit for bit. No gradient passes.

    Args:
        x: floating point, any shape and strides, taken in contiguous order.
        scale: one element for the tensor, or one for each run, in order.
        zero_point: like ``scale``, whole numbers; None is 0.
        bits: 4 or 8.
        symmetric: signed codes, see ``quantize_affine``.
        run: consecutive elements that share a scale; None is the tensor.

    Returns:
        With 8 bits int8 (symmetric) or uint8 in the shape of ``x``, contiguous; with 4 bits uint8
        ``[ceil(numel / 2)]``.

    Raises:
        ValueError: if a dtype, number or size does not fit.
    """
    if not x.is_floating_point():
        raise ValueError(f"x has dtype {x.dtype}; use a floating-point dtype")
    if bits not in (4, 8):
        raise ValueError(f"bits={bits} is not allowed; use 4 or 8")
    if symmetric and zero_point is not None:
        raise ValueError("zero_point is given with symmetric=True, whose zero point is 0; leave it out")
    size = max(x.numel(), 1) if run is None else run
    if size < 1 or scale.numel() * size != max(x.numel(), size if run is None else 0):
        raise ValueError(f"{scale.numel()} scales of runs of {size} cover no tensor of {x.numel()} elements")
    if zero_point is not None and zero_point.numel() != scale.numel():
        raise ValueError(f"zero_point has {zero_point.numel()} elements and scale {scale.numel()}; they must be equal")
    return quantize_packed_op(x, scale, zero_point, bits, symmetric, size)


def reference_quantize_packed(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, symmetric: bool, run: int
) -> Tensor:
    """The definition."""
    flat, zero = x.reshape(-1, run) if x.numel() else x.reshape(0, 1), None
    if zero_point is not None:
        zero = zero_point.reshape(-1)[: len(flat)]
    codes = quantize_affine(
        flat.contiguous(), scale.reshape(-1)[: len(flat)], zero, bits=bits, symmetric=symmetric, axis=0
    )
    return codes.view(x.shape) if bits == 8 else pack_bits(codes, 4, signed=symmetric)


@torch.library.custom_op("lightning_qat::quantize_packed", mutates_args=())
def quantize_packed_op(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, symmetric: bool, run: int
) -> Tensor:
    """The unchecked op behind :func:`quantize_packed`; see :func:`reference_quantize_packed`."""
    return reference_quantize_packed(x, scale, zero_point, bits, symmetric, run)


@quantize_packed_op.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, symmetric: bool, run: int) -> Tensor:
    if bits == 8:
        return x.new_empty(x.shape, dtype=torch.int8 if symmetric else torch.uint8)
    return x.new_empty((x.numel() + 1) // 2, dtype=torch.uint8)


@quantize_packed_op.register_kernel("cpu")
def quantize_packed_cpu(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, symmetric: bool, run: int
) -> Tensor:
    """The definition in one pass: 4 bits without a tensor of codes; 8 bits are codes already."""
    if bits == 4 and x.numel():
        packed = advise_huge_pages(torch.empty((x.numel() + 1) // 2, dtype=torch.uint8, device="cpu"))
        low, high = quant_range(bits, symmetric)
        zero = None if zero_point is None else torch.round(zero_point.detach().to(torch.float32)).contiguous()
        steps = scale.detach().to(torch.float32).contiguous()
        within = zero is None or bool(((zero >= low) & (zero <= high)).all())
        if within and native.quantize(x.detach().contiguous(), steps, zero, run, packed, low, high, nibbles=True):
            return packed
    return reference_quantize_packed(x, scale, zero_point, bits, symmetric, run)


def quantize_packed_cuda(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, symmetric: bool, run: int
) -> Tensor:
    """The definition in one launch; float64 and empty tensors take the definition itself."""
    if x.dtype not in _DTYPES or not x.numel():
        return reference_quantize_packed(x, scale, zero_point, bits, symmetric, run)
    from lightning_qat.kernels.affine import launch_quantize_pack

    return launch_quantize_pack(x, scale, zero_point, bits=bits, symmetric=symmetric, group_size=run)


if HAS_TRITON:
    quantize_packed_op.register_kernel("cuda")(quantize_packed_cuda)

"""Integer codes and back on the CPU, compiled or in small pieces; as :mod:`lightning_qat.ops.affine`, bit for bit.

For layouts in which the elements that share a scale lie next to each other, and codes of up to 8 bits.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from lightning_qat.native import affine as native
from lightning_qat.ops.chunks import CHUNK, chunks
from lightning_qat.ops.workspace import advise_huge_pages

#: Adding it to ``|v| < 2**22`` rounds ``v`` half to even and leaves it, modulo 256, in the lowest byte.
_ROUNDER = 1.5 * 2**23


def takes_pieces(*tensors: Tensor | None) -> bool:
    """Return whether these are plain tensors on a CPU that nothing traces, transforms or differentiates."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack():
        return False
    if torch._C._functorch.maybe_current_level() is not None:
        return False
    wanted = torch.is_grad_enabled()
    for t in tensors:  # a plain loop: this is asked several times for each layer of a training step
        if t is None:
            continue
        if not (type(t) is Tensor or type(t) is torch.nn.Parameter) or (wanted and t.requires_grad):
            return False
        if not t.is_cpu or t.is_neg():  # in another memory, or the values to be negated
            return False
    return True


def run_of(x: Tensor, axis: int, group: int) -> int | None:
    """Return how many neighbours share a scale; ``axis`` and ``group`` as in :mod:`lightning_qat.ops.layout`."""
    if group:
        return group
    if axis < 0:
        return x.numel()
    return prod(x.shape[1:]) if axis == 0 else None


def whole(zero: Tensor | None) -> Tensor | None:
    """Return whole numbers as the kernels read them."""
    return None if zero is None else zero.detach().contiguous()


def quantize_pieces(
    x: Tensor, scale: Tensor, zero: Tensor | None, quant_min: int, quant_max: int, run: int, dtype: torch.dtype
) -> Tensor:
    """Return the codes of ``x`` in its shape, contiguous.

    Args:
        x: floating point, not empty.
        scale: one for each run, in order.
        zero: whole numbers from ``quant_min`` to ``quant_max``, float32 shaped as ``scale``; None is 0.
        quant_min: smallest code.
        quant_max: largest code, of 8 bits at most.
        run: elements that share a scale.
        dtype: int8 or uint8.
    """
    flat = x.detach().contiguous().view(-1)
    result = advise_huge_pages(torch.empty(x.numel(), dtype=dtype, device="cpu"))
    steps = scale.detach().contiguous().view(-1, 1).to(torch.float32)
    if native.quantize(flat, steps, whole(zero), run, result, quant_min, quant_max, nibbles=False):
        return result.view(x.shape)
    low, high, shift = None, None, None
    if zero is not None:
        zero = zero.reshape(-1, 1)
        low, high, shift = quant_min - zero, quant_max - zero, zero.to(dtype)
    scratch = torch.empty(min(x.numel(), CHUNK), dtype=torch.float32, device="cpu")
    for part, runs in chunks(x.numel(), run):
        values = scratch[: part.stop - part.start].view(runs.stop - runs.start, -1)
        source = flat[part].view(values.shape)
        if source.dtype == torch.float32:
            torch.div(source, steps[runs], out=values)
        else:
            values.copy_(source).div_(steps[runs])
        if low is None or high is None:
            values.clamp_(quant_min, quant_max)
        else:
            torch.clamp(values, low[runs], high[runs], out=values)
        # Clamping before rounding is the same between integer bounds.
        codes = values.nan_to_num_(nan=0.0).add_(_ROUNDER).view(torch.int32)
        target = result[part].view(values.shape).copy_(codes)
        if shift is not None:
            target.add_(shift[runs])
    return result.view(x.shape)


def dequantize_pieces(codes: Tensor, scale: Tensor, zero: Tensor | None, run: int, dtype: torch.dtype) -> Tensor:
    """Return ``(codes - zero) * scale`` in the shape of ``codes``, contiguous.

    Args:
        codes: integers, not empty.
        scale: one for each run, in order.
        zero: whole numbers, float32 shaped as ``scale``; None is 0.
        run: elements that share a scale.
        dtype: of the result, floating point.
    """
    flat = codes.contiguous().view(-1)
    result = advise_huge_pages(torch.empty(codes.numel(), dtype=dtype, device="cpu"))
    steps = scale.contiguous().view(-1, 1).to(torch.float32)
    if native.dequantize(flat, steps, whole(zero), run, result):
        return result.view(codes.shape)
    zero = None if zero is None else zero.reshape(-1, 1)
    scratch = torch.empty(min(codes.numel(), CHUNK), dtype=torch.float32, device="cpu")
    for part, runs in chunks(codes.numel(), run):
        values = scratch[: part.stop - part.start].view(runs.stop - runs.start, -1)
        values.copy_(flat[part].view(values.shape))
        if zero is not None:
            values.sub_(zero[runs])
        target = result[part].view(values.shape)
        if dtype == torch.float32:
            torch.mul(values, steps[runs], out=target)
        else:
            target.copy_(values.mul_(steps[runs]))
    return result.view(codes.shape)

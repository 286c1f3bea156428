"""Vector-wise int8 codes with given scales; see :mod:`lightning_qat.ops.vectorwise`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_qat.native import vectorwise as native
from lightning_qat.ops.chunks import CHUNK, chunks

#: Added to float32 of up to 2**22 it rounds half to even, as ``torch.round`` does, into the lowest bits.
_ROUNDING = 1.5 * 2.0**23


def vectorwise_steps(x: Tensor, absmax: Tensor) -> Tensor:
    """Return ``half(x)`` in units of a code, float32 like ``x``; a row of zeros has none and becomes NaN.

    Args:
        x: floating point, ``[R, C]``.
        absmax: float32, ``[R]``.
    """
    return x.to(torch.float16).to(torch.float32) * (127.0 / absmax.unsqueeze(1))


def whole_codes(steps: Tensor) -> Tensor:
    """Return whole numbers as int8 within +-127, NaN as 0."""
    return torch.nan_to_num(steps, nan=0.0).clamp_(-127, 127).to(torch.int8)


def takes_op(*tensors: Tensor) -> bool:
    """Return whether these are on a GPU and nothing traces, transforms or differentiates them."""
    if not tensors[0].is_cuda or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if torch._C._functorch.maybe_current_level() is not None:
        return False
    return not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))


def columns_above_quantile(rows: Tensor, quantile: float) -> Tensor:
    """Return which columns have a largest magnitude above that of this share of all columns, bool ``[C]``.

    Args:
        rows: ``[R, C]``.
        quantile: 0 to 1; of n columns the ``ceil(quantile * n)`` smallest are none. 0 and 1 are no columns at all.
    """
    if not 0 < quantile < 1 or not rows.numel():
        return torch.zeros(rows.shape[1], dtype=torch.bool, device=rows.device)
    largest = column_absmax_op(rows) if takes_op(rows) else reference_column_absmax(rows)
    place = max(math.ceil(quantile * largest.numel()), 1)  # torch.quantile ends at 16 million
    # On a GPU kthvalue is refused where algorithms have to be deterministic, for indices that nobody takes here.
    bound = largest.sort().values[place - 1] if largest.is_cuda else largest.kthvalue(place).values
    return largest > bound


def reference_column_absmax(rows: Tensor) -> Tensor:
    """Return the largest magnitude of every column, float32 ``[C]``; NaN if it holds one."""
    return torch.maximum(rows.amax(0), -rows.amin(0)).to(torch.float32)


def reference_codes(x: Tensor, absmax: Tensor) -> Tensor:
    """Return the int8 codes of a matrix whose rows have the scales ``absmax``."""
    return whole_codes(torch.round(vectorwise_steps(x, absmax)))


# Ops, so that compiled graphs keep the rounding to float16, which they drop between float32 values.
@torch.library.custom_op("lightning_qat::vectorwise_codes", mutates_args=())
def vectorwise_codes_op(x: Tensor, absmax: Tensor) -> Tensor:
    """The unchecked codes of given scales; see :func:`reference_codes`."""
    return reference_codes(x, absmax)


@vectorwise_codes_op.register_kernel("cpu")
def vectorwise_codes_cpu(x: Tensor, absmax: Tensor) -> Tensor:
    """The definition in one pass, or in small pieces."""
    codes = torch.empty(x.shape, dtype=torch.int8, device="cpu")
    if not x.numel() or native.codes_of(x.contiguous(), absmax.contiguous(), codes):
        return codes
    flat, result, factors = x.reshape(-1), codes.view(-1), (127.0 / absmax).unsqueeze(1)
    scratch, halves = (
        torch.empty(min(x.numel(), CHUNK), dtype=torch.float32),
        torch.empty(min(x.numel(), CHUNK), dtype=torch.float16),
    )
    for part, rows in chunks(x.numel(), x.shape[1]):
        size = part.stop - part.start
        values = scratch[:size].copy_(halves[:size].copy_(flat[part])).view(rows.stop - rows.start, -1)
        # What is beyond the codes, or no number, is whole afterwards: the rounding below takes up to 2**22.
        values.mul_(factors[rows]).nan_to_num_(nan=0.0).clamp_(-127, 127).add_(_ROUNDING)
        result[part].view(values.shape).copy_(values.view(torch.int32))
    return codes


@torch.library.custom_op("lightning_qat::column_absmax", mutates_args=())
def column_absmax_op(rows: Tensor) -> Tensor:
    """The magnitudes behind :func:`columns_above_quantile` on a GPU; see :func:`reference_column_absmax`."""
    return reference_column_absmax(rows)


@column_absmax_op.register_fake
def _(rows: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[1], dtype=torch.float32)


@torch.library.custom_op("lightning_qat::round_to_half", mutates_args=())
def round_to_half(x: Tensor) -> Tensor:
    """Return ``x`` as float32 with the precision and the range of float16."""
    return x.to(torch.float16).to(torch.float32)


@round_to_half.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=torch.float32)


@vectorwise_codes_op.register_fake
def _(x: Tensor, absmax: Tensor) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.int8)

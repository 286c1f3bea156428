"""Vector-wise int8: a scale for each row, in the precision and rounding of LLM.int8(), outlier columns apart.

``code = round(half(x) * (127 / absmax))`` and ``value = code * absmax * float32(1 / 127)``, as bitsandbytes 0.50.2
computes them on a CPU. The functions called ``reference_*`` are the definition; the ops equal them bit for bit.

Source: Dettmers et al. 2022, LLM.int8(). bitsandbytes takes weights and inputs in float16 and so does this: a magnitude
above 65504 is infinite there, and its row gets codes of 0 and an infinite absmax.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_qat.native import affine as native_affine
from lightning_qat.native import vectorwise as native
from lightning_qat.ops.affine_cpu import dequantize_pieces, takes_pieces
from lightning_qat.ops.chunks import CHUNK
from lightning_qat.ops.layout import match_layout
from lightning_qat.ops.transformed import as_it_comes, is_transformed, straight_through
from lightning_qat.ops.vectorwise_codes import takes_op
from lightning_qat.ops.workspace import advise_huge_pages

#: bitsandbytes multiplies by this instead of dividing by 127.
PER_CODE = 7.874015718698502e-3
#: Added and subtracted again, it rounds float32 of up to 2**22 half to even, as ``torch.round`` does. That op
#: waits for all threads even where a piece is small: 750 ms for 16M elements beside a busy process.
_ROUNDING = 1.5 * 2.0**23


def quantize_vectorwise(x: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return codes, the scale of each row and the columns that hold outliers.

    Args:
        x: floating point ``[R, C]``; rounded to float16 first.
        threshold: magnitudes of at least this are outliers, in the units of ``x``. They do not count for the absmax,
            and all codes of their columns are 0. 0.0 is no outliers.

    Returns:
        Codes, int8 ``[R, C]``; absmax, float32 ``[R]``; and, with a threshold, the outlier columns, int64, ascending.

    Raises:
        ValueError: if ``x`` is not a floating-point matrix or ``threshold`` is negative.
    """
    if x.dim() != 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; use a matrix, such as x.reshape(-1, x.shape[-1])")
    _check(x, threshold)
    codes, absmax, is_outlier = vectorwise_quantize_op(x, threshold)
    return codes, absmax, is_outlier.nonzero().view(-1) if threshold > 0 else None


def dequantize_vectorwise(codes: Tensor, row_absmax: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return ``codes * row_absmax / 127``, computed in float32 and then cast.

    Args:
        codes: int8 ``[R, C]``.
        row_absmax: float32 with R elements.
        dtype: of the result, floating point.

    Raises:
        ValueError: if a dtype, shape or device does not fit.
    """
    if codes.dtype != torch.int8 or codes.dim() != 2:
        raise ValueError(f"codes are {codes.dtype} of shape {tuple(codes.shape)}; use a matrix of torch.int8")
    if row_absmax.dtype != torch.float32 or row_absmax.numel() != len(codes):
        raise ValueError(
            f"row_absmax is {row_absmax.dtype} with {row_absmax.numel()} elements; "
            f"codes of shape {tuple(codes.shape)} take torch.float32 with {len(codes)}"
        )
    if not dtype.is_floating_point:
        raise ValueError(f"dtype={dtype} is not allowed; use a floating-point dtype")
    _check_device("row_absmax", row_absmax, codes)
    return _values(codes, row_absmax, dtype)


def fake_quantize_vectorwise(x: Tensor, threshold: float = 0.0) -> Tensor:
    """Return ``x`` quantized token by token and dequantized; outlier columns stay as they are.

    The gradient passes unchanged everywhere: no element is beyond its row's scale. NaN stays NaN. Keeps nothing for
    the backward pass.

    Args:
        x: floating point ``[..., C]``; every index of the dimensions but the last is a token.
        threshold: see :func:`quantize_vectorwise`; a column is an outlier if any token has one there.

    Returns:
        A new tensor with the shape, dtype and strides of ``x``.

    Raises:
        ValueError: if ``x`` has no dimension or is not floating point, or ``threshold`` is negative.
    """
    if x.dim() == 0:
        raise ValueError("x has no dimension; vector-wise quantization needs one of features")
    _check(x, threshold)
    if is_transformed():
        return straight_through(x, lambda x: vectorwise_fake_quantize_op(x, threshold), as_it_comes)
    return vectorwise_fake_quantize_op(x, threshold)


def fake_quantize_beside(x: Tensor, kept: Tensor) -> Tensor:
    """Return :func:`fake_quantize_vectorwise` of all columns but some, which stay and count for no absmax.

    Args:
        x: floating point ``[..., C]``; every index of the dimensions but the last is a token.
        kept: which columns stay as they are, bool ``[C]``.

    Returns:
        A new tensor with the shape, dtype and strides of ``x``, whose gradient passes unchanged.

    Raises:
        ValueError: if ``x`` has no dimension or is not floating point, or ``kept`` does not fit it.
    """
    if x.dim() == 0 or kept.dtype != torch.bool or kept.shape != x.shape[-1:]:
        raise ValueError(
            f"kept is {kept.dtype} of shape {tuple(kept.shape)} for x of shape {tuple(x.shape)}; "
            "use torch.bool with one element for each index of the last dimension"
        )
    _check_device("kept", kept, x)
    _check(x, 0.0)
    if is_transformed():
        return straight_through(x, vectorwise_fake_quantize_beside_op, as_it_comes, kept)
    return vectorwise_fake_quantize_beside_op(x, kept)


def _check(x: Tensor, threshold: float) -> None:
    if not x.is_floating_point():
        raise ValueError(f"x has dtype {x.dtype}; use a floating-point dtype")
    if not threshold >= 0.0:
        raise ValueError(f"threshold={threshold!r} is not allowed; use 0.0 (no outliers) or a magnitude")


def _check_device(name: str, given: Tensor, beside: Tensor) -> None:
    """Raise ``ValueError`` for what a kernel would read at an address of another device."""
    if given.device != beside.device:
        raise ValueError(f"{name} is on {given.device} and the tensor on {beside.device}; move it to {beside.device}")


# --- the definition -------------------------------------------------------------------------------


def _factors(absmax: Tensor) -> Tensor:
    """Return codes to a unit, ``[R, 1]``: infinite for a row of zeros, which thus becomes NaN and then 0."""
    return 127.0 / absmax.unsqueeze(1)


def reference_dequantize(codes: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the values of a matrix of codes."""
    return (codes * absmax.view(-1, 1) * PER_CODE).to(dtype)


def _values(codes: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    if takes_op(codes, absmax):
        return vectorwise_dequantize_op(codes, absmax, dtype)
    if not codes.numel() or not takes_pieces(codes, absmax):
        return reference_dequantize(codes, absmax, dtype)
    found = advise_huge_pages(torch.empty(codes.shape, dtype=dtype, device="cpu"))
    if native_affine.dequantize(codes.contiguous(), absmax.contiguous(), None, codes.shape[1], found, PER_CODE):
        return found
    values = dequantize_pieces(codes, absmax, None, codes.shape[1], torch.float32)
    for piece in values.view(-1).split(CHUNK):
        piece.mul_(PER_CODE)
    return values.to(dtype)


def reference_quantize(x: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the codes of a matrix, the absmax of its rows and which columns are outliers (bool ``[C]``)."""
    halves = x.to(torch.float16)
    # A float16 tensor is compared with the threshold in float16, so this is rounded too, as in bitsandbytes.
    outliers = halves.abs() >= threshold if threshold > 0 else torch.zeros_like(halves, dtype=torch.bool)
    kept = halves.masked_fill(outliers, 0.0).to(torch.float32)
    absmax = kept.abs().amax(1) if x.shape[1] else kept.new_zeros(len(kept))
    is_outlier = outliers.any(0)
    codes = torch.round(kept * _factors(absmax)).nan_to_num(nan=0.0).masked_fill(is_outlier, 0.0)
    return codes.to(torch.int8), absmax, is_outlier


def reference_fake_quantize(x: Tensor, threshold: float) -> Tensor:
    """Return the fake-quantized ``x``."""
    if x.numel() == 0:
        return torch.empty_like(x)
    codes, absmax, is_outlier = reference_quantize(x.reshape(-1, x.shape[-1]), threshold)
    values = reference_dequantize(codes, absmax, x.dtype).view(x.shape)
    return match_layout(torch.where(is_outlier | x.isnan(), x, values), x)


def reference_fake_quantize_beside(x: Tensor, kept: Tensor) -> Tensor:
    """Return ``x`` fake-quantized but for the columns ``kept`` (bool ``[C]``)."""
    return torch.where(kept, x, reference_fake_quantize(x.masked_fill(kept, 0.0), 0.0))


# --- the ops --------------------------------------------------------------------------------------


@torch.library.custom_op("lightning_qat::vectorwise_quantize", mutates_args=())
def vectorwise_quantize_op(x: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """The unchecked op behind :func:`quantize_vectorwise`; see :func:`reference_quantize`."""
    return reference_quantize(x, threshold)


@torch.library.custom_op("lightning_qat::vectorwise_fake_quantize", mutates_args=())
def vectorwise_fake_quantize_op(x: Tensor, threshold: float) -> Tensor:
    """The unchecked op behind :func:`fake_quantize_vectorwise`; see :func:`reference_fake_quantize`."""
    return reference_fake_quantize(x, threshold)


@torch.library.custom_op("lightning_qat::vectorwise_fake_quantize_beside", mutates_args=())
def vectorwise_fake_quantize_beside_op(x: Tensor, kept: Tensor) -> Tensor:
    """The unchecked op behind :func:`fake_quantize_beside`; see :func:`reference_fake_quantize_beside`."""
    return match_layout(reference_fake_quantize_beside(x, kept), x)


@torch.library.custom_op("lightning_qat::vectorwise_dequantize", mutates_args=())
def vectorwise_dequantize_op(codes: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    """The unchecked op behind :func:`dequantize_vectorwise` on a GPU; see :func:`reference_dequantize`."""
    return reference_dequantize(codes, absmax, dtype)


@vectorwise_quantize_op.register_fake
def _(x: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = x.shape
    return (
        x.new_empty((rows, columns), dtype=torch.int8),
        x.new_empty(rows, dtype=torch.float32),
        x.new_empty(columns, dtype=torch.bool),
    )


@vectorwise_dequantize_op.register_fake
def _(codes: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(codes.shape, dtype=dtype)


@vectorwise_fake_quantize_op.register_fake
def _(x: Tensor, threshold: float) -> Tensor:
    return torch.empty_like(x)


@vectorwise_fake_quantize_beside_op.register_fake
def _(x: Tensor, kept: Tensor) -> Tensor:
    return torch.empty_like(x)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return grad, None


vectorwise_fake_quantize_op.register_autograd(_backward)
vectorwise_fake_quantize_beside_op.register_autograd(_backward)


# --- the kernel of the CPU ------------------------------------------------------------------------


@vectorwise_quantize_op.register_kernel("cpu")
def vectorwise_quantize_cpu(x: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """The definition row by row, or in pieces that stay in a core's cache."""
    rows, columns = x.shape
    codes = advise_huge_pages(torch.empty(rows, columns, dtype=torch.int8, device="cpu"))
    absmax = torch.zeros(rows, dtype=torch.float32, device="cpu")
    is_outlier = torch.zeros(columns, dtype=torch.bool, device="cpu")
    if x.numel() == 0:
        return codes, absmax, is_outlier
    limit = torch.tensor(threshold, dtype=torch.float16, device="cpu").item()
    if native.quantize(x.contiguous(), codes, absmax, is_outlier, limit if threshold > 0 else None):
        return _without(codes, is_outlier) if threshold > 0 else codes, absmax, is_outlier
    step = max(1, CHUNK // columns)
    memory = torch.empty(2, min(step, rows), columns, dtype=torch.float32, device="cpu")
    halves = torch.empty(0 if x.dtype == torch.float16 else len(memory[0]), columns, dtype=torch.float16, device="cpu")
    for start in range(0, rows, step):
        part = slice(start, min(rows, start + step))
        values, magnitudes = (m[: part.stop - start] for m in memory)
        values.copy_(x[part] if x.dtype == torch.float16 else halves[: len(values)].copy_(x[part]))
        largest = torch.amax(torch.abs(values, out=magnitudes), dim=1, out=absmax[part])
        # Not `largest >= limit`: beside a NaN there may be an outlier.
        if threshold > 0 and not bool((largest < limit).all()):
            outliers = magnitudes >= limit
            is_outlier |= outliers.any(0)
            values.masked_fill_(outliers, 0.0)
            torch.amax(torch.abs(values, out=magnitudes), dim=1, out=absmax[part])
        values.mul_(_factors(absmax[part])).add_(_ROUNDING).sub_(_ROUNDING)
        codes[part].copy_(values.nan_to_num_(nan=0.0))
    return _without(codes, is_outlier) if threshold > 0 else codes, absmax, is_outlier


def _without(codes: Tensor, is_outlier: Tensor) -> Tensor:
    return codes.index_fill_(1, is_outlier.nonzero().view(-1), 0)


@vectorwise_fake_quantize_op.register_kernel("cpu")
def vectorwise_fake_quantize_cpu(x: Tensor, threshold: float) -> Tensor:
    """The definition in pieces, by way of the codes."""
    if x.numel() == 0:
        return torch.empty_like(x)
    rows = x.reshape(-1, x.shape[-1])
    codes, absmax, is_outlier = vectorwise_quantize_cpu(rows, threshold)
    result = advise_huge_pages(torch.empty(rows.shape, dtype=x.dtype, device="cpu"))
    if native_affine.dequantize(codes, absmax, None, rows.shape[1], result, PER_CODE):
        return match_layout(_kept(rows, absmax, is_outlier, result).view(x.shape), x)
    step = max(1, CHUNK // rows.shape[1])
    memory = torch.empty(min(step, len(rows)), rows.shape[1], dtype=torch.float32, device="cpu")
    for start in range(0, len(rows), step):
        part = slice(start, min(len(rows), start + step))
        values = memory[: part.stop - start].copy_(codes[part])
        values.mul_(absmax[part].unsqueeze(1)).mul_(PER_CODE)
        result[part].copy_(values)
    return match_layout(_kept(rows, absmax, is_outlier, result).view(x.shape), x)


@vectorwise_fake_quantize_beside_op.register_kernel("cpu")
def vectorwise_fake_quantize_beside_cpu(x: Tensor, kept: Tensor) -> Tensor:
    """The definition by way of the kernel above."""
    return match_layout(torch.where(kept, x, vectorwise_fake_quantize_cpu(x.masked_fill(kept, 0.0), 0.0)), x)


def _kept(rows: Tensor, absmax: Tensor, is_outlier: Tensor, result: Tensor) -> Tensor:
    """Return ``result`` with what ``rows`` has where there is no code: NaN and outlier columns."""
    # A row with a NaN that is no outlier has an absmax of NaN.
    bad, kept = absmax.isnan().nonzero().view(-1), is_outlier.nonzero().view(-1)
    if len(bad):
        result[bad] = torch.where(rows[bad].isnan(), rows[bad], result[bad])
    if len(kept):
        result[:, kept] = rows[:, kept]
    return result


# The kernels of CUDA register themselves; they need what is defined above.
from lightning_qat.ops import vectorwise_cuda as _cuda  # noqa: E402, F401

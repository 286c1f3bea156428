"""Integer codes and back: choosing scale and zero point, quantizing, dequantizing.

Pure functions of tensors that trace under ``torch.compile`` and run on any device. The grid and the
arithmetic are those of :func:`lightning_qat.ops.fake_quantize.fake_quantize`:
``dequantize_affine(quantize_affine(x, ...), ...)`` equals it exactly, for every granularity and dtype.
"""

from __future__ import annotations

import math
import struct

import torch
from torch import Tensor

from lightning_qat.ops.affine_cpu import dequantize_pieces, quantize_pieces, run_of, takes_pieces
from lightning_qat.ops.fake_quantize import absmax_divisor, quant_range, resolve_grid, round_to_codes
from lightning_qat.ops.layout import match_layout, resolve_layout, view_parameter, view_runs

_FLOAT32 = torch.finfo(torch.float32)
_SINGLE = struct.Struct("f")


def choose_scale_zero_point(low: Tensor, high: Tensor, *, bits: int, symmetric: bool) -> tuple[Tensor, Tensor | None]:
    """Return the scale and zero point of the grid that covers ``low`` to ``high``.

    The range is widened to contain 0.0, which thus always has a code of its own. Symmetric grids cover
    ``+-max(-low, high)``: 8 bits and more with scale ``absmax / (2**(bits-1) - 1)``, fewer with
    ``absmax / (2**(bits-1) - 0.5)`` (as compressed-tensors). A range of zero width gives scale 1.0;
    one reaching infinity is cut at the largest float32.

    Args:
        low: smallest values, any shape and dtype, in the units of the values.
        high: largest values, shaped as ``low``.
        bits: 2 to 16.
        symmetric: codes around zero.

    Returns:
        The scale, float32 shaped as ``low``, at least the smallest normal float32; and the zero point,
        int32 of the same shape in ``0 .. 2**bits - 1``, or None if symmetric.

    Raises:
        ValueError: if the shapes differ or ``bits`` is out of range.
    """
    if low.shape != high.shape:
        raise ValueError(f"low has shape {tuple(low.shape)} and high {tuple(high.shape)}; they must be equal")
    quant_min, quant_max = quant_range(bits, symmetric)
    if low.numel() == 1 and takes_pieces(low, high):
        one = _of_one_range(float(low), float(high), bits, symmetric)
        if one is not None:
            scale = torch.full(low.shape, one[0], dtype=torch.float32, device="cpu")  # whatever the default device is
            zero_point = None if symmetric else torch.full(low.shape, one[1], dtype=torch.int32, device="cpu")
            return scale, zero_point
    if symmetric:
        return scale_of_absmax(torch.maximum(-low.to(torch.float32), high.to(torch.float32)), bits), None
    low = low.to(torch.float32).clamp(_FLOAT32.min, 0.0)
    high = high.to(torch.float32).clamp(0.0, _FLOAT32.max)
    # high - low may overflow; their quotients do not.
    scale = _divide(high, quant_max) - _divide(low, quant_max)
    scale = torch.where(high == low, 1.0, scale.clamp_min(_FLOAT32.tiny))
    zero_point = torch.round(-low / scale).clamp(quant_min, quant_max)
    # NaN has no integer: what it becomes differs between devices.
    return scale, torch.nan_to_num(zero_point, nan=0.0).to(torch.int32)


def _of_one_range(low: float, high: float, bits: int, symmetric: bool) -> tuple[float, int] | None:
    """Return scale and zero point of one range, by Python's numbers: single ones cost a tensor operation its call.

    None where the range is not finite.

    A float64 result of two float32 numbers, rounded to float32, is the float32 result: it has more than twice the bits.
    """
    if not (math.isfinite(low) and math.isfinite(high)):
        return None
    low, high = (max(min(bound, _FLOAT32.max), _FLOAT32.min) for bound in (low, high))  # float64 given
    low, high = _single(low), _single(high)
    quant_max = quant_range(bits, symmetric)[1]
    if symmetric:
        absmax = max(-low, high, 0.0)
        scale = _single(absmax / absmax_divisor(bits))
        return (max(scale, _FLOAT32.tiny) if absmax else 1.0), 0
    low, high = min(low, 0.0), max(high, 0.0)
    scale = _single(_single(high / quant_max) - _single(low / quant_max))
    scale = 1.0 if high == low else max(scale, _FLOAT32.tiny)
    return scale, min(round(_single(-low / scale)), quant_max)


def _single(value: float) -> float:
    """Return ``value`` as float32 rounds it."""
    single: float = _SINGLE.unpack(_SINGLE.pack(value))[0]
    return single


def scale_of_absmax(absmax: Tensor, bits: int) -> Tensor:
    """Return the scale of :func:`choose_scale_zero_point` for symmetric ranges.

    Each operation of this is a launch on a GPU, for numbers that are few.

    Args:
        absmax: the largest magnitudes, float32; a negative one is taken for 0.
        bits: 2 to 16.
    """
    absmax = absmax.clamp(0.0, _FLOAT32.max)
    scale = _divide(absmax, absmax_divisor(bits))
    return torch.where(absmax == 0, 1.0, scale.clamp_min(_FLOAT32.tiny))


def finite_scale(scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype, *, bits: int, symmetric: bool) -> Tensor:
    """Return ``scale``, cut where an end code would stand for infinity in ``dtype``.

    The end of a symmetric grid that has one code more lies beyond the range, and rounding may put either there.
    """
    quant_min, quant_max = quant_range(bits, symmetric)
    zero = torch.zeros_like(scale) if zero_point is None else zero_point.reshape(scale.shape)
    zero = zero.to(torch.float64)
    farthest = torch.maximum(zero - quant_min, quant_max - zero)
    largest = min(torch.finfo(dtype).max, _FLOAT32.max) / farthest
    most = largest.to(torch.float32)
    most = torch.where(most.to(torch.float64) > largest, torch.nextafter(most, torch.zeros_like(most)), most)
    return torch.minimum(scale, most)  # a NaN stays one


def _divide(values: Tensor, divisor: float) -> Tensor:
    # Not by the Python number: on a GPU, PyTorch would multiply by its reciprocal, giving other scales than a CPU.
    return values / torch.full_like(values, divisor)


def quantize_affine(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    bits: int,
    symmetric: bool,
    axis: int | None = None,
    group_size: int | None = None,
) -> Tensor:
    """Return the integer codes of ``x``; arguments and errors as in ``fake_quantize``.

    NaN has no code: it becomes that of 0.0.

    Returns:
        Codes with the shape and strides of ``x``, in the dtype of :func:`codes_dtype`.
    """
    if not x.is_floating_point():
        raise ValueError(f"x has dtype {x.dtype}; use a floating-point dtype")
    quant_min, quant_max = resolve_grid(zero_point, bits, symmetric)
    op_axis, group = resolve_layout(x, scale, zero_point, axis, group_size)
    dtype = codes_dtype(bits, symmetric)
    if x.numel() == 0:
        return torch.empty_like(x, dtype=dtype)
    fast = _quantize_on_cpu(x, scale, zero_point, quant_min, quant_max, op_axis, group, dtype)
    if fast is not None:
        return match_layout(fast, x)
    values = view_runs(x, group).to(torch.float32)
    step = view_parameter(scale, x.dim(), op_axis, group)
    zero = torch.zeros_like(step) if zero_point is None else view_parameter(zero_point, x.dim(), op_axis, group)
    zero = torch.round(zero)
    codes = round_to_codes(values, step, zero, quant_min, quant_max)
    codes = torch.where(codes.isnan(), zero.clamp(quant_min, quant_max), codes)
    return match_layout(codes.to(dtype).reshape(x.shape), x)


def _quantize_on_cpu(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
    axis: int,
    group: int,
    dtype: torch.dtype,
) -> Tensor | None:
    """Return the codes, contiguous, or None where they are not found in pieces."""
    if quant_max - quant_min > 255 or not takes_pieces(x.detach(), scale.detach()):
        return None
    run, zero = run_of(x, axis, group), None
    if zero_point is not None:
        zero = torch.round(zero_point.detach().to(torch.float32))
        if not bool(((zero >= quant_min) & (zero <= quant_max)).all()):
            return None
    return None if run is None else quantize_pieces(x, scale, zero, quant_min, quant_max, run, dtype)


def dequantize_affine(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    axis: int | None = None,
    group_size: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return ``(codes - round(zero_point)) * scale``, computed in float32.

    Args:
        codes: integers up to 16 bits, any shape and strides.
        scale: see ``fake_quantize``.
        zero_point: shaped as ``scale``; None is 0.
        axis: see ``fake_quantize``.
        group_size: see ``fake_quantize``.
        dtype: of the result, floating point.

    Returns:
        Values with the shape and strides of ``codes``.

    Raises:
        TypeError: if ``scale`` or ``zero_point`` is no tensor.
        ValueError: if a dtype, shape, device or number does not fit, naming what is allowed.
    """
    if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
        raise ValueError(f"codes have dtype {codes.dtype}; use an integer dtype")
    if not dtype.is_floating_point:
        raise ValueError(f"dtype={dtype} is not allowed; use a floating-point dtype")
    op_axis, group = resolve_layout(codes, scale, zero_point, axis, group_size)
    if codes.numel() == 0:
        return torch.empty_like(codes, dtype=dtype)
    run = run_of(codes, op_axis, group) if takes_pieces(codes, scale, zero_point) else None
    if run is not None:
        zero = None if zero_point is None else torch.round(zero_point.to(torch.float32))
        return match_layout(dequantize_pieces(codes, scale, zero, run, dtype), codes)
    values = view_runs(codes, group).to(torch.float32)
    if zero_point is not None:
        values = values - torch.round(view_parameter(zero_point, codes.dim(), op_axis, group))
    values = values * view_parameter(scale, codes.dim(), op_axis, group)
    return match_layout(values.to(dtype).reshape(codes.shape), codes)


def codes_dtype(bits: int, signed: bool) -> torch.dtype:
    """Return the dtype of unpacked codes: int8 or uint8 up to 8 bits, int16 or int32 up to 16.

    Raises:
        ValueError: if ``bits`` is not an integer from 2 to 16.
    """
    quant_range(bits, signed)
    if bits <= 8:
        return torch.int8 if signed else torch.uint8
    return torch.int16 if signed else torch.int32

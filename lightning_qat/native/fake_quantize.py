"""Fake quantization, its gradients and extremes of CPU tensors; each function is told by its result if it did nothing.

Tensors are dense and lie as ``[outer, C, inner]``, as :mod:`lightning_qat.ops.layout` describes it: element ``i`` in
memory has the scale of channel ``i // inner % C``. Scales are contiguous float32, zero points float32 or int32.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_qat.native.library import FloatFamily, threads_for

_GRID = "ppiff"
_FAMILY = FloatFamily(
    "fake_quantize",
    {
        "quantize": f"ppqqq{_GRID}i",
        "input_gradient": f"pppqqq{_GRID}i",
        "learn": f"ppppqqq{_GRID}pfpi",
        "observe": f"ppq{_GRID}pi",
        "quantize_input": f"pppq{_GRID}ppqpi",
        "values_of_codes": f"ppq{_GRID}i",
        "quantize_by_absmax": "ppqqpfffi",
        "row_extremes": "pqqppi",
    },
    {"scales_of_exponents": "pqffpp"},
)

_ZERO_KINDS = {torch.float32: 1, torch.int32: 2}
#: Elements of a sum's pieces where there is one scale, as in the source.
_PIECE = 16_384
#: Of how many elements one may lie outside for their positions to be listed, and how many are listed in any case.
_LISTED, _LEAST_LISTED = 256, 64

#: outer, channels, inner.
Layout = tuple[int, int, int]


def _find(name: str, x: Tensor) -> Any:
    return _FAMILY.of(name, x.dtype)


def _parameters(scale: Tensor, zero_point: Tensor | None) -> tuple[int, int, int] | None:
    """Return the addresses of scale and zero point and the kind of the latter, None where they are read otherwise."""
    if scale.dtype is not torch.float32 or not scale.is_contiguous():
        return None
    if zero_point is None:
        return scale.data_ptr(), 0, 0
    kind = _ZERO_KINDS.get(zero_point.dtype)
    if kind is None or not zero_point.is_contiguous():
        return None
    return scale.data_ptr(), zero_point.data_ptr(), kind


def has_kernels(x: Tensor) -> bool:
    """Return whether there are kernels for the dtype of ``x``, a CPU tensor."""
    return _find("quantize", x) is not None


def quantize(
    x: Tensor, out: Tensor, layout: Layout, scale: Tensor, zero_point: Tensor | None, quant_min: int, quant_max: int
) -> bool:
    """Write the fake-quantized ``x`` into ``out``, which lies as ``x`` does; return whether it was done."""
    function, grid = _find("quantize", x), _parameters(scale, zero_point)
    if function is None or grid is None:
        return False
    function(x.data_ptr(), out.data_ptr(), *layout, *grid, quant_min, quant_max, threads_for(x.numel()))
    return True


def input_gradient(
    grad: Tensor,
    x: Tensor,
    out: Tensor,
    layout: Layout,
    scale: Tensor,
    zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
) -> bool:
    """Write ``grad`` where ``x`` has a code of its own, else 0, into ``out``; the three lie alike, in one dtype."""
    function, grid = _find("input_gradient", x), _parameters(scale, zero_point)
    if function is None or grid is None:
        return False
    addresses = grad.data_ptr(), x.data_ptr(), out.data_ptr()
    function(*addresses, *layout, *grid, quant_min, quant_max, threads_for(x.numel()))
    return True


def learned_sums(
    grad: Tensor,
    x: Tensor,
    out: Tensor | None,
    layout: Layout,
    scale: Tensor,
    zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
    *,
    values: Tensor | None = None,
    factor: float = 0.0,
    exponents: Tensor | None = None,
) -> Tensor | None:
    """Return the gradients of each scale and zero point, float64 ``[C, 2]``; None where there is no kernel.

    Args:
        grad: lies as ``x`` and has its dtype.
        x: the values.
        out: gets the gradient of ``x``, may be ``grad``; None where nobody wants it.
        layout: of all three.
        scale: ``C`` of them.
        zero_point: likewise, or None.
        quant_min: smallest code.
        quant_max: largest code.
        values: gets the fake-quantized ``x``; lies as it does.
        factor: of the gradients of exponents.
        exponents: gets what ``scale_gradients.exponent_gradient`` makes of the first column, float32; of one outer.
    """
    function, grid = _find("learn", x), _parameters(scale, zero_point)
    outer, channels, inner = layout
    if function is None or grid is None or (exponents is not None and outer != 1):
        return None
    pieces = outer * channels if outer * channels > 1 else -(-inner // _PIECE)
    sums = torch.empty(pieces, 2, dtype=torch.float64, device="cpu")
    addresses = grad.data_ptr(), x.data_ptr(), *(0 if t is None else t.data_ptr() for t in (out, values))
    places = sums.data_ptr(), factor, 0 if exponents is None else exponents.data_ptr()
    function(*addresses, *layout, *grid, quant_min, quant_max, *places, threads_for(x.numel()))
    if outer * channels == 1:
        return sums[:1]
    return sums if outer == 1 else sums.view(outer, channels, 2).sum(0)


def learned_sums_of_one(
    grad: Tensor,
    x: Tensor,
    out: Tensor | None,
    scale: Tensor,
    zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
    *,
    values: Tensor | None = None,
) -> tuple[float, float] | None:
    """Return the two numbers of :func:`learned_sums` for a tensor with one scale, without the call of an operation."""
    function, grid, count = _find("learn", x), _parameters(scale, zero_point), x.numel()
    if function is None or grid is None:
        return None
    sums = (ctypes.c_double * (2 * max(-(-count // _PIECE), 1)))()
    addresses = grad.data_ptr(), x.data_ptr(), *(0 if t is None else t.data_ptr() for t in (out, values))
    places = ctypes.addressof(sums), 0.0, 0
    function(*addresses, 1, 1, count, *grid, quant_min, quant_max, *places, threads_for(count))
    return sums[0], sums[1]


def scales_of_exponents(
    exponents: Tensor, shape: tuple[int, ...], least: float, most: float
) -> tuple[Tensor, bool] | None:
    """Return what ``exponents.scale_of`` does, in ``shape``, and whether all are within; None without kernel.

    Args:
        exponents: contiguous float32.
        shape: of the result.
        least: smallest exponent of a scale.
        most: largest.
    """
    functions = _FAMILY.functions()
    if functions is None or not exponents.is_contiguous() or exponents.dtype is not torch.float32:
        return None
    found = torch.empty(shape, dtype=torch.float32, device="cpu")
    wrong = ctypes.c_int32()
    places = found.data_ptr(), ctypes.addressof(wrong)
    functions.scales_of_exponents(exponents.data_ptr(), exponents.numel(), least, most, *places)
    return found, not wrong.value


def observe(
    x: Tensor,
    out: Tensor | None = None,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    quant_min: int = 0,
    quant_max: int = 0,
) -> tuple[float, float] | None:
    """Return the smallest and the largest of ``x``, NaN where there is one; None where there is no kernel.

    Args:
        x: dense, not empty.
        out: lies as ``x``; gets ``x`` fake-quantized by one ``scale``.
        scale: positive, one element; with ``out``.
        zero_point: likewise, or None.
        quant_min: smallest code.
        quant_max: largest code.
    """
    function = _find("observe", x)
    grid = (0, 0, 0) if scale is None else _parameters(scale, zero_point)
    if function is None or grid is None:
        return None
    threads = threads_for(x.numel())
    bounds = (ctypes.c_float * (2 * threads))()
    target = 0 if out is None else out.data_ptr()
    function(x.data_ptr(), target, x.numel(), *grid, quant_min, quant_max, ctypes.addressof(bounds), threads)
    return bounds[0], bounds[1]


class Seen(NamedTuple):
    """What the pass over an input finds besides its values.

    Attributes:
        low, high: the extremes, NaN where there is one.
        outside: int64 positions of elements that have no code of their own, which get no gradient; None is too many.
    """

    low: float
    high: float
    outside: Tensor | None


def quantize_input(
    x: Tensor,
    out: Tensor | None,
    scale: Tensor,
    zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
    codes: Tensor | None = None,
    *,
    lists: bool = True,
) -> Seen | None:
    """Write ``x`` fake-quantized with one scale into ``out``; return what was seen, None where there is no kernel.

    Args:
        x: dense, not empty.
        out: lies as ``x``; None where the codes are all that is asked for.
        scale: positive, one element.
        zero_point: likewise, or None.
        quant_min: smallest code.
        quant_max: largest code.
        codes: uint8, lies as ``x``; gets the codes, counted from ``quant_min``. Those of NaN mean nothing.
        lists: whether positions outside are asked for.
    """
    function, grid = _find("quantize_input", x), _parameters(scale, zero_point)
    if function is None or grid is None:
        return None
    count = x.numel()
    threads = threads_for(count)
    capacity = min(count, max(_LEAST_LISTED, count // _LISTED)) if lists else 0
    bounds, counts = (ctypes.c_float * (2 * threads))(), (ctypes.c_int64 * threads)()
    positions = torch.empty(threads * capacity, dtype=torch.int64, device="cpu")
    places = ctypes.addressof(bounds), positions.data_ptr(), capacity, ctypes.addressof(counts)
    targets = 0 if out is None else out.data_ptr(), 0 if codes is None else codes.data_ptr()
    function(x.data_ptr(), *targets, count, *grid, quant_min, quant_max, *places, threads)
    if counts[0] == 0:  # mostly
        return Seen(bounds[0], bounds[1], torch.empty(0, dtype=torch.int64, device="cpu"))
    return Seen(bounds[0], bounds[1], None if counts[0] < 0 else positions[: counts[0]].clone())


def values_of_codes(
    codes: Tensor, out: Tensor, scale: Tensor, zero_point: Tensor | None, quant_min: int, quant_max: int
) -> bool:
    """Write the values of what :func:`quantize_input` wrote as ``codes`` into ``out``; return whether it was done."""
    function, grid = _find("values_of_codes", out), _parameters(scale, zero_point)
    if function is None or grid is None:
        return False
    count = codes.numel()
    function(codes.data_ptr(), out.data_ptr(), count, *grid, quant_min, quant_max, threads_for(count))
    return True


def quantize_by_absmax(rows: Tensor, out: Tensor, divisor: float, quant_min: int, quant_max: int) -> Tensor | None:
    """Write ``rows`` into ``out``, each fake-quantized with the scale of its own largest magnitude; return the scales.

    Args:
        rows: ``[R, n]``, contiguous, not empty.
        out: likewise.
        divisor: what the magnitude is divided by.
        quant_min: smallest code.
        quant_max: largest code.

    Returns:
        float32 ``[R]``; None where there is no kernel.
    """
    function = _find("quantize_by_absmax", rows)
    if function is None:
        return None
    count, columns = rows.shape
    scale = torch.empty(count, dtype=torch.float32, device="cpu")
    addresses = rows.data_ptr(), out.data_ptr(), count, columns, scale.data_ptr()
    function(*addresses, divisor, quant_min, quant_max, threads_for(rows.numel()))
    return scale


def row_extremes(rows: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return the smallest and the largest of each row, float32 ``[R]``, NaN where there is one; None without kernel.

    Args:
        rows: ``[R, n]``, contiguous, not empty.
    """
    function = _find("row_extremes", rows)
    if function is None:
        return None
    count, columns = rows.shape
    low, high = torch.empty(2, count, dtype=torch.float32, device="cpu").unbind()
    function(rows.data_ptr(), count, columns, low.data_ptr(), high.data_ptr(), threads_for(rows.numel()))
    return low, high

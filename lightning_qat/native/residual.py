"""A sum of two float32 tensors, clamped, and its uint8 codes, in one pass over memory."""

from __future__ import annotations

from torch import Tensor

from lightning_qat.native.library import Family, threads_for

_FAMILY = Family("residual", {"residual_add": "ppqffppfiffi"})


def residual_add(left: Tensor, right: Tensor, low: float, high: float, out: Tensor) -> bool:
    """Write ``clamp(left + right, low, high)`` into ``out``; False where there is no kernel, and nothing is done.

    Args:
        left: dense float32, not empty.
        right: likewise, in the same layout.
        low: smallest value, at most ``high``; may be infinite. A NaN stays one.
        high: largest value.
        out: likewise; may be ``left`` or ``right`` itself.
    """
    return _run(left, right, low, high, out, (0, 1.0, 0, 0, 0))


def residual_add_quantize(
    left: Tensor,
    right: Tensor,
    low: float,
    high: float,
    out: Tensor,
    codes: Tensor,
    scale: float,
    zero_point: int,
    first: int,
    last: int,
) -> bool:
    """Do what :func:`residual_add` does, and write the codes of ``out`` as well.

    Args:
        left: see there.
        right: see there.
        low: see there.
        high: see there.
        out: see there.
        codes: uint8, in the layout of ``out``.
        scale: of all codes.
        zero_point: the code of 0.0, and of NaN.
        first: smallest code.
        last: largest code.
    """
    grid = (codes.data_ptr(), scale, zero_point, first - zero_point, last - zero_point)
    return _run(left, right, low, high, out, grid)


def _run(
    left: Tensor, right: Tensor, low: float, high: float, out: Tensor, grid: tuple[int, float, int, int, int]
) -> bool:
    functions = _FAMILY.functions()
    if functions is None:
        return False
    count = out.numel()
    addresses = left.data_ptr(), right.data_ptr(), count, low, high, out.data_ptr()
    functions.residual_add(*addresses, *grid, threads_for(count))
    return True

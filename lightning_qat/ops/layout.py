"""Which elements of a tensor share a scale: the check, the views and the blocks of the integer ops.

An op gets the granularity as two plain integers, ``axis`` and ``group``:

=================  ========  =================  ==========================================
granularity        ``axis``  ``group``          view in which scale ``c`` belongs to ``[:, c, :]``
=================  ========  =================  ==========================================
per tensor         -1        0                  ``[1, 1, numel]``
per channel        0 .. n-1  0                  ``[before, C, after]``
per group, token   -1        elements of a run  ``[1, numel / group, group]``
=================  ========  =================  ==========================================
"""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_qat.ops.workspace import advise_huge_pages, take

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

#: ``axis`` and ``group`` of an op where they do not apply.
NO_AXIS = -1
NO_GROUP = 0


# --- the check -----------------------------------------------------------------------------------


def resolve_layout(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, axis: int | None, group_size: int | None
) -> tuple[int, int]:
    """Return ``(axis, group)`` as the ops take them, after checking every shape.

    Looks at metadata only, so it costs no synchronization and traces under ``torch.compile``.

    Args:
        x: values or codes, any shape.
        scale: one element for the tensor, ``[C]`` (or with kept dimensions) per channel,
            ``numel / group_size`` elements per group, ``x.shape[:-1] + (1,)`` per token.
        zero_point: shaped as ``scale``, or None.
        axis: the channel dimension, may be negative.
        group_size: consecutive elements of a row (everything after dimension 0, flattened) that share a scale.

    Raises:
        TypeError: if ``scale`` or ``zero_point`` is no tensor.
        ValueError: naming what was given and what is allowed.
    """
    _check_parameters(x, scale, zero_point)
    return layout_of_shapes(x.shape, scale.shape, axis, group_size)


def layout_of_shapes(
    shape: tuple[int, ...], scale_shape: tuple[int, ...], axis: int | None, group_size: int | None
) -> tuple[int, int]:
    """Return :func:`resolve_layout` of shapes; it raises as that does."""
    if axis is not None and group_size is not None:
        raise ValueError(f"axis={axis} and group_size={group_size} exclude each other; groups lie within rows")
    if axis is not None:
        return _resolve_axis(shape, scale_shape, axis), NO_GROUP
    if group_size is not None:
        return NO_AXIS, _resolve_group(shape, scale_shape, group_size)
    if prod(scale_shape) == 1:
        return NO_AXIS, NO_GROUP
    if len(shape) >= 2 and scale_shape == (*shape[:-1], 1):
        return NO_AXIS, shape[-1]
    allowed = "one element" + (f" or, per token, shape {(*shape[:-1], 1)}" if len(shape) >= 2 else "")
    raise ValueError(
        f"scale has shape {tuple(scale_shape)} for x of shape {tuple(shape)} without axis and group_size; "
        f"it takes {allowed}"
    )


def _check_parameters(x: Tensor, scale: Tensor, zero_point: Tensor | None) -> None:
    if not isinstance(scale, Tensor):
        raise TypeError(f"scale={scale!r} is no tensor; use torch.tensor(scale)")
    if not scale.is_floating_point():
        raise ValueError(f"scale has dtype {scale.dtype}; use a floating-point dtype")
    # A scale on the CPU would be accepted beside x on a GPU, where PyTorch multiplies by its
    # reciprocal instead of dividing: other codes.
    if scale.device != x.device:
        raise ValueError(f"scale is on {scale.device} and x on {x.device}; move the scale to {x.device}")
    if zero_point is None:
        return
    if not isinstance(zero_point, Tensor):
        raise TypeError(f"zero_point={zero_point!r} is no tensor; use torch.tensor(zero_point)")
    if zero_point.dtype == torch.bool or zero_point.is_complex():
        raise ValueError(f"zero_point has dtype {zero_point.dtype}; use an integer or floating-point dtype")
    if zero_point.device != x.device:
        raise ValueError(f"zero_point is on {zero_point.device} and x on {x.device}; move it to {x.device}")
    if zero_point.shape != scale.shape and not (zero_point.numel() == 1 and scale.numel() == 1):
        raise ValueError(
            f"zero_point has shape {tuple(zero_point.shape)} and scale {tuple(scale.shape)}; they must be equal"
        )


def _resolve_axis(shape: tuple[int, ...], scale_shape: tuple[int, ...], axis: int) -> int:
    dims = len(shape)
    if not -dims <= axis < dims:
        raise ValueError(f"axis={axis} is out of range for x of shape {tuple(shape)}; use {-dims} to {dims - 1}")
    axis %= dims
    channels = shape[axis]
    kept = tuple(channels if d == axis else 1 for d in range(dims))
    fits = prod(scale_shape) == channels and (len(scale_shape) != dims or scale_shape == kept)
    if not fits or (len(scale_shape) > 1 and channels not in scale_shape):
        raise ValueError(
            f"scale has shape {tuple(scale_shape)} for axis={axis} of x of shape {tuple(shape)}; "
            f"it takes ({channels},) or {kept}"
        )
    return axis


def _resolve_group(shape: tuple[int, ...], scale_shape: tuple[int, ...], group_size: int) -> int:
    row = prod(shape[1:]) if len(shape) > 1 else prod(shape)
    if group_size < 1:
        raise ValueError(f"group_size={group_size} is not allowed; use 1 to {row}")
    if row % group_size:
        raise ValueError(
            f"group_size must divide the row: {row} % {group_size} != 0; use group_size={_divisors(row, group_size)}"
        )
    groups = prod(shape) // group_size
    wanted: tuple[int, ...] = (shape[0], row // group_size) if len(shape) > 1 else (groups,)
    transposed = len(shape) > 1 and scale_shape == wanted[::-1] != wanted
    if prod(scale_shape) != groups or transposed:
        raise ValueError(
            f"scale has shape {tuple(scale_shape)} for group_size={group_size} and x of shape {tuple(shape)}; "
            f"it takes {groups} elements, such as {wanted}"
        )
    return group_size


def _divisors(row: int, group_size: int) -> str:
    """Return the two largest useful group sizes up to ``group_size``: powers of two where there are any from 16 on."""
    fitting = [d for d in range(min(group_size, row), 0, -1) if row % d == 0]
    powers = [d for d in fitting if d >= 16 and d & (d - 1) == 0]
    return " or ".join(str(d) for d in (powers or fitting)[:2])


# --- views for whole-tensor arithmetic ------------------------------------------------------------


def view_runs(x: Tensor, group: int) -> Tensor:
    """Return ``x`` as it is, or as ``[numel / group, group]`` where runs share a scale."""
    return x.reshape(-1, group) if group else x


def view_parameter(parameter: Tensor, ndim: int, axis: int, group: int) -> Tensor:
    """Return a scale or zero point as float32 in the shape that broadcasts against :func:`view_runs`."""
    if group:
        shape: tuple[int, ...] = (-1, 1)
    else:
        shape = tuple(-1 if d == axis else 1 for d in range(ndim)) if axis >= 0 else ()
    return parameter.reshape(shape).to(torch.float32)


def match_layout(result: Tensor, x: Tensor) -> Tensor:
    """Return ``result`` (shaped as ``x``) in the memory layout that ``torch.empty_like(x)`` has."""
    wanted = torch.empty_like(x, dtype=result.dtype)
    return result if result.stride() == wanted.stride() else wanted.copy_(result)


# --- how a CPU tensor lies ------------------------------------------------------------------------


def is_plain(x: Tensor) -> bool:
    """Whether ``x`` has memory that can be read at its address.

    Not a view of what has the other sign, as the imaginary part of a conjugate; nor zeros that take no memory, which
    autograd makes of gradients.
    """
    return (type(x) is Tensor or type(x) is torch.nn.Parameter) and not x.is_neg() and not x._is_zerotensor()


def dense_layout(x: Tensor, axis: int, group: int) -> tuple[int, int, int] | None:
    """Return ``(outer, C, inner)``: element ``i`` in memory has the scale of channel ``i // inner % C``.

    None where ``x`` has holes, no elements or no memory of its own, or where its runs do not lie in order.
    """
    if not is_plain(x):
        return None
    if axis < 0 and not group and x.is_contiguous():
        count = x.numel()
        return (1, 1, count) if count else None
    return _dense_layout(x.shape, x.stride(), axis, group)


@lru_cache(maxsize=4096)
def _dense_layout(
    shape: tuple[int, ...], strides: tuple[int, ...], axis: int, group: int
) -> tuple[int, int, int] | None:
    count, size = prod(shape), 1
    order = sorted(range(len(shape)), key=lambda d: (-strides[d], d))
    for d in reversed(order):
        if shape[d] != 1:
            if strides[d] != size:
                return None
            size *= shape[d]
    if not count:
        return None
    if group:
        moved = [d for d in order if shape[d] != 1]
        return (1, count // group, group) if moved == sorted(moved) else None
    if axis < 0:
        return 1, 1, count
    # A channel dimension of size 1 lies anywhere.
    at = order.index(axis)
    sizes = [shape[d] for d in order]
    return prod(sizes[:at]), sizes[at], prod(sizes[at + 1 :])


# --- blocks for the CPU kernels -------------------------------------------------------------------

#: Elements that go through all passes at a time, where the passes work in the result and where they need
#: scratch memory besides. Each pass ends in a barrier of all threads, which costs 12 ms while other
#: processes keep the cores busy, so blocks are few rather than small. The forward pass of 4096 x 4096 on
#: two cores: blocks that fit L2 (256K elements) take 7.0 ms alone and 3300 ms beside busy processes, 4M
#: elements 7.2 and 190 ms, 8M elements 7.8 and 95 ms; PyTorch's own op 47 and 155 ms. With gradients of
#: the scale: 20 ms alone with 2M elements, 29 ms with 8M.
_BLOCK_ELEMENTS = 8 * 1024 * 1024
_SCRATCH_ELEMENTS = 2 * 1024 * 1024


def view_channels(result: Tensor, others: Sequence[Tensor], axis: int, group: int) -> tuple[Tensor, list[Tensor]]:
    """Return ``[outer, C, inner]`` views in storage order: of ``result``, and of ``others`` shaped as it.

    ``result`` is dense (contiguous, where ``group`` is given), so its view shares its memory. Another
    tensor is copied only if its own layout differs. A channels_last tensor is thus walked as it lies.
    """
    shape: tuple[int, ...]
    if group:
        order, shape = list(range(result.dim())), (1, result.numel() // group, group)
    else:
        strides = result.stride()
        order = sorted(range(result.dim()), key=lambda d: -strides[d])
        sizes = [result.shape[d] for d in order]
        at = order.index(axis) if axis >= 0 else 0
        shape = (prod(sizes[:at]), sizes[at], prod(sizes[at + 1 :])) if axis >= 0 else (1, 1, result.numel())
    return result.permute(order).view(shape), [t.permute(order).reshape(shape) for t in others]


def block_limit(in_place: bool) -> int:
    """Return the elements of a block whose passes work in the result alone, or need scratch memory."""
    return _BLOCK_ELEMENTS if in_place else _SCRATCH_ELEMENTS


def channel_blocks(shape: Sequence[int], limit: int) -> Iterator[tuple[slice, slice, slice]]:
    """Yield slices that cut a ``[outer, C, inner]`` view into blocks of up to ``limit`` elements."""
    outer, channels, inner = shape
    outer_step = max(1, limit // (channels * inner))
    channel_step = min(channels, max(1, limit // inner))
    inner_step = min(inner, limit)
    for o in range(0, outer, outer_step):
        for c in range(0, channels, channel_step):
            for i in range(0, inner, inner_step):
                yield slice(o, o + outer_step), slice(c, c + channel_step), slice(i, i + inner_step)


def channel_parameter(parameter: Tensor) -> Tensor:
    """Return a scale or zero point as float32 ``[C, 1]``, to go with :func:`view_channels`."""
    return parameter.reshape(-1, 1).to(torch.float32)


def empty_result(x: Tensor, group: int) -> Tensor:
    """Return uninitialized CPU memory for a result like ``x``; contiguous where runs share a scale."""
    taken = take(x) if x.is_contiguous() or not group else None
    if taken is not None:
        return taken
    return advise_huge_pages(torch.empty(x.shape, dtype=x.dtype, device=x.device) if group else torch.empty_like(x))


def empty_values(shape: torch.Size) -> Tensor:
    """Return uninitialized float32 CPU memory for a result, contiguous."""
    taken = take(torch.empty(shape, dtype=torch.float32, device="meta"))
    return advise_huge_pages(torch.empty(shape, dtype=torch.float32, device="cpu")) if taken is None else taken


def empty_codes(shape: torch.Size) -> Tensor:
    """Return uninitialized uint8 CPU memory for codes, contiguous."""
    taken = take(torch.empty(shape, dtype=torch.uint8, device="meta"))
    return torch.empty(shape, dtype=torch.uint8, device="cpu") if taken is None else taken


def empty_scratch(result: Tensor, limit: int) -> Tensor:
    """Return flat uninitialized float32 CPU memory for one block of ``result``."""
    return advise_huge_pages(torch.empty(min(result.numel(), limit), dtype=torch.float32, device="cpu"))


def view_scratch(scratch: Tensor, block: Tensor) -> Tensor:
    """Return the part of :func:`empty_scratch` that a block takes, in its shape."""
    return scratch[: block.numel()].view(block.shape)

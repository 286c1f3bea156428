"""The CPU kernels of fake quantization: few passes, in place where they can be, equal to the definition bit for bit.

One pass where this machine compiles C++ (:mod:`lightning_qat.native`); PyTorch's operations in place otherwise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_qat.native import fake_quantize as native
from lightning_qat.ops.fake_quantize import (
    EDGE,
    _blank_gradients,
    _edges,
    _zero_point_terms,
    fake_quantize_backward_op,
    fake_quantize_op,
)
from lightning_qat.ops.layout import (
    block_limit,
    channel_blocks,
    channel_parameter,
    dense_layout,
    empty_result,
    empty_scratch,
    is_plain,
    match_layout,
    view_channels,
    view_scratch,
)


@fake_quantize_op.register_kernel("cpu")
def fake_quantize_cpu(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, quant_min: int, quant_max: int, axis: int, group: int
) -> Tensor:
    """The definition in place, for float32 in the result itself: fresh memory costs more than the arithmetic."""
    if x.numel() == 0:
        return torch.empty_like(x)
    layout = dense_layout(x, axis, group) if native.has_kernels(x) else None
    if layout is not None:
        result = empty_result(x, 0)
        native.quantize(x, result, layout, *as_read(scale, zero_point), quant_min, quant_max)
        return result
    if axis <= 0 and _is_one_block(x):
        by_rows = group or axis == 0
        return (_per_row if by_rows else _per_tensor)(x, scale, zero_point, quant_min, quant_max)
    result = empty_result(x, group)
    out, (values,) = view_channels(result, (x,), axis, group)
    step, zero = _channel_parameters(scale, zero_point)
    limit = block_limit(in_place=x.dtype == torch.float32)
    scratch = None if x.dtype == torch.float32 else empty_scratch(out, limit)
    for block in channel_blocks(out.shape, limit):
        s, target = step[block[1]], out[block]
        if scratch is None:
            codes = torch.div(values[block], s, out=target)
        else:
            codes = view_scratch(scratch, target).copy_(values[block]).div_(s)
        _ratios_to_values(codes, s, None if zero is None else zero[block[1]], quant_min, quant_max)
        if scratch is not None:
            target.copy_(codes)
    return match_layout(result, x)


def as_read(scale: Tensor, zero_point: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return both as the native kernels read them."""
    if zero_point is not None and zero_point.dtype is not torch.int32:
        zero_point = zero_point.to(torch.float32)
    return scale.to(torch.float32).contiguous(), None if zero_point is None else zero_point.contiguous()


def _native_gradients(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    grid: tuple[int, int, int, int],
    needs: list[bool],
    blank: tuple[Tensor, Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return the gradients, those of ``blank`` where not needed; None where there is no kernel."""
    if not native.has_kernels(x) or grad.dtype != x.dtype or not is_plain(grad):
        return None
    layout = dense_layout(x, *grid[2:])
    if layout is None:
        return None
    if grad.stride() != x.stride():
        grad = torch.empty_like(x).copy_(grad)
    result = empty_result(x, 0) if needs[0] else None
    read = (layout, *as_read(scale, zero_point), *grid[:2])
    if result is not None and not (needs[1] or needs[2]):
        native.input_gradient(grad, x, result, *read)
        return result, blank[1], blank[2]
    sums = native.learned_sums(grad, x, result, *read)
    if sums is None:
        return None
    found = [gradient.copy_(sums[:, i].view(gradient.shape)) if needs[i + 1] else gradient
             for i, gradient in enumerate(blank[1:])]  # fmt: skip
    return blank[0] if result is None else result, found[0], found[1]


def _has_result_like_it(x: Tensor) -> bool:
    """Whether a result with the layout of ``x`` is walked as ``x`` lies."""
    return x.dtype == torch.float32 and x.is_contiguous()


def _is_one_block(x: Tensor) -> bool:
    return _has_result_like_it(x) and x.numel() <= block_limit(in_place=True)


def _per_tensor(x: Tensor, scale: Tensor, zero_point: Tensor | None, quant_min: int, quant_max: int) -> Tensor:
    """The same with as few steps as it takes: for small tensors these are the time."""
    step, zero = scale.reshape(()).to(torch.float32), _rounded(zero_point)
    result = torch.div(x, step, out=empty_result(x, 0))
    result.round_().clamp_(quant_min - zero, quant_max - zero)
    if zero_point is None:
        return result.mul_(step)
    return torch.add(torch.zeros((), device="cpu"), result, alpha=step.item(), out=result)


def _per_row(x: Tensor, scale: Tensor, zero_point: Tensor | None, quant_min: int, quant_max: int) -> Tensor:
    """The same for a scale for each index of dimension 0, or for each run."""
    result, rows = empty_result(x, 0), scale.numel()
    step, zero = _channel_parameters(scale, zero_point)
    ratios = torch.div(x.view(rows, -1), step, out=result.view(rows, -1))
    _ratios_to_values(ratios, step, zero, quant_min, quant_max)
    return result


def _rounded(zero_point: Tensor | None) -> float:
    if zero_point is None:
        return 0.0
    value = zero_point.item()
    if isinstance(value, int) and abs(value) <= 2**24:  # float32 has it
        return float(value)
    return torch.round(zero_point.to(torch.float32)).item()


def input_ends(scale: Tensor, zero_point: Tensor | None, quant_min: int, quant_max: int) -> tuple[float, float]:
    """Return between which values the gradient passes, of one scale."""
    # Products of float32 numbers are exact in Python's, and rounded to float32 once, where they are used.
    zero, step = _rounded(zero_point), scale.to(torch.float32).item()
    return (quant_min - zero - EDGE) * step, (quant_max - zero + EDGE) * step


def _per_tensor_gradient(
    grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor | None, quant_min: int, quant_max: int
) -> Tensor:
    low, high = input_ends(scale, zero_point, quant_min, quant_max)
    result: Tensor = torch.ops.aten.hardtanh_backward.grad_input(grad, x, low, high, grad_input=empty_result(x, 0))
    return result


@fake_quantize_backward_op.register_kernel("cpu")
def fake_quantize_backward_cpu(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
    axis: int,
    group: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition without masks."""
    grad_x, grad_scale, grad_zero = blank = _blank_gradients(x, scale, zero_point, [False, *needs[1:]])
    if x.numel() == 0:
        return torch.empty_like(x) if needs[0] else grad_x, grad_scale, grad_zero
    grid = (quant_min, quant_max, axis, group)
    found = _native_gradients(grad, x, scale, zero_point, grid, needs, blank)
    return _gradients_in_place(grad, x, scale, zero_point, grid, needs, blank) if found is None else found


def _gradients_in_place(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    grid: tuple[int, int, int, int],
    needs: list[bool],
    blank: tuple[Tensor, Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """The same by PyTorch's operations, in place where they can be."""
    quant_min, quant_max, axis, group = grid
    grad_x, grad_scale, grad_zero = blank
    if axis < 0 and not group and needs == [True, False, False] and _has_result_like_it(x):
        return _per_tensor_gradient(grad, x, scale, zero_point, quant_min, quant_max), grad_scale, grad_zero
    if axis <= 0 and needs == [True, False, False] and _is_one_block(x) and grad.dtype == torch.float32:
        return _per_row_gradient(grad, x, scale, zero_point, quant_min, quant_max), grad_scale, grad_zero
    step, zero = _channel_parameters(scale, zero_point)
    low, high = _edges(step, zero, quant_min, quant_max)
    result = empty_result(x, group)
    if len(step) == 1 and x.dtype != torch.float64 and needs == [True, False, False]:
        # One pass and no copy, whatever the strides. (At a NaN its vector part gives 0, its tail the gradient.)
        torch.ops.aten.hardtanh_backward.grad_input(grad, x, low.item(), high.item(), grad_input=result)
        return match_layout(result, x), grad_scale, grad_zero
    out, (values, grads) = view_channels(result, (x, grad), axis, group)
    sums = torch.zeros(2, len(step), dtype=torch.float64, device="cpu")
    limit = block_limit(in_place=x.dtype == torch.float32 and not (needs[1] or needs[2]))
    scratch = [empty_scratch(out, limit) for _ in range(3)]
    for block in channel_blocks(out.shape, limit):
        c, g, target = block[1], grads[block], out[block]
        value, z = values[block].to(torch.float32), None if zero is None else zero[c]
        spare, codes, margin = (view_scratch(s, target) for s in scratch)
        if x.dtype == torch.float32:
            margin = target
        _margin(value, low[c], high[c], margin, spare)
        if needs[1]:
            _scale_terms_cpu(g, value, step[c], z, quant_min, quant_max, margin, spare, codes)
            sums[0, c] += codes.sum((0, 2))
        if needs[2]:
            sums[1, c] += _zero_point_terms(g, step[c], margin <= 0).sum((0, 2))
        if needs[0]:
            _pass_inside(g, margin, target, spare)
    if needs[1]:
        grad_scale.copy_(sums[0].reshape(grad_scale.shape))
    if needs[2]:
        grad_zero.copy_(sums[1].reshape(grad_zero.shape))
    return match_layout(result, x) if needs[0] else grad_x, grad_scale, grad_zero


def _per_row_gradient(
    grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor | None, quant_min: int, quant_max: int
) -> Tensor:
    """The gradient of ``x`` for a scale for each index of dimension 0, or for each run."""
    result, rows = empty_result(x, 0), scale.numel()
    margin = result.view(rows, -1)
    low, high = _edges(*_channel_parameters(scale, zero_point), quant_min, quant_max)
    _margin(x.view(rows, -1), low, high, margin, None)
    torch.ops.aten.threshold_backward.grad_input(grad.reshape(rows, -1), margin, 0, grad_input=margin)
    return result


def _margin(value: Tensor, low: Tensor, high: Tensor, out: Tensor, spare: Tensor | None) -> None:
    """Write a number into ``out`` that is positive where ``low < value < high`` and not where outside.

    ``value > low`` is exactly ``value - low > 0`` in IEEE arithmetic, and 0 is a threshold that fits every
    channel: the gradient took 17 ms for 4096 x 4096 where comparisons into masks took 26 ms. ``spare`` is scratch.
    """
    if torch.equal(low, -high):
        torch.sub(high, torch.abs(value, out=out), out=out)
    else:
        torch.sub(value, low, out=out)
        torch.minimum(out, torch.sub(high, value, out=spare), out=out)


def _pass_inside(grad: Tensor, margin: Tensor, target: Tensor, spare: Tensor) -> None:
    """Write ``grad`` into ``target`` where ``margin`` is positive, and 0 elsewhere; it passes a NaN."""
    threshold_backward = torch.ops.aten.threshold_backward.grad_input
    if target.dtype.itemsize < margin.dtype.itemsize:
        target.copy_(threshold_backward(spare.copy_(grad), margin, 0, grad_input=spare))
    else:
        threshold_backward(grad, margin, 0, grad_input=target)


def _scale_terms_cpu(
    grad: Tensor,
    value: Tensor,
    step: Tensor,
    zero: Tensor | None,
    quant_min: int,
    quant_max: int,
    margin: Tensor,
    ratio: Tensor,
    codes: Tensor,
) -> None:
    """Write :func:`_scale_terms` into ``codes``; ``ratio`` is scratch."""
    torch.div(value, step, out=ratio)
    _clamp_codes(torch.round(ratio, out=codes), zero, quant_min, quant_max)
    _pass_inside(ratio, margin, ratio, ratio)
    codes.sub_(ratio).mul_(grad.to(torch.float32))


def _clamp_codes(codes: Tensor, zero: Tensor | None, quant_min: int, quant_max: int) -> None:
    """Clamp rounded ratios to the grid in place, leaving them relative to the zero point."""
    if zero is None:
        codes.clamp_(quant_min, quant_max)
    else:
        codes.add_(zero).clamp_(quant_min, quant_max).sub_(zero)


def _ratios_to_values(ratios: Tensor, step: Tensor, zero: Tensor | None, quant_min: int, quant_max: int) -> None:
    """Round, clamp and scale in place."""
    ratios.round_()
    if zero is not None and zero.numel() == 1:
        # Sums of integers are exact, so moved bounds give what adding and subtracting the zero point give in
        # two more passes; adding 0.0 to the product makes a -0.0 the 0.0 that it is there.
        ratios.clamp_(quant_min - zero.item(), quant_max - zero.item())
        torch.add(torch.zeros((), device="cpu"), ratios, alpha=step.item(), out=ratios)
    else:
        _clamp_codes(ratios, zero, quant_min, quant_max)
        ratios.mul_(step)


def _channel_parameters(scale: Tensor, zero_point: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return float32 ``[C, 1]`` of the scale and of the rounded zero point."""
    return channel_parameter(scale), None if zero_point is None else torch.round(channel_parameter(zero_point))

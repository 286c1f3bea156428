"""What the user's functions do to a :class:`RegionTensor` without handing out its floats.

What is not here gets the floats, as an ordinary tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_qat.nn.region import FUNCTIONS, RegionTensor, counted
from lightning_qat.nn.region_steps import RELU, Clamp, Flatten, Step, max_pool_of
from lightning_qat.ops.integer_conv import is_channels_last


def _clamped(x: Any, step: Clamp, inplace: bool) -> RegionTensor | None:
    if type(x) is not RegionTensor:
        return None
    if inplace:
        return x if x.note_in_place(step) else None
    return _stepped(x, step, x.seen_shape)


def _stepped(x: RegionTensor, step: Step, shape: tuple[int, ...]) -> RegionTensor:
    noted = x.noted(step, shape)
    if noted is not None:
        return noted
    with counted():
        return x.with_value(step.on_float(x.floats()))


def _relu(input: Any, inplace: bool = False) -> RegionTensor | None:
    return _clamped(input, RELU, inplace)


def _relu_(input: Any) -> RegionTensor | None:
    return _clamped(input, RELU, True)


def _relu6(input: Any, inplace: bool = False) -> RegionTensor | None:
    return _clamped(input, Clamp(0.0, 6.0), inplace)


def _hardtanh(input: Any, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> RegionTensor | None:
    return _clamped(input, Clamp(float(min_val), float(max_val)), inplace)


def _max_pool2d(input: Any, *args: Any, **kwargs: Any) -> RegionTensor | None:
    pool = max_pool_of(*args, **kwargs)
    if pool is None or type(input) is not RegionTensor:
        return None
    shape = input.seen_shape
    return _stepped(input, pool, pool.shape(shape)) if len(shape) == 4 else None


def _flatten(input: Any, start_dim: int = 0, end_dim: int = -1) -> RegionTensor | None:
    if type(input) is not RegionTensor or start_dim != 1 or end_dim not in (-1, 3):
        return None
    shape = input.seen_shape
    if len(shape) != 4 or input.seen_channels_last or input._sum is not None:
        return None
    made = input.noted(Flatten(), (shape[0], math.prod(shape[1:])))
    if made is not None:
        made.view_of, input.viewed = input, True
    return made


def _reshape(input: Any, *shape: Any, **named: Any) -> RegionTensor | None:
    wanted = tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape
    if type(input) is not RegionTensor or named or len(wanted) != 2 or not all(isinstance(n, int) for n in wanted):
        return None
    rows, row = input.seen_shape[0], math.prod(input.seen_shape[1:])
    return _flatten(input, 1) if wanted[0] == rows > 0 and wanted[1] in (-1, row) else None


def _dropout(input: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> RegionTensor | None:
    return None if training else input


def _fits_into(a: RegionTensor, b: Any) -> bool:
    """Whether ``b`` is a float32 tensor that broadcasts to the shape of ``a``, ``[N, C, H, W]``."""
    if type(b) is RegionTensor:
        other, last = b.seen_shape, b.seen_channels_last
    elif type(b) is Tensor and b.dtype == torch.float32 and b.device.type == "cpu" and b.layout == torch.strided:
        other, last = tuple(b.shape), is_channels_last(b)
        if not last and not b.is_contiguous():
            return False
    else:
        return False
    shape = a.seen_shape
    if last != a.seen_channels_last and (other == shape or other[2:] != (1, 1)):
        return False  # PyTorch's rules for mixed layouts are not ours to repeat
    return len(shape) == len(other) == 4 and all(m in (n, 1) for n, m in zip(shape, other, strict=True))


def _floats(x: Tensor) -> Tensor:
    return x.floats() if type(x) is RegionTensor else x


def _both_wait(a: Any, b: Any) -> bool:
    """Whether both are of one shape and layout, and of this region: their sum may be added up later."""
    return type(a) is RegionTensor and type(b) is RegionTensor and a.seen_shape == b.seen_shape and _fits_into(a, b)


def _combined(function: Callable[..., Tensor], in_place: Callable[..., Tensor]) -> Callable[..., RegionTensor | None]:
    """Return what adds or multiplies two of the same shape, or one with a value for each channel."""

    def handler(*args: Any, **kwargs: Any) -> RegionTensor | None:
        if len(args) != 2 or kwargs:
            return None
        a, b = args
        if type(a) is not RegionTensor or (type(b) is RegionTensor and b.not_run() and _fits_into(b, a)):
            a, b = b, a
        if not _fits_into(a, b):
            return None
        with counted():
            if a is not b and a.not_run():
                # Read by nobody but this result, most likely: its floats are fresh and need not be kept.
                return a.with_value(in_place(a._pending.to_float(a._steps), _floats(b)))
            return a.with_value(function(a.floats(), _floats(b)))

    return handler


def _combined_in_place(in_place: Callable[..., Tensor]) -> Callable[..., RegionTensor | None]:
    def handler(*args: Any, **kwargs: Any) -> RegionTensor | None:
        if len(args) != 2 or kwargs:
            return None
        a, b = args
        if type(a) is not RegionTensor or not a.changes_unseen() or not _fits_into(a, b):
            return None
        a.forget_readers()
        with counted():
            other = _floats(b)
            a._value = in_place(a.floats(), other.clone() if b is a else other)
        a._pending, a._steps = None, ()
        return a

    return handler


def _elementwise(function: Callable[..., Any]) -> Callable[..., RegionTensor | None]:
    """Return what keeps a layout: it sees the floats in channels_last, read before or not: sums may depend on it."""

    def handler(*args: Any, **kwargs: Any) -> RegionTensor | None:
        input = args[0] if args else kwargs.get("input")
        given = sum(type(value) is RegionTensor for value in (*args, *kwargs.values()))
        if type(input) is not RegionTensor or given > 1 or kwargs.get("inplace") or len(input.seen_shape) != 4:
            return None
        if kwargs.get("out") is not None:
            return None
        with counted():
            floats = input.floats().contiguous(memory_format=torch.channels_last)
            if "input" in kwargs:
                result = function(**{**kwargs, "input": floats})
            else:
                result = function(floats, *args[1:], **kwargs)
            return input.with_value(result) if result is not floats else None

    return handler


_add_now, _mul = _combined(torch.add, Tensor.add_), _combined(torch.mul, Tensor.mul_)
_add_in_place_now = _combined_in_place(Tensor.add_)


def _add(*args: Any, **kwargs: Any) -> RegionTensor | None:
    summed = args[0].plus(args[1]) if len(args) == 2 and not kwargs and _both_wait(*args) else None
    return summed if summed is not None else _add_now(*args, **kwargs)


def _add_in_place(*args: Any, **kwargs: Any) -> RegionTensor | None:
    if len(args) == 2 and not kwargs and _both_wait(*args) and args[0].add_in_place(args[1]):
        return args[0]
    return _add_in_place_now(*args, **kwargs)


_KNOWN: dict[Any, Callable[..., RegionTensor | None]] = {
    **dict.fromkeys((F.relu, torch.relu, Tensor.relu), _relu),
    **dict.fromkeys((torch.relu_, Tensor.relu_, F.relu_), _relu_),
    F.relu6: _relu6,
    F.hardtanh: _hardtanh,
    **dict.fromkeys((F.max_pool2d, torch.max_pool2d), _max_pool2d),
    **dict.fromkeys((torch.flatten, Tensor.flatten), _flatten),
    **dict.fromkeys((Tensor.view, Tensor.reshape, torch.reshape), _reshape),
    F.dropout: _dropout,
    **dict.fromkeys((torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__), _add),
    **dict.fromkeys((torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__), _mul),
    **dict.fromkeys((Tensor.add_, Tensor.__iadd__), _add_in_place),
    **{
        function: _elementwise(function)
        for function in (
            F.adaptive_avg_pool2d, F.avg_pool2d, F.silu, F.gelu, F.hardswish, F.hardsigmoid, F.leaky_relu, F.elu,
            F.batch_norm, torch.sigmoid, Tensor.sigmoid, torch.tanh, Tensor.tanh,
        )
    },
}  # fmt: skip
FUNCTIONS.update(_KNOWN)


def codes_pass(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> bool:
    """Return whether a function call, made on the first of its arguments, is one that codes go through."""
    source = args[0] if args else kwargs.get("input")
    if not isinstance(result, Tensor) or not isinstance(source, Tensor) or source.dim() != 4:
        return False
    handler = FUNCTIONS.get(func)
    if handler in (_relu, _relu_, _relu6, _hardtanh):
        return True
    if handler is _max_pool2d:
        return max_pool_of(*args[1:], **{key: value for key, value in kwargs.items() if key != "input"}) is not None
    if handler in (_flatten, _reshape):
        return result.dim() == 2 and result.shape[0] == source.shape[0] and result.numel() == source.numel()
    return handler is _dropout and result is source

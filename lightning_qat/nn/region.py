"""Codes between layers: what a converted convolution computes stays in uint8 until somebody wants floats.

A convolution that is called inside the forward of a larger converted module answers with a
:class:`RegionTensor`: to the user's code a float32 tensor, inside the convolution that is still to be run. ReLU,
clamping and max pooling are noted. A quantized layer that reads it has it computed straight to codes of its own
grid; whoever else reads it gets the float tensor, computed then. So no graph is traced, any Python between the
layers stays what it is, and where the grids of the readers part nothing is rounded that was not rounded in training.

Straight to codes is taken only for layers known to have one such reader (``QuantizedLayer.feeds_one_layer``):
for others, as the input of a residual addition, the floats are computed once, in channels_last, and quantized.
At the end of a residual block the sum waits as well (:mod:`lightning_qat.nn.region_sum`): adding the floats, the ReLU
and the codes of the layer that reads it first are one pass over what the convolution gave, and another layer of the
same grid takes the same codes.
Either way does not depend on who looks at the tensor in between. The largest converted module being called
hands out plain tensors (:func:`keep_codes_inside`).
"""

from __future__ import annotations

import contextlib
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_qat.nn.region_steps import RELU, Step
from lightning_qat.nn.region_sum import PendingSum
from lightning_qat.ops.integer_conv import CodeGrid


class CodeKernel(Protocol):
    """Runs a convolution whose input is codes already."""

    def run(self, codes: Tensor, bias: Tensor | None, output: CodeGrid | None, *, relu: bool) -> Tensor:
        """Return codes on ``output``, or float32; in channels_last."""
        ...


@contextlib.contextmanager
def counted() -> Iterator[None]:
    """Make ordinary tensors, in inference mode too, so that changes in place are counted."""
    with torch.inference_mode(False), torch.no_grad():
        yield


class _Pending:
    """A convolution to be run, once to floats and once to codes at most."""

    def __init__(self, kernel: CodeKernel, codes: Tensor, bias: Tensor | None, one_reader: bool) -> None:
        self.kernel = kernel
        self.codes = codes
        self.bias = bias
        self.one_reader = one_reader

    def to_float(self, steps: tuple[Step, ...]) -> Tensor:
        relu = bool(steps) and steps[0] is RELU
        with counted():
            result = self.kernel.run(self.codes, self.bias, None, relu=relu)
            for step in steps[int(relu) :]:
                result = step.on_fresh_float(result)
        return result

    def to_codes(self, steps: tuple[Step, ...], grid: CodeGrid) -> Tensor:
        relu = bool(steps) and steps[0] is RELU
        result = self.kernel.run(self.codes, self.bias, grid, relu=relu)
        for step in steps[int(relu) :]:
            result = step.on_fresh_codes(result, grid)
        return result


_CPU = torch.device("cpu")


class RegionTensor(Tensor):
    """A float32 tensor, ``[N, C, H, W]`` or flattened, that is computed when it is read."""

    #: Shape and layout as the user's code sees them, kept because asking a tensor subclass is slow.
    seen_shape: tuple[int, ...]
    seen_channels_last: bool
    _pending: _Pending | None = None
    _steps: tuple[Step, ...] = ()
    #: The floats, in channels_last until they are handed out.
    _value: Tensor | None = None
    #: Whether they were handed out, and what they were then, where the convolution may still go straight to codes.
    _given: bool = False
    _as_given: Tensor | None = None
    #: What this is a view of, and whether there is a view of this: in memory they are one.
    view_of: RegionTensor | None = None
    viewed: bool = False
    #: What this is after ``_steps``, until it is added up.
    _sum: PendingSum | None = None
    #: The sums that will read the floats, and codes of them: both until the floats change or are handed out.
    _read_by: tuple[weakref.ref[PendingSum], ...] = ()
    _codes: tuple[CodeGrid, Tensor] | None = None

    @staticmethod
    def _new(shape: tuple[int, ...], channels_last: bool) -> RegionTensor:
        strides = None
        channels_last = channels_last and len(shape) == 4
        if channels_last:
            _, c, h, w = shape
            strides = (c * h * w, 1, c * w, c)
        made: RegionTensor = Tensor._make_wrapper_subclass(
            RegionTensor, shape, strides=strides, dtype=torch.float32, device=_CPU
        )
        made.seen_shape, made.seen_channels_last = shape, channels_last
        return made

    @staticmethod
    def of_convolution(
        kernel: CodeKernel,
        codes: Tensor,
        bias: Tensor | None,
        shape: tuple[int, ...],
        *,
        one_reader: bool,
        channels_last: bool,
    ) -> RegionTensor:
        """Return the result of a convolution that is not run yet.

        Args:
            kernel: runs it.
            codes: uint8, of its input; not changed by anybody.
            bias: float32 or None.
            shape: of the result, ``[N, C, H, W]``.
            one_reader: compute straight to the codes of the layer that reads it.
            channels_last: the layout that the user's code is to see.
        """
        made = RegionTensor._new(shape, channels_last)
        made._pending = _Pending(kernel, codes, bias, one_reader)
        return made

    def with_value(self, value: Tensor) -> RegionTensor:
        """Return floats in the layout that they have, seen in the one of ``self``."""
        made = RegionTensor._new(tuple(value.shape), self.seen_channels_last)
        made._value = value
        return made

    def plus(self, other: RegionTensor) -> RegionTensor | None:
        """Return the sum with another of the same shape, to be added up later; None where floats were handed out."""
        if self._given or other._given:
            return None
        made = RegionTensor._new(self.seen_shape, self.seen_channels_last)
        made._wait_for_sum(self, other)
        return made

    def add_in_place(self, other: RegionTensor) -> bool:
        """Become the sum with another of the same shape, to be added up later; False where that cannot be."""
        if not self.not_run() or other._given or other is self:
            return False
        self._wait_for_sum(other, self)
        self._pending, self._steps = None, ()
        return True

    def _wait_for_sum(self, a: RegionTensor, b: RegionTensor) -> None:
        fresh = next((side for side in (b, a) if side.not_run()), None)
        if fresh is None or a is b:
            left = a.floats()
            self._sum = PendingSum(lambda: left, b.floats(), fresh=False)
            borrowed = [a, b]
        else:
            # Read by nobody but this sum, most likely: its floats need not be kept.
            pending, steps, other = fresh._pending, fresh._steps, a if fresh is b else b
            self._sum = PendingSum(lambda: pending.to_float(steps), other.floats(), fresh=True)  # type: ignore[union-attr]
            borrowed = [other]
        for side in borrowed:
            side._read_by = (*side._read_by, weakref.ref(self._sum))
        self._sum.awaited_by(self)

    def sum_steps(self) -> tuple[Step, ...]:
        """Return what is done to the sum."""
        return self._steps

    def take_sum(self, value: Tensor) -> None:
        """Have these floats from now on."""
        self._value, self._sum, self._steps = value, None, ()

    def forget_readers(self) -> None:
        """Let sums read the floats now, before these change or are handed out, and keep no codes of them."""
        for reference in self._read_by:
            reader = reference()
            if reader is not None:
                with counted():
                    reader.settle()
        self._read_by, self._codes = (), None

    def _unchanged(self) -> bool:
        """Whether the convolution still stands for the floats, handed out or not."""
        if self._pending is None or self.view_of is not None:
            return self._pending is not None and self.view_of._unchanged()  # type: ignore[union-attr]
        # By value: what numpy, ``.data`` and storages write is not counted as a version.
        return not self._given or (self._as_given is not None and torch.equal(self._value, self._as_given))  # type: ignore[arg-type]

    def not_run(self) -> bool:
        """Whether this is a convolution whose floats are not there yet: they would be nobody else's."""
        return self._pending is not None and self._value is None

    def changes_unseen(self) -> bool:
        """Whether nobody holds the floats, or a view of them."""
        return not self._given and self.view_of is None and not self.viewed

    def codes_on(self, grid: CodeGrid) -> Tensor | None:
        """Return uint8 codes that are made on the way, or None where they are to be quantized from floats."""
        if self._pending is not None and self._pending.one_reader and self._unchanged():
            return self._pending.to_codes(self._steps, grid)
        if (pending := self._sum) is not None:
            with counted():
                self.keep_codes(grid, pending.codes_on(grid))
        return self._codes[1] if self._codes is not None and self._codes[0] == grid else None

    def keep_codes(self, grid: CodeGrid, codes: Tensor | None) -> None:
        """Keep the codes of the floats for another reader of the same grid, as the projection beside a block is."""
        if not self._given and codes is not None:
            self._codes = (grid, codes)

    def floats(self) -> Tensor:
        """Return the floats, in channels_last where nobody holds them yet. Not to be changed."""
        if self.view_of is not None:
            return self.plain()
        if (pending := self._sum) is not None:
            with counted():
                pending.settle()
        if self._value is None:
            self._value = self._pending.to_float(self._steps)  # type: ignore[union-attr]
        return self._value

    def plain(self) -> Tensor:
        """Return the floats as an ordinary tensor in the layout the user's code sees; it stands for ``self`` now."""
        if not self._given and self.view_of is not None:
            base = self.view_of.plain()
            with counted():
                self._value = base.view(self.seen_shape)
        elif not self._given:
            self.forget_readers()
            value, last = self.floats(), self.seen_channels_last
            with counted():
                layout = torch.channels_last if last and value.dim() == 4 else torch.contiguous_format
                self._value = value.contiguous(memory_format=layout)
                if self._pending is not None and self._pending.one_reader:
                    self._as_given = self._value.clone()
        self._given = True
        return self._value  # type: ignore[return-value]

    def noted(self, step: Step, shape: tuple[int, ...]) -> RegionTensor | None:
        """Return the result of a step that is not run yet, or None where the floats stand for ``self``."""
        if self._sum is None and not self._unchanged():
            return None
        made = RegionTensor._new(shape, self.seen_channels_last)
        made._pending, made._steps, made._sum = self._pending, (*self._steps, step), self._sum
        if made._sum is not None:
            made._sum.awaited_by(made)
        return made

    def note_in_place(self, step: Step) -> bool:
        """Let the step be part of ``self``; False where the floats are in somebody's hands."""
        if not self.changes_unseen():
            return False
        if self._value is not None:
            self.forget_readers()
            with counted():
                self._value = step.on_fresh_float(self._value)
        self._steps = (*self._steps, step)
        return True

    def follow_shape(self) -> None:
        """See what an operation in place made of the floats that were handed out: ``unsqueeze_``, ``transpose_``."""
        if self._value is not None and self._value.shape != self.seen_shape:
            self._pending, self.seen_shape = None, tuple(self._value.shape)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        handler = FUNCTIONS.get(func)
        if handler is not None and not floats_are_due():
            result = handler(*args, **kwargs)
            if result is not None:
                return result
        elif func in _METADATA and not (type(first) is RegionTensor and first._given):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        result = func(*map(_plain, args), **_plain(kwargs) if kwargs else kwargs)
        if type(first) is RegionTensor:
            first.follow_shape()
            if result is first._value and not floats_are_due():
                return first  # in place, or nothing to do: the user gets what was given
        return result

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # declared as disabled
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return func(*_plain(args), **_plain(kwargs or {}))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.plain().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.plain().clone()


def floats_are_due() -> bool:
    """Return whether gradients or a transform such as ``vmap`` have to see the floats."""
    return torch.is_grad_enabled() or torch._C._functorch.maybe_current_level() is not None


def settled(x: Tensor) -> Tensor:
    """Return the input of a layer: ``x``, or its floats where they are due."""
    return x.plain() if type(x) is RegionTensor and floats_are_due() else x


def _plain(tree: Any) -> Any:
    if type(tree) is RegionTensor:
        return tree.plain()
    if isinstance(tree, (Tensor, int, float)) or tree is None:  # most arguments
        return tree
    if not any(type(leaf) is RegionTensor for leaf in tree_leaves(tree)):
        return tree  # the very object: the user may hold on to it
    return tree_map_only(RegionTensor, RegionTensor.plain, tree)


_METADATA = {
    Tensor.dim, Tensor.size, Tensor.numel, Tensor.nelement, Tensor.ndimension, Tensor.__len__, Tensor.stride,
    Tensor.is_contiguous, Tensor.is_floating_point, Tensor.element_size, Tensor.is_inference, Tensor.get_device,
    Tensor.is_complex, Tensor.storage_offset, torch.is_floating_point, torch.is_complex, torch.numel,
    *(getattr(Tensor, name).__get__ for name in (
        "shape", "ndim", "dtype", "device", "layout", "requires_grad", "is_leaf", "grad_fn", "grad", "is_cuda",
        "is_sparse", "is_quantized", "is_mkldnn", "is_meta", "is_nested", "itemsize", "nbytes", "is_cpu",
    )),
}  # fmt: skip


#: Registry of function -> what it does to a :class:`RegionTensor` without handing out its floats; None where it cannot.
FUNCTIONS: dict[Any, Callable[..., RegionTensor | None]] = {}


class _Active(threading.local):
    """The converted modules being called on this thread, outermost first, and the frames that call them."""

    def __init__(self) -> None:
        self.stack: list[tuple[int, FrameType]] = []


_ACTIVE = _Active()


def _calls_under_way() -> list[tuple[int, FrameType]]:
    """Return the stack, less the calls that ended without a hook: by KeyboardInterrupt, by SystemExit."""
    stack = _ACTIVE.stack
    while stack:
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame is not stack[-1][1]:
            frame = frame.f_back
        if frame is not None:
            break
        stack.pop()
    return stack


def inside_region() -> bool:
    """Return whether a layer called now may answer with a :class:`RegionTensor`."""
    return bool(_ACTIVE.stack) and not floats_are_due() and bool(_calls_under_way())


def _enter(module: nn.Module, args: Any) -> None:
    if not torch.compiler.is_compiling():
        _calls_under_way().append((id(module), sys._getframe(1)))


def _leave(module: nn.Module, args: Any, output: Any) -> Any:
    stack = _ACTIVE.stack
    if torch.compiler.is_compiling() or all(called != id(module) for called, _ in stack):
        return None
    while stack.pop()[0] != id(module):
        pass  # entered, and left by an exception before this hook was theirs
    return None if stack else _plain(output)


def keep_codes_inside(model: nn.Module, producers: type[nn.Module], readers: tuple[type[nn.Module], ...]) -> None:
    """Let the modules of a converted ``model`` that hold a producer and a reader of codes keep codes inside."""
    for module in model.modules():
        inside = [child for child in module.modules() if isinstance(child, readers)]
        if module not in inside and len(inside) > 1 and any(isinstance(child, producers) for child in inside):
            module.register_forward_pre_hook(_enter, prepend=True)
            module.register_forward_hook(_leave, prepend=True, always_call=True)


def undo_codes_inside(model: nn.Module) -> None:
    """Undo :func:`keep_codes_inside`."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if hook in (_enter, _leave)]:
                del hooks[key]

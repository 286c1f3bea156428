"""Which channels can be divided where they are made and multiplied where they are read, watched in a forward pass.

What lies between may be what commutes with a positive factor for each channel: ReLU, clamping (at another height
then), pooling, and sums of channels that get the same factor. Convolutional networks are full of it; the channels of
transformer blocks, whose norms mix them, are found by :mod:`lightning_qat.ptq.folding`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from lightning_qat.nn import QATLayer
from lightning_qat.nn.layer import float_type, supported_class
from lightning_qat.ptq.adopt import given_grid
from lightning_qat.ptq.awq import rows_are_independent
from lightning_qat.ptq.channels import Source, shared_parameters, slot_of


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Channels that share a vector of scales.

    Args:
        sources: what makes them; all are divided by it.
        readers: prepared layers, by name; their columns are multiplied by it.
        channels: how many.
        ceiling: at which what the readers get was clamped; inf if nowhere.
    """

    sources: tuple[Source, ...]
    readers: Mapping[str, QATLayer]
    channels: int
    ceiling: float = math.inf


@dataclass(eq=False)
class _Channels:
    """Channels as far as they are known; those found to need the same scale become one."""

    count: int
    sources: dict[nn.Module, str] = field(default_factory=dict)
    readers: dict[str, QATLayer] = field(default_factory=dict)
    ceiling: float = math.inf
    #: Whether anything but clamping was done to them: what readers get then does not tell what was clamped.
    combined: bool = False
    fixed: bool = False
    into: _Channels | None = None

    def root(self) -> _Channels:
        return self if self.into is None else self.into.root()

    def join(self, other: _Channels) -> None:
        """Let both share a scale."""
        one, two = self.root(), other.root()
        if one is two:
            return
        one.fixed |= two.fixed or one.count != two.count
        one.combined |= two.combined
        one.ceiling = min(one.ceiling, two.ceiling)
        one.sources |= two.sources
        one.readers |= two.readers
        two.into = one


def _relu(input: Tensor, inplace: bool = False) -> float:
    return math.inf


def _relu6(input: Tensor, inplace: bool = False) -> float:
    return 6.0


def _hardtanh(input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> float | None:
    return float(max_val) if min_val == 0 < max_val else None


def _clamp(input: Tensor, min: Any = None, max: Any = None) -> float | None:
    top = math.inf if max is None else max
    known = all(isinstance(bound, (int, float)) for bound in (min, top))
    return float(top) if known and min == 0 < top else None


def _leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> float:
    return math.inf


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> float | None:
    return None if training else math.inf


#: Function -> what returns the ceiling of its result, None where it is none that a positive factor commutes with.
_CLAMPS: dict[Any, Callable[..., float | None]] = {
    **dict.fromkeys((F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_), _relu),
    **dict.fromkeys((torch.clamp, torch.clamp_, Tensor.clamp, Tensor.clamp_), _clamp),
    F.relu6: _relu6,
    F.hardtanh: _hardtanh,
    F.leaky_relu: _leaky_relu,
    F.dropout: _dropout,
}
_POOLS = {
    F.max_pool1d, F.max_pool2d, F.max_pool3d, torch.max_pool1d, torch.max_pool2d, torch.max_pool3d,
    F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d,
    torch.flatten, Tensor.flatten, Tensor.view, Tensor.reshape, torch.reshape,
}  # fmt: skip
_MEANS = {torch.mean, Tensor.mean}
_SUMS = {torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__}


def _spares_channels(dims: int, dim: Any = None, keepdim: bool = False, **others: Any) -> bool:
    """Return whether a mean is that of places alone."""
    chosen = (dim,) if isinstance(dim, int) else dim
    return isinstance(chosen, (tuple, list)) and not others.keys() - {"input"} and all(d % dims > 1 for d in chosen)


def leaves_of(tree: Any) -> Iterator[Any]:
    """Yield what containers and dataclasses hold; PyTorch takes most dataclasses for leaves."""
    for leaf in tree_leaves(tree):
        if is_dataclass(leaf) and not isinstance(leaf, type):
            yield from leaves_of([getattr(leaf, part.name) for part in fields(leaf)])
        else:
            yield leaf


class _Watch(TorchFunctionMode):
    """Follows channels, which are dimension 1, from what makes them to all that reads them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._names = {module: name for name, module in model.named_modules()}
        self._untouchable = shared_parameters(model)
        self._followed: dict[int, tuple[Tensor, _Channels]] = {}  # holds the tensors, so that an id stays theirs
        self._made: dict[nn.Module, _Channels] = {}
        self._read: dict[nn.Module, _Channels] = {}
        self._inside = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self._inside or not self._followed:
            return result
        # What returns no tensor asks for a shape or so; assigning to a part of one returns nothing.
        if func is not Tensor.__setitem__ and not any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
            return result
        given = [found for leaf in tree_leaves((args, kwargs)) if (found := self._of(leaf)) is not None]
        if given and not (isinstance(result, Tensor) and self._passes(func, args, kwargs, given, result)):
            self.fix((args, kwargs))
            self.fix(result)  # which may be what was given
        return result

    def _passes(self, func: Any, args: Any, kwargs: Any, given: list[_Channels], result: Tensor) -> bool:
        first = args[0] if args else kwargs.get("input")
        if not isinstance(first, Tensor) or self._of(first) is None:
            return False
        if func in _SUMS:
            if len(args) != 2 or kwargs or len(given) != 2 or any(leaf.shape != result.shape for leaf in args):
                return False
            given[0].join(given[1])
            given[0].root().combined = True
        elif func in _POOLS or (func in _MEANS and _spares_channels(first.dim(), *args[1:], **kwargs)):
            if result.dim() < 2 or result.shape[:2] != first.shape[:2]:
                return False
            given[0].root().combined = True
        else:
            ceiling = _CLAMPS[func](*args, **kwargs) if func in _CLAMPS else None
            if ceiling is None or len(given) != 1:
                return False
            given[0].root().ceiling = min(given[0].root().ceiling, ceiling)
        self._followed[id(result)] = (result, given[0].root())
        return True

    def _of(self, value: Any) -> _Channels | None:
        found = self._followed.get(id(value))
        return None if found is None else found[1].root()

    def fix(self, tree: Any) -> None:
        """See that something reads tensors that would notice if they were multiplied."""
        for leaf in leaves_of(tree):
            channels = self._of(leaf)
            if channels is not None:
                channels.fixed = True

    def returned(self, output: Any) -> None:
        """See that what a forward returns must stay: all there is, if that holds something that cannot be looked at."""
        known = (Tensor, int, float, complex, str, type(None))
        seen = all(isinstance(leaf, known) for leaf in leaves_of(output))
        self.fix(output if seen else [tensor for tensor, _ in self._followed.values()])

    def begin(self) -> None:
        """Forget the tensors of the forward before."""
        self._followed.clear()

    def module_starts(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not self._inside:
            x = args[0] if args else kwargs.get("input")
            channels = self._of(x)
            if isinstance(module, QATLayer) and channels is not None and _reads(module, x, channels.count):
                channels.readers[self._names[module]] = module
                self._read.setdefault(module, channels).join(channels)
                self.fix((args[1:], {key: value for key, value in kwargs.items() if value is not x}))
            else:
                self.fix((args, kwargs))
                if isinstance(module, QATLayer) and module in self._read:
                    self._read[module].root().fixed = True  # once it got these channels, once others
                elif isinstance(module, QATLayer):
                    self._read[module] = _Channels(0, fixed=True)
        self._inside += 1

    def module_done(self, module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
        self._inside -= 1
        if self._inside or not isinstance(output, Tensor) or output.dim() < 2 or not self._makes(module, output):
            return
        made = self._made.setdefault(module, _Channels(output.shape[1], {module: self._names[module]}))
        self._followed[id(output)] = (output, made.root())

    def _makes(self, module: nn.Module, output: Tensor) -> bool:
        weight = slot_of(module, "weight")
        slots = [slot for slot in (weight, slot_of(module, "bias")) if slot is not None]
        if weight is None or any(id(slot.parameter) in self._untouchable for slot in slots):
            return False
        if isinstance(module, QATLayer):
            fmt = module.weight_quantizer.format
            if (
                not _is_plain(module)
                or not rows_are_independent(fmt, module.weight.shape)
                or given_grid(module)[0] is not None
            ):
                return False
            if output.dim() != (2 + len(module.kernel_size) if isinstance(module, _ConvNd) else 2):
                return False
        return bool(output.shape[1] == weight.value.shape[0])

    def groups(self) -> list[ChannelGroup]:
        """Return what was found, in the order in which channels were made."""
        found = []
        for channels in dict.fromkeys(made.root() for made in self._made.values()):
            # Of sums and means it is not known how far what went into them was from the ceiling.
            unknown = channels.combined and channels.ceiling < math.inf
            untouched = all(self._untouchable.isdisjoint(_weights(layer)) for layer in channels.readers.values())
            if channels.readers and not channels.fixed and not unknown and untouched:
                sources = tuple(Source(name, module) for module, name in channels.sources.items())
                found.append(ChannelGroup(sources, dict(channels.readers), channels.count, channels.ceiling))
        return found


def _weights(layer: QATLayer) -> set[int]:
    return {id(parameter) for parameter in layer.weight_parameters()}


def _is_plain(layer: nn.Module) -> bool:
    """Return whether a layer multiplies its input by its weight as PyTorch's own class does."""
    kind = float_type(layer)
    base = supported_class(kind)
    if (
        not isinstance(layer, (nn.Linear, _ConvNd))
        or isinstance(layer, _ConvTransposeNd)
        or slot_of(layer, "weight") is None
    ):
        return False
    quantizer: Any = layer.weight_quantizer
    arranges = quantizer.input_order is not None or quantizer.input_factor is not None
    return base is not None and kind.forward is base.forward and not arranges


def _reads(layer: QATLayer, x: Tensor, count: int) -> bool:
    """Return whether the columns of ``layer`` can be multiplied for the ``count`` channels of ``x``."""
    if not _is_plain(layer) or given_grid(layer)[0] is not None:
        return False
    if isinstance(layer, _ConvNd):
        return x.dim() == 2 + len(layer.kernel_size) and layer.in_channels == count
    return x.dim() == 2 and isinstance(layer, nn.Linear) and layer.in_features == count


class ChannelWatch:
    """Finds the groups of channels of a prepared ``model`` from the forward passes that it is told of."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self._watch = model, _Watch(model)

    @contextlib.contextmanager
    def forward(self) -> Iterator[Callable[[Any], None]]:
        """Look at one forward pass, in evaluation mode; what is yielded is to be told what the pass returns."""
        watch = self._watch
        watch.begin()
        handles = []
        for module in self._model.modules():
            if isinstance(module, (QATLayer, _BatchNorm)):
                handles.append(module.register_forward_pre_hook(watch.module_starts, prepend=True, with_kwargs=True))
                handles.append(module.register_forward_hook(watch.module_done, with_kwargs=True, always_call=True))
        handles.append(self._model.register_forward_hook(lambda _module, _args, output: watch.returned(output)))
        try:
            with watch:
                yield watch.returned
        finally:
            for handle in handles:
                handle.remove()
            watch.begin()

    def groups(self) -> list[ChannelGroup]:
        """Return those that every forward pass so far allows."""
        return self._watch.groups()

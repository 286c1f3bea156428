"""Watching layers while a model runs: which share an input, in which order they come, and what their inputs are."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor, nn
from torch import distributed as dist
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from lightning_qat.ptq.statistics import InputStatistics, StatisticsSum, input_geometry
from lightning_qat.transforms.padding import Padding

#: Runs one batch through a part of a model.
Run = Callable[[], object]

ValueT = TypeVar("ValueT")


class Reached(Exception):  # noqa: N818 - it is no error
    """Ends a forward early: everything that was to be seen was."""


class _SharingBroken(Exception):  # noqa: N818
    """A layer that had the input of others in the first batch has one of its own in a later one."""


@dataclass(frozen=True)
class SharedInput:
    """Layers that are called with the very same tensors.

    Args:
        layers: their names, in the order of their calls.
        calls: how often each is called in one forward.
    """

    layers: tuple[str, ...]
    calls: int = 1


@dataclass
class _Tokens:
    """A number for each tensor that is alive, another one after it was changed in place."""

    known: Any = field(default_factory=WeakIdKeyDictionary)
    made: int = 0

    def of(self, tensor: Tensor) -> tuple[int, int]:
        # By identity, and no longer than the tensor lives: a new one at the same address gets a new number.
        if tensor not in self.known:
            self.made += 1
            self.known[tensor] = self.made
        return self.known[tensor], tensor._version


def _input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return what a layer is called with: the first floating tensor."""
    leaves = tree_leaves((args, kwargs))
    return next((leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()), None)


@contextlib.contextmanager
def _seen(layers: Mapping[str, nn.Module], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Have ``see(name, input)`` called before each call of one of ``layers``."""

    def hook_of(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = _input_of(args, kwargs)
            if x is not None:
                see(name, x)

        return hook

    handles = [layer.register_forward_pre_hook(hook_of(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def run_until_reached(run: Run) -> None:
    """Run a batch to where a hook ends it."""
    with contextlib.suppress(Reached):
        run()


def find_shared_inputs(layers: Mapping[str, nn.Module], run: Run, others: Iterable[Run] = ()) -> list[SharedInput]:
    """Return which of ``layers`` share their inputs in one forward, in the order of their first calls.

    Args:
        layers: by name.
        run: runs the first batch.
        others: run further ones, as long as there are layers that none has called: an expert gets few of the tokens.

    Returns:
        Layers that are never called are in none.
    """
    found = _shared_in_one(layers, run)
    known = {name for each in found for name in each.layers}
    others = iter(others)
    while len(known) < len(layers) and (other := next(others, None)) is not None:
        place = 0
        for each in _shared_in_one(layers, other):  # each goes behind what this batch calls before it
            late = tuple(name for name in each.layers if name not in known)
            if late:
                found.insert(place, SharedInput(late, each.calls))
                place += 1
            else:
                place = next(i for i, old in enumerate(found) if each.layers[0] in old.layers) + 1
        known = {name for each in found for name in each.layers}
    return found


def _shared_in_one(layers: Mapping[str, nn.Module], run: Run) -> list[SharedInput]:
    tokens = _Tokens()
    calls: dict[str, list[tuple[int, int]]] = {}

    def see(name: str, x: Tensor) -> None:
        calls.setdefault(name, []).append(tokens.of(x))

    with _seen(layers, see):
        run_until_reached(run)
    found: dict[tuple[Any, ...], list[str]] = {}
    for name, inputs in calls.items():
        # Layers of another geometry (a convolution beside a 1x1 one) look at the same input in another way.
        alike = (*inputs, _geometry(layers[name]))
        found.setdefault(alike, []).append(name)
    return [SharedInput(tuple(names), len(calls[names[0]])) for names in found.values()]


def _geometry(layer: nn.Module) -> tuple[Any, ...]:
    names = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    return (input_geometry(layer), *(getattr(layer, name, None) for name in names))


def gather_statistics(
    layers: Mapping[str, nn.Module],
    shared: Iterable[SharedInput],
    runs: Callable[[], Iterable[Run]],
    *,
    stop: bool = False,
    across_ranks: bool = False,
    padding: Padding | None = None,
) -> dict[str, InputStatistics]:
    """Return the statistics of the inputs of layers, from one pass over all batches.

    Args:
        layers: by name.
        shared: which of them to watch; those that share an input get the same object. That they do is checked on
            every batch; a layer that does not after all gets statistics of its own, from another pass.
        runs: called for each pass; returns what runs each batch.
        stop: end each forward as soon as all layers are called.
        across_ranks: add up the sums of all ranks; each calls this.
        padding: of the batch that runs: its rows are left out. None lets all count.

    Returns:
        Name -> statistics; layers that were never called, or have no Gram matrix, are missing.
    """
    sharing = [s for s in shared if input_geometry(layers[s.layers[0]]) is not None]
    while True:
        sums = {each.layers[0]: StatisticsSum(layers[each.layers[0]], each.layers[0]) for each in sharing}
        watch = _Gathering(sharing, sums, padding, stop=stop)
        broken: _SharingBroken | None = None
        with _seen({name: layers[name] for each in sharing for name in each.layers}, watch.see):
            try:
                for run in runs():
                    watch.begin()
                    run_until_reached(run)
                    watch.end()
            except _SharingBroken as error:
                broken = error
        if across_ranks and any(of_every_rank(broken is not None)):
            broken = broken or _SharingBroken()
            sharing = _all_alone(sharing)
        elif broken is not None:
            sharing = _apart(sharing, str(broken))
        if broken is None:
            break
    if across_ranks:
        for total in sums.values():
            total.reduce()
    found: dict[str, InputStatistics] = {}
    for each in sharing:
        result = sums[each.layers[0]].result()
        if result is not None:
            found |= dict.fromkeys(each.layers, result)
    return found


def of_every_rank(value: ValueT) -> list[ValueT]:
    """Return what each rank of ``torch.distributed`` says; every rank calls this."""
    said: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(said, value)
    return said


def agreed(sharing: list[SharedInput]) -> list[SharedInput]:
    """Return what holds on all ranks: each layer alone where they saw different ones, as their batches may reach."""
    ranks = of_every_rank(sharing)
    if all(rank == ranks[0] for rank in ranks):
        return sharing
    calls: dict[str, int] = {}
    for each in (each for rank in ranks for each in rank):
        for name in each.layers:
            calls[name] = max(calls.get(name, 0), each.calls)
    return [SharedInput((name,), count) for name, count in calls.items()]


def _apart(sharing: list[SharedInput], name: str) -> list[SharedInput]:
    """Return the same with layer ``name`` on its own."""
    result = []
    for each in sharing:
        rest = tuple(other for other in each.layers if other != name)
        result += [SharedInput(part, each.calls) for part in (rest, (name,) if rest != each.layers else ()) if part]
    return result


def _all_alone(sharing: list[SharedInput]) -> list[SharedInput]:
    return [SharedInput((name,), each.calls) for each in sharing for name in each.layers]


class _Gathering:
    """One pass: the first layer of each group adds its inputs up, the others are checked to have the same ones."""

    def __init__(
        self, sharing: list[SharedInput], sums: dict[str, StatisticsSum], padding: Padding | None, *, stop: bool
    ) -> None:
        self._padding = padding
        self._leader = {name: each.layers[0] for each in sharing for name in each.layers}
        self._sums = sums
        self._left: set[str] = set()
        # Only layers called once: of others it is not known which call is the last.
        self._stops = stop and all(each.calls == 1 for each in sharing)
        self._calls: dict[str, list[tuple[int, int]]] = {}
        self._tokens = _Tokens()

    def begin(self) -> None:
        self._calls = {name: [] for name in self._leader}
        self._left = set(self._leader)

    def see(self, name: str, x: Tensor) -> None:
        self._calls[name].append(self._tokens.of(x))
        if name in self._sums:
            self._sums[name].update(x if self._padding is None else self._padding.counted(name, x))
        self._left.discard(name)
        if self._stops and not self._left:
            raise Reached

    def end(self) -> None:
        for name, leader in self._leader.items():
            if self._calls[name] != self._calls[leader]:
                raise _SharingBroken(name)

"""Where the scale of a group's inputs can go: into the module that makes them, found by experiment.

A candidate is not judged by its name or class but tried: its channels are multiplied by powers of two. If every input
channel of the group comes out multiplied by the power of one channel, that channel is its source (with grouped-query
attention several inputs have the same one); and if dividing the columns of the group's weights by the same powers
brings the block's output back, nobody else reads what was multiplied.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_qat.ptq.channels import Source, has_channels, multiplied, multiply_columns, slot_of
from lightning_qat.ptq.probing import LEVELS, agree, channels_told, factor_of, levels_between
from lightning_qat.ptq.watch import Reached, Run, run_until_reached
from lightning_qat.transforms.phase import float_forward

#: Most modules before a group that are tried.
_MOST_TRIED = 8
#: Units in the last place that the output of a whole block may differ by.
_OUTPUT_UNITS = 256


@dataclass(frozen=True, eq=False)
class Fold:
    """Where the scale of layers that share an input goes.

    Args:
        layers: their names.
        source: what is divided by the scale; None if nothing can be.
        channels: int64 ``[K]``: the channel of the source that each input channel is made of.
        reason: why there is no source.
    """

    layers: tuple[str, ...]
    source: Source | None = None
    channels: Tensor | None = None
    reason: str = ""

    @property
    def tied(self) -> Tensor | None:
        """int64 ``[K]``: input channels with the same number come from one channel; None if none do."""
        if self.channels is None:
            return None
        unique, index = torch.unique(self.channels, return_inverse=True)
        return index if len(unique) < len(self.channels) else None

    def factor_of_source(self, factor: Tensor) -> Tensor:
        """Return what the source's channels get where input channels get ``factor``, ``[K]``; 1 for all others."""
        if self.source is None or self.channels is None:
            raise ValueError(f"the scale of {', '.join(map(repr, self.layers))} has nowhere to go: {self.reason}")
        whole = torch.ones(self.source.channels, device=factor.device)
        return whole.scatter_(0, self.channels.to(factor.device), factor.float())


@torch.no_grad()
def find_folds(
    block: nn.Module,
    layers: Mapping[str, nn.Module],
    groups: Sequence[Sequence[str]],
    run: Run,
    *,
    untouchable: frozenset[int] = frozenset(),
    allowed: Callable[[nn.Module], bool] | None = None,
    like: Sequence[Fold] = (),
) -> list[Fold]:
    """Return where the scale of each group can go.

    The block runs once, once or more for every module that is tried and once for each that may do; where ``like``
    holds for this block too, twice in all. Its parameters are the same afterwards.

    Args:
        block: what holds the layers and what may take in their scales; in evaluation mode.
        layers: by name, as the groups call them.
        groups: names of layers that share an input.
        run: runs ``block`` on a batch and returns its output, the same each time.
        untouchable: ids of parameters that must stay, see :func:`lightning_qat.ptq.channels.shared_parameters`.
        allowed: says whether a module may take in a scale.
        like: what was found for a block built alike.

    Returns:
        One for each group, in order.
    """
    with float_forward(block):
        declined = {tuple(group): declined_scale(group, layers, untouchable) for group in groups}
        open_groups = [group for group, reason in declined.items() if not reason]
        if not open_groups:
            return [Fold(tuple(group), reason=declined[tuple(group)]) for group in groups]
        candidates = {
            module: Source(name, module)
            for name, module in block.named_modules()
            if has_channels(module) and (allowed is None or allowed(module))
        }
        for module, source in list(candidates.items()):
            if untouchable.intersection(id(slot.parameter) for slot in source.slots.values()):
                del candidates[module]
        trial = _Trial(layers, candidates, run)
        found = trial.adopt(open_groups, like)
        for group in open_groups:
            if group not in found:
                found[group] = trial.find(group)
        return [found.get(tuple(g)) or Fold(tuple(g), reason=declined[tuple(g)]) for g in groups]


@torch.no_grad()
def still_holding(block: nn.Module, layers: Mapping[str, nn.Module], folds: Sequence[Fold], run: Run) -> list[Fold]:
    """Return ``folds`` without a source where ``run``, of another batch, takes what it makes to someone else.

    Args:
        block: as :func:`find_folds` takes it.
        layers: likewise.
        folds: that were found with the first batch.
        run: runs ``block`` on the other one.
    """
    open_folds = [fold for fold in folds if fold.source is not None]
    if not open_folds:
        return list(folds)
    with float_forward(block):
        trial = _Trial(layers, {}, run)
        if trial.holds(open_folds):
            return list(folds)
        left = []
        for fold in folds:
            if fold.source is not None and not trial.holds([fold]):
                fold = Fold(fold.layers, reason=f"{fold.source.name!r}, in another batch, is read by others too")
            left.append(fold)
        return left


def declined_scale(group: Sequence[str], layers: Mapping[str, nn.Module], untouchable: frozenset[int]) -> str:
    """Return why the inputs of a group cannot be scaled at all, or nothing."""
    for name in group:
        layer = layers[name]
        if not isinstance(layer, nn.Linear):
            return f"{name!r} is a {type(layer).__name__}; input channels of Linears are scaled"
        weight = slot_of(layer, "weight")
        if weight is None:
            return f"the weight of {name!r} is computed (pruned or parametrized)"
        if id(weight.parameter) in untouchable:
            return f"the weight of {name!r} is used in several places"
    return ""


class _Trial:
    """Tries candidates for the groups of one block.

    Args:
        layers: by name.
        candidates: what may take in a scale.
        run: runs the block.
    """

    def __init__(self, layers: Mapping[str, nn.Module], candidates: Mapping[nn.Module, Source], run: Run) -> None:
        self._layers, self._candidates, self._run = layers, candidates, run
        self._generator = torch.Generator().manual_seed(0)
        self._order: list[nn.Module] = []
        self._inputs: dict[nn.Module, list[Tensor]] = {}
        readers = set(layers.values())

        def see(module: nn.Module, x: Tensor) -> None:
            self._order.append(module)
            if module in readers:
                self._inputs.setdefault(module, []).append(x.clone())

        with _hooked({*candidates, *readers}, see):
            self._output = _floating(run())

    def adopt(self, groups: Sequence[tuple[str, ...]], like: Sequence[Fold]) -> dict[tuple[str, ...], Fold]:
        """Return the folds of a block built alike if, all tried together, they hold here."""
        by_name = {source.name: source for source in self._candidates.values()}
        known = {_ends(fold.layers): fold for fold in like if fold.source is not None}
        folds = []
        for group in groups:
            fold = known.get(_ends(group))
            if fold is None or fold.source is None or fold.channels is None:
                continue
            source = by_name.get(fold.source.name)
            # The other block's source may be packed by now: only what was written down of it is looked at.
            if source is None or self._size(group) != len(fold.channels) or fold.channels.max() >= source.channels:
                continue
            folds.append(Fold(group, replace(source, offset=fold.source.offset), fold.channels))
        return {fold.layers: fold for fold in folds} if folds and self.holds(folds) else {}

    def find(self, group: tuple[str, ...]) -> Fold:
        """Return where the scale of ``group`` goes."""
        if self._layers[group[0]] not in self._inputs:
            return Fold(group, reason="it was not called")
        size, reason = self._size(group), ""
        for source in self._before(group):
            vector = source.slots["weight"].value.dim() == 1
            for tried in (source, replace(source, offset=1.0)) if vector else (source,):
                told = False
                for channels in self._channels(tried, group, size):
                    fold, told = Fold(group, tried, channels), True
                    if self.holds([fold]):
                        return fold
                if told:
                    reason = reason or f"{source.name!r}, which makes its inputs, is read by others too"
                    break
        return Fold(group, reason=reason or "no module before it multiplies its inputs one by one")

    def _size(self, group: Sequence[str]) -> int:
        weight: Any = self._layers[group[0]].weight
        return int(weight.shape[1])

    def _before(self, group: Sequence[str]) -> list[Source]:
        """Return the candidates that were called before the group, the latest first."""
        own = [self._layers[name] for name in group]
        first = min(self._order.index(layer) for layer in own if layer in self._order)
        called = dict.fromkeys(module for module in reversed(self._order[:first]) if module not in own)
        return [self._candidates[module] for module in called if module in self._candidates][:_MOST_TRIED]

    def _channels(self, source: Source, group: Sequence[str], size: int) -> Iterator[Tensor]:
        """Yield the channels that may make each input channel of the group; a wrong one may look right by chance."""
        for start, stop in _ranges(source, size):

            def probe(levels: Tensor, start: int = start, stop: int = stop) -> Tensor | None:
                factor = torch.ones(source.channels)
                factor[start:stop] = factor_of(levels)
                return self._levels(source, factor, self._layers[group[0]])

            channels = channels_told(stop - start, size, probe)
            if channels is not None:
                yield channels + start

    def _levels(self, source: Source, factor: Tensor, reader: nn.Module) -> Tensor | None:
        """Return the levels of the inputs of ``reader`` where those of ``source`` are multiplied by ``factor``."""
        seen: list[Tensor] = []

        def see(_module: nn.Module, x: Tensor) -> None:
            seen.append(x.clone())
            if len(seen) == len(self._inputs[reader]):
                raise Reached

        with multiplied([(source, factor)]), _hooked([reader], see):
            run_until_reached(self._run)
        return levels_between(self._inputs[reader], seen)

    def holds(self, folds: Sequence[Fold]) -> bool:
        """Return whether the block's output stays if sources are multiplied and columns of their readers divided."""
        sources, readers = [], []
        for fold in folds:
            tied = fold.tied
            # With 1 taken off and few digits kept, a small weight would lose most of its own: it is made larger only.
            low = LEVELS // 2 if fold.source is not None and fold.source.offset else 0
            levels = torch.randint(low, LEVELS, (self._size(fold.layers),), generator=self._generator)
            factor = factor_of(levels if tied is None else levels[tied])
            if fold.source is not None:
                sources.append((fold.source, fold.factor_of_source(factor)))
            readers += [(self._layers[name], factor.reciprocal()) for name in fold.layers]
        with multiplied(sources, readers):
            output = _floating(self._run())
        return len(output) == len(self._output) and all(
            agree(actual, expected, _OUTPUT_UNITS) for actual, expected in zip(output, self._output, strict=True)
        )


def _ranges(source: Source, size: int) -> list[tuple[int, int]]:
    """Return the channels that may make all ``size`` inputs: all, or a part of a fused projection."""
    count = source.channels
    if count <= size:
        return [(0, count)] if size % count == 0 else []
    if source.slots["weight"].value.dim() == 1:
        return []
    found = [(count - size, count)] if count % size == 0 else []
    rest, odd = divmod(count - size, 2)  # keys, and values, that have fewer heads than queries
    if not odd and rest < size and size % rest == 0:
        found.append((count - rest, count))
    return found + ([(0, size)] if count == 2 * size else [])


def _floating(output: Any) -> list[Tensor]:
    return [leaf.clone() for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _ends(names: Iterable[str]) -> tuple[str, ...]:
    """Return names without the number of their block."""
    return tuple(sorted(".".join(name.split(".")[-2:]) for name in names))


@contextlib.contextmanager
def _hooked(modules: Iterable[nn.Module], see: Callable[[nn.Module, Tensor], None]) -> Iterator[None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                see(module, leaf)
                return

    handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def apply_fold(fold: Fold, layers: Mapping[str, nn.Module], scales: Tensor) -> None:
    """Multiply the weights of a group's layers by ``scales``, ``[K]``, and divide their source by it.

    Parameters are replaced: whoever shares the old ones keeps them.

    Raises:
        ValueError: if the fold has no source, or scales of inputs that come from one channel differ.
    """
    factor = fold.factor_of_source(scales.float().reciprocal())
    channels: Any = fold.channels
    if fold.tied is not None and not torch.equal(factor[channels.to(factor.device)], scales.float().reciprocal()):
        raise ValueError(
            f"inputs of {fold.layers[0]!r} that come from one channel have different scales; search them with tied"
        )
    fold.source.multiply(factor)  # type: ignore[union-attr]
    for name in fold.layers:
        multiply_columns(layers[name], scales)

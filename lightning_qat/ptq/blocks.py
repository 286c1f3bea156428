"""The blocks of a model, and running one of them alone with what reached it in the whole model.

Which blocks follow each other is not guessed but watched: in a forward of the first batch, a block follows another
if what it gets is the very tensors that the other one returned, and nothing else but what the first block got.
"""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from lightning_qat.ptq.watch import Reached, Run, run_until_reached
from lightning_qat.transforms.padding import Padding


@dataclass(frozen=True, eq=False)
class Block:
    """A part of a model that is quantized as one.

    Args:
        name: of the module.
        module: what is called.
        layers: names of the layers in it that are quantized.
    """

    name: str
    module: nn.Module
    layers: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Segment:
    """Blocks of which each gets what the one before returned.

    Args:
        blocks: in the order they run.
        links: of each block, where each leaf of its arguments comes from.
        specs: how the leaves of each block make up its ``(args, kwargs)``.
    """

    blocks: tuple[Block, ...]
    links: tuple[tuple[Link, ...], ...]
    specs: tuple[TreeSpec, ...]


@dataclass(frozen=True, eq=False)
class Link:
    """Where a leaf of a block's arguments comes from.

    Args:
        source: ``"output"`` of the block before, ``"first"``: what the first block of the segment got, or ``"value"``.
        index: of the leaf there.
        value: that every batch has.
    """

    source: str
    index: int = 0
    value: Any = None


@dataclass(frozen=True, eq=False)
class Course:
    """How a forward of a model goes.

    Args:
        segments: its blocks, in the order they run.
        outside: what else is quantized: names before each segment, and after the last.
        unreached: layers that the watched batch never came to.
    """

    segments: tuple[Segment, ...]
    outside: tuple[tuple[str, ...], ...]
    unreached: tuple[str, ...]


def find_blocks(model: nn.Module, layers: Mapping[str, nn.Module]) -> list[Block]:
    """Return the repeated blocks of ``model`` that hold ``layers``: the items of its outermost lists of such.

    A list counts if at least two of its items are of one class and hold layers inside.
    """
    found: list[Block] = []
    taken: list[str] = []
    for name, module in model.named_modules():
        lists = isinstance(module, (nn.ModuleList, nn.Sequential))
        if not lists or any(_inside(name, container) for container in taken):
            continue
        items = []
        for key, item in module.named_children():
            path = f"{name}.{key}" if name else key
            own = tuple(layer for layer in layers if _inside(layer, path) and layer != path)
            items.append(Block(path, item, own))
        kinds = Counter(type(block.module) for block in items if block.layers)
        wrapped = isinstance(module, nn.ModuleList)  # whose items may be anything; of a Sequential all are called
        if kinds and kinds.most_common(1)[0][1] >= 2 and not any(block.name in layers for block in items):
            taken.append(name)
            found += [block for block in items if block.layers or not wrapped]
    return found


def _inside(name: str, container: str) -> bool:
    return not container or name == container or name.startswith(f"{container}.")


@dataclass
class _Call:
    """What one block got and returned; the tensors are held, so that identity means something."""

    leaves: list[Any]
    spec: TreeSpec
    outputs: list[Any]
    versions: list[int]


def watch_course(model: nn.Module, layers: Mapping[str, nn.Module], blocks: Sequence[Block], run: Run) -> Course:
    """Return how one forward goes through ``blocks`` and the ``layers`` outside of them.

    Blocks that are called several times or not at all are no blocks: their layers count as outside.
    """
    blocks, calls, order = _usable(model, layers, blocks, run)
    if not blocks:
        called = tuple(name for name in order if name in layers)
        return Course((), (called,), tuple(n for n in layers if n not in called))
    by_name = {block.name: block for block in blocks}
    running = [by_name[name] for name in order if name in by_name]
    segments: list[Segment] = []
    starts: list[str] = []
    for block in running:
        call = calls[block.name]
        linked = _links(calls, segments[-1], call) if segments else None
        if linked is None:
            links = tuple(Link("first", i) for i in range(len(call.leaves)))
            segments.append(Segment((block,), (links,), (call.spec,)))
            starts.append(block.name)
        else:
            last = segments[-1]
            segments[-1] = Segment((*last.blocks, block), (*last.links, linked), (*last.specs, call.spec))
    outside: list[list[str]] = [[] for _ in range(len(starts) + 1)]
    inside = {name for block in running for name in block.layers}
    place = {}
    at = 0
    for name in order:  # of several calls of a layer, the last counts
        at += name in starts
        if name in layers and name not in inside:
            place[name] = at
    for name, index in place.items():
        outside[index].append(name)
    reached = inside | place.keys()
    return Course(tuple(segments), tuple(map(tuple, outside)), tuple(n for n in layers if n not in reached))


def _usable(
    model: nn.Module, layers: Mapping[str, nn.Module], blocks: Sequence[Block], run: Run
) -> tuple[list[Block], dict[str, _Call], list[str]]:
    """Return the blocks that are called once, with what they were called, and the order of all calls."""
    order: list[str] = []
    calls: dict[str, _Call] = {}
    handles = []

    def entered(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            order.append(name)
            leaves, spec = tree_flatten((args, kwargs))
            calls[name] = _Call(leaves, spec, [], [])

        return hook

    def left(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            calls[name].outputs = tree_flatten(output)[0]
            calls[name].versions = [_version(leaf) for leaf in calls[name].outputs]

        return hook

    for block in blocks:
        handles.append(block.module.register_forward_pre_hook(entered(block.name), with_kwargs=True))
        handles.append(block.module.register_forward_hook(left(block.name)))
    for name, layer in layers.items():
        handles.append(layer.register_forward_pre_hook(lambda *_, name=name: order.append(name)))
    try:
        run_until_reached(run)
    finally:
        for handle in handles:
            handle.remove()
    counts = Counter(order)
    return [block for block in blocks if counts[block.name] == 1], calls, order


def _version(leaf: Any) -> int:
    return leaf._version if isinstance(leaf, Tensor) else 0


def _links(calls: Mapping[str, _Call], segment: Segment, call: _Call) -> tuple[Link, ...] | None:
    """Return where the leaves of ``call`` come from if its block follows the segment's last one, else None."""
    first, before = calls[segment.blocks[0].name], calls[segment.blocks[-1].name]
    outputs = {
        id(leaf): (index, version)
        for index, (leaf, version) in enumerate(zip(before.outputs, before.versions, strict=True))
        if isinstance(leaf, Tensor)
    }
    constant = {id(leaf): index for index, leaf in enumerate(first.leaves) if isinstance(leaf, Tensor)}
    links: list[Link] = []
    for index, leaf in enumerate(call.leaves):
        if not isinstance(leaf, Tensor):
            same = index < len(first.leaves) and type(first.leaves[index]) is type(leaf) and call.spec == first.spec
            plain = isinstance(leaf, (int, float, str, bool, type(None)))
            follows = same and (leaf is first.leaves[index] or (plain and leaf == first.leaves[index]))
            links.append(Link("first", index) if follows else Link("value", value=leaf))
        elif id(leaf) in outputs:
            links.append(Link("output", outputs[id(leaf)][0]))
        elif id(leaf) in constant:
            links.append(Link("first", constant[id(leaf)]))
        else:
            return None
    return tuple(links) if any(link.source == "output" for link in links) else None


class SegmentRunner:
    """Runs the blocks of a segment one after the other on all batches; keeps only what is between two of them.

    Args:
        segment: whose blocks to run.
        runs: run each batch through the whole model; those that never come to the segment are left out.
        padding: knows that of the batch that runs, here as there.
    """

    def __init__(self, segment: Segment, runs: Iterable[Run], padding: Padding | None = None) -> None:
        self.segment, self._padding = segment, padding
        self._first: list[list[Any]] = []
        self._masks: list[dict[str, Tensor]] = []
        for run in runs:
            leaves = _captured(segment.blocks[0], segment.specs[0], run)
            if leaves is not None:
                self._first.append(leaves)
                self._masks.append({} if padding is None else padding.masks)
        kept = {link.index for links in segment.links[1:] for link in links if link.source == "first"}
        self._outputs: list[dict[int, Any]] = [{} for _ in self._first]
        self._kept = kept
        self._at = 0

    def runs(self) -> Iterator[Run]:
        """Yield what runs the block that it stands at, for each batch, as often as it likes."""
        for batch in range(len(self._first)):
            yield partial(self._run, batch)

    def _run(self, batch: int, *, last: bool = False) -> Any:
        """Run it; what it writes into objects that it is given, such as a cache, stays if it is the ``last`` time."""
        if self._padding is not None:
            self._padding.masks = self._masks[batch]
        args, kwargs = tree_unflatten(self._leaves(batch, last), self.segment.specs[self._at])
        return self.segment.blocks[self._at].module(*args, **kwargs)

    def _leaves(self, batch: int, last: bool) -> list[Any]:
        first, outputs, leaves = self._first[batch], self._outputs[batch], []
        for link in self.segment.links[self._at]:
            value = link.value
            if link.source == "output":
                value = outputs[link.index].clone()  # a block may change what it is given
            elif link.source == "first":
                value = first[link.index]
                if isinstance(value, Tensor):
                    value = value.clone() if self._at == 0 else value
                elif not last and not isinstance(value, nn.Module):
                    value = copy.deepcopy(value)
            leaves.append(value)
        return leaves

    def advance(self) -> None:
        """Run the block that it stands at on all batches and go to the next one."""
        following = self.segment.links[self._at + 1]
        needed = {link.index for link in following if link.source == "output"}
        for batch in range(len(self._first)):
            outputs = tree_flatten(self._run(batch, last=True))[0]
            self._outputs[batch] = {index: outputs[index] for index in needed}
            if self._at == 0:
                self._first[batch] = [v if i in self._kept else None for i, v in enumerate(self._first[batch])]
        self._at += 1


def _captured(block: Block, spec: TreeSpec, run: Run) -> list[Any] | None:
    """Return the leaves of what ``block`` is called with when ``run`` gets there; None if it does not."""
    found: list[list[Any]] = []

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        leaves, own = tree_flatten((args, kwargs))
        if own != spec:
            raise ValueError(
                f"a calibration batch calls the block {block.name!r} with other arguments than the first batch does; "
                "give batches of one kind, or use order='one_pass'"
            )
        found.append(leaves)
        raise Reached

    handle = block.module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        run_until_reached(run)
    finally:
        handle.remove()
    return found[0] if found else None


@contextlib.contextmanager
def stopping_at(module: nn.Module | None) -> Iterator[None]:
    """End every forward inside where it reaches ``module``."""
    if module is None:
        yield
        return

    def hook(*_: Any) -> None:
        raise Reached

    handle = module.register_forward_pre_hook(hook, prepend=True)  # before its weights are read, if they are in files
    try:
        yield
    finally:
        handle.remove()

"""Which rows of a layer's input are padding: positions whose ``attention_mask`` is 0.

Shapes alone do not say it: an encoder and a decoder may be as long as each other, a picture may have as many patches as
a sentence has tokens, features may be as many as positions. So it is tried, once, with a batch that has padding: other
tokens are put where the mask is 0, and a layer whose input then changes in the rows of these positions, and in no
other, is known. Everything counts in all others.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.utils._pytree import tree_leaves

from lightning_qat.transforms.calibrated_mode import as_calibrated
from lightning_qat.transforms.phase import float_forward
from lightning_qat.transforms.prepare import qat_layers
from lightning_qat.transforms.ranges import static_quantizers

logger = logging.getLogger(__name__)

#: Mask -> what it belongs to, of which a batch has one.
_CONTENTS = {
    "attention_mask": ("input_ids", "inputs_embeds"),
    "decoder_attention_mask": ("decoder_input_ids", "decoder_inputs_embeds"),
}
#: Numbers that stand for a row: its products with as many vectors.
_PRODUCTS = 8
#: Numbers that are widened at once: logits of a large vocabulary are the largest tensor there is.
_PIECE = 2**22
#: Padded rows have to change this many times as much as any other one, which may round otherwise: products of experts
#: have other sizes where other tokens are routed.
_GAP = 64.0


@dataclass(frozen=True, eq=False)
class _Rows:
    """What stands for the rows of a tensor.

    Args:
        leading: the dimensions that number them.
        products: float32 or wider, ``[rows, _PRODUCTS]``.
        empty: rows of zeros, or of NaN, as attention gives them that may look at nothing; bool ``[rows]``.
    """

    leading: tuple[int, ...]
    products: Tensor
    empty: Tensor


@dataclass(frozen=True)
class _Place:
    """The mask of an input, and whether its first two dimensions are ``[length, batch]``."""

    mask: str
    length_first: bool


class Padding:
    """Runs batches through a prepared model, and knows which rows of the inputs of its Linears are padding.

    Args:
        model: prepared.
        forward: called as ``forward(model, batch)``.

    Attributes:
        masks: of the batch under way, which is the last one begun: name -> bool ``[batch, length]``, False where a
            position is padding. Masks without padding are left out. Whoever runs a part of the model again sets it.
    """

    def __init__(self, model: nn.Module, forward: Callable[[nn.Module, Any], Any]) -> None:
        self.model, self._forward = model, forward
        self.masks: dict[str, Tensor] = {}
        self._linears = {name: layer for name, layer in qat_layers(model) if isinstance(layer, nn.Linear)}
        self._devices = {p.device for p in model.parameters() if p.is_cuda}
        self._known: dict[str, _Place] = {}
        self._tried = False

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of a report should know."""
        if not self._tried:
            return ()
        known = len(self._linears.keys() & self._known.keys())
        return (f"padding is left out of the inputs of {known} of {len(self._linears)} Linears",)

    def run(self, batch: Any) -> Any:
        """Run ``batch`` and return the output; its masks are those of the batch under way from here on."""
        self.masks = _masks_of(batch)
        return self._call(batch)

    def _call(self, batch: Any) -> Any:
        """Run ``batch``, of which a dict may be taken apart, as by ``batch.pop("labels")``: it runs more than once."""
        return self._forward(self.model, copy.copy(batch) if isinstance(batch, MutableMapping) else batch)

    def rows(self, name: str, x: Tensor) -> Tensor | None:
        """Return which rows of ``x``, the input of layer ``name``, count: bool, in the shape of its leading dimensions.

        None is all of them: also where that is not known.
        """
        place = self._known.get(name)
        mask = None if place is None else self.masks.get(place.mask)
        if place is None or mask is None:
            return None
        mask = mask.T if place.length_first else mask
        if x.dim() < 2 or not _fits(_leading(x), mask):
            return None
        return (mask if x.dim() > 2 else mask.flatten()).to(x.device)

    def counted(self, name: str, x: Tensor) -> Tensor:
        """Return the rows of ``x`` that count; ``x`` itself where all do."""
        rows = self.rows(name, x)
        return x if rows is None else x[rows]

    def counted_outputs(self, output: Any) -> list[Tensor]:
        """Return the floating-point tensors of what :meth:`run` returned, without rows of padding."""
        return [self.counted(_output_name(i), x) for i, x in enumerate(output_tensors(output))]

    @contextlib.contextmanager
    def left_out(self) -> Iterator[None]:
        """Let calibration look at no padding inside."""
        samples = {
            name: layer.input_quantizer.samples
            for name, layer in qat_layers(self.model)
            if name in self._linears and layer.input_quantizer is not None
        }
        for name, each in samples.items():
            each.rows = partial(self.rows, name)
        try:
            yield
        finally:
            for each in samples.values():
                each.rows = None

    # --- finding out -------------------------------------------------------------------------------

    def look_at(self, batches: Sequence[Any], *, across_ranks: bool = False) -> None:
        """Find out from the first of ``batches`` that has padding."""
        if batches:
            batch = next((batch for batch in batches if _masks_of(batch)), batches[0])
            self.look(batch, across_ranks=across_ranks)

    @torch.no_grad()
    def look(self, batch: Any, *, across_ranks: bool = False) -> None:
        """Find out which inputs have rows of padding, once, where ``batch`` has padding.

        The model runs twice, in float; quantizers learn nothing.

        Args:
            batch: of calibration.
            across_ranks: every rank of ``torch.distributed`` calls this, and runs the model as often as the others.
        """
        masks = {} if self._tried else _masks_of(batch)
        names = sorted(_union(list(masks), across_ranks)) if not self._tried else []
        if not names:
            return
        self._tried = True
        found: dict[str, _Place | None] = {}
        with self._unnoticed():
            before = self._rows_of(batch)
            for name in names:
                after = self._rows_of_trial(batch, name, masks.get(name))
                for layer in before if name in masks else ():
                    place = _place_of(before[layer], after.get(layer, []), name, masks[name])
                    found[layer] = place or found.get(layer)
        told = _union(list(found.items()), across_ranks)
        denied = {layer for layer, place in told if place is None}
        self._known = {layer: place for layer, place in told if place is not None and layer not in denied}
        logger.info("%s", self.notes[0])

    @contextlib.contextmanager
    def _unnoticed(self) -> Iterator[None]:
        """Let the model run in float with nobody learning from it."""
        quantizers = [quantizer for quantizer in static_quantizers(self.model) if quantizer.calibrating]
        for quantizer in quantizers:
            quantizer.calibrating = False
        try:
            with float_forward(self.model), as_calibrated(self.model), torch.compiler.set_stance("force_eager"):
                yield
        finally:
            for quantizer in quantizers:
                quantizer.calibrating = True

    def _rows_of_trial(self, batch: Any, name: str, mask: Tensor | None) -> dict[str, list[_Rows | None]]:
        """Return what :meth:`_rows_of` does with other tokens in the padding; nothing where these are not taken."""
        try:
            return self._rows_of(_with_other_padding(batch, name, mask))
        except Exception as error:  # noqa: BLE001 - the user's model on tokens that we made up: anything may come of it
            told = f"{type(error).__name__}: {error}"
            logger.warning("padded positions count in calibration: with other tokens there the model raises %s", told)
            return {}

    def _rows_of(self, batch: Any) -> dict[str, list[_Rows | None]]:
        """Return what stands for the rows of the inputs of all calls, and of the outputs."""
        found: dict[str, list[_Rows | None]] = {}

        def hook_of(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
            def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                x = next(iter(output_tensors((args, kwargs))), None)
                found.setdefault(name, []).append(None if x is None else _told(x))

            return hook

        handles = [
            layer.register_forward_pre_hook(hook_of(name), with_kwargs=True) for name, layer in self._linears.items()
        ]
        try:
            with torch.random.fork_rng(self._devices):  # both times the same random numbers, and as if never drawn
                outputs = output_tensors(self._call(batch))
        finally:
            for handle in handles:
                handle.remove()
        return found | {_output_name(i): [_told(x)] for i, x in enumerate(outputs)}


def output_tensors(output: Any) -> list[Tensor]:
    """Return the floating-point tensors of what a forward returned."""
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _output_name(index: int) -> str:
    return f"<output {index}>"  # no layer is called so


def _union(own: list[Any], across_ranks: bool) -> list[Any]:
    """Return what any rank says, each once."""
    ranks: list[Any] = [own]
    if across_ranks:
        ranks = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, own)
    return list(dict.fromkeys(each for rank in ranks for each in rank))


def _masks_of(batch: Any) -> dict[str, Tensor]:
    """Return the masks of a batch that have padding and positions that are none: bool ``[batch, length]``."""
    found: dict[str, Tensor] = {}
    for name in _CONTENTS if isinstance(batch, Mapping) else ():
        mask, content = batch.get(name), _content_of(batch, name)
        if not isinstance(mask, Tensor) or content is None or mask.dim() != 2 or mask.is_floating_point():
            continue
        if batch[content].shape[:2] == mask.shape and bool(((mask == 0) | (mask == 1)).all()):
            counts = mask.bool()
            if not bool(counts.all()):
                found[name] = counts
    return found


def _content_of(batch: Mapping[str, Any], mask: str) -> str | None:
    """Return the name of the tokens, ``[batch, length]``, or vectors, ``[batch, length, features]``, of a mask."""
    ids, vectors = _CONTENTS[mask]
    for name, dims, floats in ((ids, 2, False), (vectors, 3, True)):
        x = batch.get(name)
        if isinstance(x, Tensor) and x.dim() == dims and x.is_floating_point() == floats:
            return name
    return None


def _with_other_padding(batch: Any, name: str, mask: Tensor | None) -> Any:
    """Return ``batch`` with other tokens in the padding; as it is where there is nothing to put there.

    They are tokens of the batch itself, of the rarest: any other one may be none that the model knows, and a frequent
    one may end sentences, or be a place that pictures are put in.
    """
    if mask is None or not isinstance(batch, MutableMapping) or not bool(mask.any()):
        return batch
    content: Any = _content_of(batch, name)
    old = batch[content]
    mask = mask.to(old.device)
    if old.dim() == 3:
        new = torch.where(mask.unsqueeze(-1), old, old[mask][0])
    else:
        known, counts = old[mask].unique(return_counts=True)
        rare = known[counts == counts.min()]
        token, other = rare[len(rare) // 2], (rare if len(rare) > 1 else known)[0]
        new = torch.where(mask, old, torch.where(old == token, other, token))
    twin = copy.copy(batch)
    twin[content] = new
    return twin


def _leading(x: Tensor) -> tuple[int, ...]:
    """Return the dimensions that number the rows of ``x``: two, or that of a matrix."""
    return tuple(x.shape[:2]) if x.dim() > 2 else tuple(x.shape[:1])


def _fits(leading: tuple[int, ...], mask: Tensor) -> bool:
    """Return whether there is a row for each position; experts get those of some."""
    return leading == mask.shape or leading == (mask.numel(),)


def _told(x: Tensor) -> _Rows | None:
    """Return what stands for the rows of ``x``."""
    leading = _leading(x)
    if x.dim() < 2 or not x.numel():
        return None
    rows = x.detach().reshape(math.prod(leading), -1)
    wide = torch.promote_types(x.dtype, torch.float32)
    vectors = _vectors(rows.shape[1]).to(x.device, wide)
    products, empty = [], []
    for part in rows.split(max(_PIECE // rows.shape[1], 1)):
        values = part.to(wide)
        products.append(values @ vectors)
        empty.append((values == 0).all(1) | ~values.isfinite().all(1))
    return _Rows(leading, torch.cat(products), torch.cat(empty))


@lru_cache(maxsize=16)
def _vectors(features: int) -> Tensor:
    """Return vectors that rows are multiplied with, any ones: the same in every process."""
    return torch.randn(features, _PRODUCTS, generator=torch.Generator().manual_seed(0))


def _place_of(before: list[_Rows | None], after: list[_Rows | None], name: str, mask: Tensor) -> _Place | None:
    """Return where an input, of all its calls, has the padding of ``mask``; None if that cannot be told."""
    if len(before) != len(after):
        return None
    for length_first in (False, True):
        counts = mask.T if length_first else mask
        if all(_changed_there(b, a, counts) for b, a in zip(before, after, strict=True)):
            return _Place(name, length_first)
    return None


def _changed_there(before: _Rows | None, after: _Rows | None, counts: Tensor) -> bool:
    """Return whether the rows that do not count are the ones that changed, or the ones that have nothing in them."""
    if before is None or after is None or before.leading != after.leading or not _fits(before.leading, counts):
        return False
    counts = counts.flatten().to(before.products.device)
    size = before.products.norm(dim=1).clamp_min(1e-30)
    change = (after.products - before.products).norm(dim=1) / size
    empty = before.empty & after.empty
    most = change[counts & ~empty].max() if bool((counts & ~empty).any()) else change.new_zeros(())
    changed = change > _GAP * most
    if bool((counts & empty).any()) and not bool((changed & ~counts).any()):
        return False
    return bool((changed | empty)[~counts].all())

"""Ranges that are learned from whole batches, of all ranks: kept aside during a batch, taken in after it.

A range that moved in the middle of a forward pass would have to be agreed on there, by a collective operation in
every layer: ranks that run different layers, or one layer more often, would wait for each other forever. Taken in
after the batch, one reduction serves all layers, whoever ran; every rank computes with the same scales; and one rank
with the whole batch learns the same.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch import distributed as dist

from lightning_qat.ops.affine import choose_scale_zero_point
from lightning_qat.quantizers import histogram

if TYPE_CHECKING:
    from lightning_qat.quantizers.fake_quantizer import ActivationQuantizer
    from lightning_qat.quantizers.observers import Observer


class BatchRange:
    """The extremes of what one layer was given in this batch.

    No buffers: ``DistributedDataParallel`` would overwrite them with those of rank 0, weight averaging average them.

    Attributes:
        low, high: float32, no dimension; ``inf`` and ``-inf`` where the layer did not run.
        used: whether it ran on this rank.
    """

    def __init__(self, device: torch.device) -> None:
        self.low = torch.full((), math.inf, dtype=torch.float32, device=device)
        self.high = torch.full((), -math.inf, dtype=torch.float32, device=device)
        self.used = False

    @torch.no_grad()
    def clear(self) -> None:
        """Begin another batch."""
        self.low.fill_(math.inf)
        self.high.fill_(-math.inf)
        self.used = False

    @torch.no_grad()
    def collect(self, x: Tensor, observer: Observer) -> None:
        """Take ``x`` in, not empty; what ``observer`` knows besides extremes it learns now.

        Raises:
            ValueError: if ``x`` is on the CPU and holds NaN or inf.
        """
        low, high = observer.batch_extremes(x)
        if not observer.follows_training:
            observer.update(x)
        self.widen(low, high)

    @torch.no_grad()
    def widen(self, low: Tensor | float, high: Tensor | float) -> None:
        """Take the extremes of an input in."""
        if not (isinstance(low, Tensor) and isinstance(high, Tensor)):
            if low < self.low.item():
                self.low.fill_(low)
            if high > self.high.item():
                self.high.fill_(high)
            self.used = True
            return
        self.low.copy_(torch.minimum(self.low, low))
        self.high.copy_(torch.maximum(self.high, high))
        self.used = True

    def state(self) -> list[float] | None:
        """Return builtins for a checkpoint, None between batches. Reads from the device where there is something."""
        return [float(self.low), float(self.high)] if self.used else None

    def load_state(self, state: list[float] | None) -> None:
        """Set what :meth:`state` returned."""
        self.clear()
        if state is not None:
            self.low.fill_(state[0])
            self.high.fill_(state[1])
            self.used = True


@torch.no_grad()
def take_in_batch(quantizers: list[ActivationQuantizer], *, across_ranks: bool) -> None:
    """Let ``quantizers``, on one device, learn what they were given in this batch; set their scales.

    With ``across_ranks`` this is one reduction of two numbers for each, which every rank has to take part in with the
    same quantizers. It reads from the device only while some quantizer has no range yet.
    """
    families: dict[Any, list[ActivationQuantizer]] = {}
    for quantizer in quantizers:
        families.setdefault(_family(quantizer), []).append(quantizer)
    ordered = [quantizer for family in families.values() for quantizer in family]
    low, high = _extremes(ordered, across_ranks)
    fresh = [quantizer for quantizer in ordered if not quantizer.calibrated]
    if fresh:
        # Ranks may have run different layers; what a rank did not run may have a range now all the same.
        ran = (~(low > high)).tolist() if across_ranks else [quantizer.batch_range.used for quantizer in ordered]
        for quantizer, has_range in zip(ordered, ran, strict=True):
            quantizer.calibrated = quantizer.calibrated or has_range
    start = 0
    for (follows, *_), family in families.items():
        part = slice(start, start + len(family))
        start = part.stop
        if follows:
            _follow(family, low[part], high[part])
    searched = [q for q in fresh if q.calibrated and not q.calibrating and not _family(q)[0]]
    if searched:
        if across_ranks:
            merge_histograms([q.observer for q in searched if q.observer is not None])
        for quantizer in searched:
            quantizer.refresh()
    _clear([quantizer.batch_range for quantizer in ordered])


def _clear(ranges: list[BatchRange]) -> None:
    """Let all of them begin another batch: by a few operations, where one after another takes two for each."""
    ends = torch.full((2, len(ranges)), math.inf, dtype=torch.float32, device=ranges[0].low.device)
    ends[1].neg_()
    torch._foreach_copy_([each.low for each in ranges] + [each.high for each in ranges], list(ends.view(-1).unbind()))
    for each in ranges:
        each.used = False


def _family(quantizer: ActivationQuantizer) -> tuple[Any, ...]:
    """Return what quantizers have in common whose ranges and scales follow from one computation."""
    observer: Any = quantizer.observer
    fmt = quantizer.format
    averaging = getattr(observer, "momentum", None), getattr(observer, "averaged", None)
    return observer.follows_training, averaging, fmt.symmetric, fmt.bits


def _extremes(quantizers: list[ActivationQuantizer], across_ranks: bool) -> tuple[Tensor, Tensor]:
    """Return the extremes of each quantizer's batch, ``[n]``."""
    low = torch.stack([quantizer.batch_range.low for quantizer in quantizers])
    high = torch.stack([quantizer.batch_range.high for quantizer in quantizers])
    if not across_ranks:
        return low, high
    bounds = torch.cat((-low, high))
    # Whether a maximum over ranks keeps NaN depends on the backend; inf is an error just as well.
    bounds = torch.where(bounds.isnan(), math.inf, bounds)
    dist.all_reduce(bounds, dist.ReduceOp.MAX)
    return -bounds[: len(quantizers)], bounds[len(quantizers) :]


def _follow(family: list[ActivationQuantizer], low: Tensor, high: Tensor) -> None:
    """Move the ranges of one family by the extremes of a batch: for all at once what their observers do for one."""
    observers: list[Any] = [quantizer.observer for quantizer in family]
    old_low = torch.stack([observer.min_val for observer in observers])
    old_high = torch.stack([observer.max_val for observer in observers])
    weights = {observer.next_weight() for observer in observers if hasattr(observer, "next_weight")}
    if not weights:
        new_low, new_high = torch.minimum(old_low, low), torch.maximum(old_high, high)
    else:
        first, still = old_low > old_high, low > high
        (weight,) = weights
        new_low = torch.where(first, low, torch.where(still, old_low, old_low.lerp(low, weight)))
        new_high = torch.where(first, high, torch.where(still, old_high, old_high.lerp(high, weight)))
    torch._foreach_copy_([observer.min_val for observer in observers], list(new_low.unbind()))
    torch._foreach_copy_([observer.max_val for observer in observers], list(new_high.unbind()))
    fmt = family[0].format
    scale, zero_point = choose_scale_zero_point(new_low, new_high, bits=fmt.bits, symmetric=fmt.symmetric)
    unknown = new_low > new_high
    scale = torch.where(unknown, torch.stack([quantizer.scale for quantizer in family]), scale)
    torch._foreach_copy_([quantizer.scale for quantizer in family], list(scale.unbind()))
    if zero_point is not None:
        zero_point = torch.where(unknown, torch.stack([quantizer.zero_point for quantizer in family]), zero_point)
        torch._foreach_copy_([quantizer.zero_point for quantizer in family], list(zero_point.unbind()))


@torch.no_grad()
def merge_histograms(observers: list[Observer]) -> None:
    """Give the histogram observers among ``observers``, on one device, what all ranks counted: three reductions."""
    found: list[Any] = [observer for observer in observers if not observer.follows_training]
    if not found:
        return
    # NaN, which is found later, must not be lost; see _extremes.
    bounds = torch.cat([torch.stack((-o.min_val.reshape(-1), o.max_val.reshape(-1))).flatten() for o in found])
    bounds = torch.where(bounds.isnan(), math.inf, bounds)
    wide = torch.cat((bounds.double(), *(o.half_range for o in found)))
    dist.all_reduce(wide, dist.ReduceOp.MAX)
    halves = wide[len(bounds) :].split([len(o.half_range) for o in found])
    for observer, half in zip(found, halves, strict=True):
        shift = histogram.doublings(observer.half_range, half)
        observer.counts.copy_(histogram.merge_bins(observer.counts, shift))
        if observer.sums is not None:
            observer.sums.copy_(histogram.merge_bins(observer.sums, shift))
        observer.half_range.copy_(half)
    sizes = [2 * o.min_val.numel() for o in found]
    for observer, part in zip(found, wide[: len(bounds)].float().split(sizes), strict=True):
        low, high = part.view(2, *observer.min_val.shape)
        observer.min_val.copy_(-low)
        observer.max_val.copy_(high)
    _sum_over_ranks([o.counts for o in found])
    _sum_over_ranks([o.sums for o in found if o.sums is not None])


def _sum_over_ranks(tensors: list[Tensor]) -> None:
    if tensors:
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view(tensor.shape))

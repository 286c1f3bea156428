"""Evening out the channels of a convolutional network before it is quantized.

Inputs with calibrated ranges have one step for all channels, so that a channel whose numbers are small gets few codes.
As cross-layer equalization does (Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias
Correction"), channels are divided where they are made, in BatchNorm or the rows of a layer, and multiplied where they
are read, in the columns of the next one; here by what calibration saw of them, and also over residual connections and
depthwise convolutions. The float network stays what it was, but for rounding; weights of 16 bits get powers of two,
which round nothing.

A clamp at 6, as of ReLU6, between the two then acts at another height: it keeps a channel within what its scale leaves
of the range, and that is never less than calibration has seen of it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lightning_qat.ptq.channel_groups import ChannelGroup, ChannelWatch, leaves_of
from lightning_qat.ptq.channels import Slot, slot_of
from lightning_qat.ptq.equalizing_scales import (
    ChannelRange,
    EqualizationOptions,
    by_input_channel,
    equalizing_scales,
    expected_loss,
    has_range,
    output_power,
)
from lightning_qat.ptq.probing import agree
from lightning_qat.ptq.watch import of_every_rank
from lightning_qat.schemes import IntegerScheme
from lightning_qat.transforms.calibrate import _call
from lightning_qat.transforms.calibrated_mode import as_calibrated
from lightning_qat.transforms.phase import float_forward
from lightning_qat.transforms.prepare import qat_layers

logger = logging.getLogger(__name__)

#: Units in the last place that the output may differ by: each layer rounds anew.
_OUTPUT_UNITS = 4096


@dataclass(frozen=True, eq=False)
class GroupEqualization:
    """What was done to channels that share a vector of scales.

    Args:
        sources: names of what was divided.
        readers: names of the layers that were multiplied.
        scales: float32 ``[channels]``.
        alpha: that gave them.
        loss: expected squared error of the readers' outputs, relative to these, summed over the readers.
        plain_loss: the same without scales.
    """

    sources: tuple[str, ...]
    readers: tuple[str, ...]
    scales: Tensor
    alpha: float
    loss: float
    plain_loss: float


@torch.no_grad()
def equalize(
    model: nn.Module,
    batches: Iterable[Any],
    forward: Callable[[nn.Module, Any], Any] | None = None,
    options: EqualizationOptions | None = None,
    *,
    across_ranks: bool = False,
) -> tuple[GroupEqualization, ...]:
    """Even out the channels of a prepared model, in place, where that lets inputs and weights lose less.

    Parameters are replaced, not written to. What is given is run in float, once, and one batch twice more.

    Args:
        model: prepared, with calibrated ranges of 8 bits or so; its channels are found by watching it.
        batches: of calibration, as :func:`calibrate` takes them.
        forward: called as ``forward(model, batch)``; None calls the model with the batch.
        options: None is ``EqualizationOptions()``.
        across_ranks: every rank of ``torch.distributed`` calls this with batches of its own; all get the same model.

    Returns:
        What was evened out.
    """
    options, batches = options or EqualizationOptions(), list(batches)
    run = partial(forward or _call, model)
    with float_forward(model), as_calibrated(model), torch.compiler.set_stance("force_eager"):
        groups, seen = _watched(model, batches, run)
        if across_ranks:
            groups, seen = _agreed(groups, seen)
        chosen = [(group, found) for group in groups if (found := _choose(group, seen, options)) is not None]
        slots = [slot for group, _ in chosen for slot in _slots_of(group)]
        saved = [(slot, slot.parameter) for slot in slots]
        before = run(batches[0]) if chosen else None
        for group, found in chosen:
            _apply(group, found.scales)
        holds = not chosen or _same(run(batches[0]), before)
        if not (all(of_every_rank(holds)) if across_ranks else holds):
            for slot, parameter in reversed(saved):
                slot.owner._parameters[slot.name] = parameter
            logger.warning("channels are not evened out: %s then computes something else", type(model).__name__)
            return ()
    return tuple(found for _, found in chosen)


def _watched(
    model: nn.Module, batches: Sequence[Any], run: Callable[[Any], Any]
) -> tuple[list[ChannelGroup], dict[str, ChannelRange]]:
    """Return the groups of channels, and what the layers of the model got."""
    watch, seen = ChannelWatch(model), _Seen()
    handles = [layer.register_forward_pre_hook(partial(seen.see, name)) for name, layer in qat_layers(model)]
    try:
        for batch in batches:
            with watch.forward() as returned:
                returned(run(batch))
    finally:
        for handle in handles:
            handle.remove()
    groups = [group for group in watch.groups() if group.readers.keys() <= seen.ranges.keys()]
    return groups, seen.ranges


class _Seen:
    """Ranges of the inputs of layers whose channels are dimension 1."""

    def __init__(self) -> None:
        self.ranges: dict[str, ChannelRange] = {}

    def see(self, name: str, layer: nn.Module, args: tuple[Any, ...]) -> None:
        dims = 2 + len(layer.kernel_size) if isinstance(layer, _ConvNd) else 2
        if not args or not isinstance(args[0], Tensor) or args[0].dim() != dims or not args[0].numel():
            return
        rows = args[0].detach().transpose(0, 1).flatten(1).float()
        low, high = torch.aminmax(rows, dim=1)
        found = ChannelRange(low, high, rows.square().sum(1, dtype=torch.float64), rows.shape[1])
        self.ranges[name] = self.ranges[name].merged(found) if name in self.ranges else found


def _agreed(
    groups: list[ChannelGroup], seen: dict[str, ChannelRange]
) -> tuple[list[ChannelGroup], dict[str, ChannelRange]]:
    """Return the groups that all ranks have found and what all have seen."""
    told = [(tuple(source.name for source in g.sources), tuple(g.readers), g.ceiling) for g in groups]
    ranks = of_every_rank((told, {name: seen[name] for group in groups for name in group.readers}))
    merged: dict[str, ChannelRange] = {}
    for _, ranges in ranks:
        for name, found in ranges.items():
            here = seen[name].low.device if name in seen else found.low.device
            found = replace(found, **{part: getattr(found, part).to(here) for part in ("low", "high", "square")})
            merged[name] = merged[name].merged(found) if name in merged else found
    return [group for group, facts in zip(groups, told, strict=True) if all(facts in rank for rank, _ in ranks)], merged


# --- scales ----------------------------------------------------------------------------------------


def _choose(
    group: ChannelGroup, seen: Mapping[str, ChannelRange], options: EqualizationOptions
) -> GroupEqualization | None:
    """Return scales for a group; None where it is better left as it is."""
    readers = group.readers.values()
    integers = all(isinstance(layer.weight_quantizer.scheme, IntegerScheme) for layer in readers)
    if not integers or not any(has_range(layer.input_quantizer) for layer in readers):
        return None
    ranges = {name: seen[name] for name in group.readers}
    exact = any(slot.value.element_size() < 4 for slot in _slots_of(group))
    largest = [found.largest for found in ranges.values()]
    plain = _loss(group, ranges, torch.ones_like(largest[0]))
    best = None
    for alpha in options.alphas(group.ceiling):
        scales = equalizing_scales(largest, alpha, group.ceiling, exact=exact)
        loss = _loss(group, ranges, scales)
        if loss < (plain if best is None else best.loss):
            names = tuple(source.name for source in group.sources)
            best = GroupEqualization(names, tuple(group.readers), scales, alpha, loss, plain)
    return best


def _loss(group: ChannelGroup, ranges: Mapping[str, ChannelRange], scales: Tensor) -> float:
    """Return the expected error of the readers' outputs, relative to these, summed over the readers."""
    total = 0.0
    for name, layer in group.readers.items():
        weight, seen = layer.weight.detach().float(), ranges[name]
        error = expected_loss(layer, by_input_channel(layer, weight, scales), seen.divided_by(scales))
        total += error / max(output_power(layer, weight, seen), torch.finfo(torch.float32).tiny)
    return total


# --- folding ---------------------------------------------------------------------------------------


def _slots_of(group: ChannelGroup) -> Iterator[Slot]:
    for source in group.sources:
        yield from source.slots.values()
    for layer in group.readers.values():
        slot = slot_of(layer, "weight")
        if slot is not None:
            yield slot


def _apply(group: ChannelGroup, scales: Tensor) -> None:
    """Divide the sources by ``scales`` and multiply the readers."""
    for source in group.sources:
        source.multiply(scales.reciprocal())
    for layer in group.readers.values():
        slot: Any = slot_of(layer, "weight")
        slot.replace(by_input_channel(layer, slot.value, scales))


def _same(output: Any, before: Any) -> bool:
    pairs = zip(leaves_of(output), leaves_of(before), strict=True)
    tensors = [(a, b) for a, b in pairs if isinstance(a, Tensor) and a.is_floating_point()]
    return all(agree(a, b, _OUTPUT_UNITS) for a, b in tensors)

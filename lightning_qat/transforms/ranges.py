"""When the ranges of activations move: in every forward pass, or between batches and on all ranks at once.

A prepared model in a training loop of its own learns in the forward pass and computes with what it has just seen.
In a Trainer, on one rank as on many, ranges are learned during a batch and hold from the next one on: all ranks
compute with the same scales at every step, two ranks learn what one rank learns from both their batches, and no
rank waits for another that does not run the same layers. A layer that has no range yet stays in float for the
batch in which it first runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import distributed as dist
from torch import nn

from lightning_qat.quantizers.batch_range import take_in_batch
from lightning_qat.quantizers.fake_quantizer import ActivationQuantizer
from lightning_qat.transforms.prepare import qat_layers


def static_quantizers(model: nn.Module) -> list[ActivationQuantizer]:
    """Return the quantizers of ``model`` that need a calibrated range."""
    inputs = (layer.input_quantizer for _, layer in qat_layers(model))
    return [quantizer for quantizer in inputs if quantizer is not None and quantizer.observer is not None]


def defer_ranges(model: nn.Module, deferred: bool) -> None:
    """Let ``model`` learn its ranges from whole batches, by :func:`update_ranges`; or in the forward pass again."""
    for quantizer in static_quantizers(model):
        quantizer.deferred = deferred


@contextlib.contextmanager
def deferred_ranges(model: nn.Module) -> Iterator[None]:
    """Let ``model`` learn its ranges by :func:`update_ranges` inside."""
    quantizers = static_quantizers(model)
    flags = [quantizer.deferred for quantizer in quantizers]
    defer_ranges(model, True)
    try:
        yield
    finally:
        for quantizer, flag in zip(quantizers, flags, strict=True):
            quantizer.deferred = flag


def update_ranges(model: nn.Module, *, across_ranks: bool = False) -> None:
    """Move the ranges of a ``model`` with deferred ranges by the batch that it has run, and set its scales.

    Args:
        model: a prepared model, after :func:`defer_ranges`.
        across_ranks: by the batches of all ranks of ``torch.distributed``, which all have to call this, in the same
            phase; they may have run different layers. One reduction of two numbers for each layer.
    """
    by_device: dict[torch.device, list[ActivationQuantizer]] = {}
    for quantizer in static_quantizers(model):
        if quantizer.learns_after_batch:
            by_device.setdefault(quantizer.batch_range.low.device, []).append(quantizer)
    for quantizers in by_device.values():
        take_in_batch(quantizers, across_ranks=across_ranks)


def agree_on_structure(model: nn.Module) -> None:
    """Let all ranks of ``torch.distributed`` know what some found out: which BatchNorm a layer takes in, who reads it.

    A rank that ran other layers leaves these undecided. Where ranks found different things, nothing is folded.
    """
    quantizers = [layer.weight_quantizer for _, layer in qat_layers(model)]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, [(quantizer.folded_norm, quantizer.feeds_one_layer) for quantizer in quantizers])
    for quantizer, facts in zip(quantizers, zip(*found, strict=True), strict=True):
        norms = {norm for norm, _ in facts if norm is not None}
        feeds = {feeds for _, feeds in facts if feeds is not None}
        quantizer.folded_norm = "" if len(norms) > 1 else next(iter(norms), None)
        quantizer.feeds_one_layer = False if len(feeds) > 1 else next(iter(feeds), None)


def share_of_samples(most: int | None, *, across_ranks: bool) -> int | None:
    """Return how many of ``most`` calibration samples this rank looks at."""
    if most is None or not across_ranks:
        return most
    return most // dist.get_world_size() + (dist.get_rank() < most % dist.get_world_size())

"""Benchmark group ``convert``: float tensors to the codes of every format and back, against bitsandbytes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_qat.metrics import sqnr

from ._benchmark_formats import Format, Way, all_formats
from ._benchmark_peers import silenced, told
from ._timing import Conditions, Results, Timing, rated

#: Peers on another grid are this much worse than the definition at most, in dB.
_WORSE_DB = 1.0
#: Share of a peer's codes that may differ on a GPU, whose own reciprocal is not exact. One with more is left out
#: there, as bitsandbytes with fp4: 2e-3 of normal bfloat16 values lie within 4 units of a threshold (float32: 1e-6),
#: where the last digit of the reciprocal decides, and 3e-4 of its codes differed on an H100.
_DIFFERENT_ON_GPU = 1e-4


def convert_group(conditions: Conditions, formats: tuple[Format, ...] | None = None) -> Results:
    """Time quantizing and dequantizing a square tensor in every format, float32 on the CPU and bfloat16 on a GPU.

    Bytes of a case, for both directions: the float tensor and everything that is stored.

    Args:
        conditions: how.
        formats: None is all of them.

    Raises:
        RuntimeError: if codes or values of ours are not the definition's, or on a CPU bitsandbytes has other bytes;
            the message says which.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(conditions.side, conditions.side, generator=generator).to(conditions.device, conditions.dtype)
    chosen = all_formats(x) if formats is None else formats
    return sum((measured(each, x, conditions) for each in chosen), Results())


def measured(each: Format, x: Tensor, conditions: Conditions) -> Results:
    """Return the times of one format, after its ways were verified."""
    ways, decibels, notes = verified(each, x)
    baseline = next(iter(ways))
    held = {name: way.quantize(x) for name, way in ways.items()}
    quantize = {name: partial(way.quantize, x) for name, way in ways.items()}
    dequantize = {name: partial(way.dequantize, held[name]) for name, way in ways.items()}
    moved = x.nbytes + sum(t.nbytes for t in _stored(each.definition, held["torch eager"]).values())
    size, sizes = " x ".join(map(str, x.shape)), dict.fromkeys(ways, moved)
    timings: list[Timing] = []
    for what, cases in (("quantize", quantize), ("dequantize", dequantize)):
        group = f"convert {each.name}: {what} {size}"
        found = rated(group, cases, conditions, baseline=baseline, moved=sizes)
        timings += [replace(timing, sqnr_db=decibels[timing.name]) for timing in found]
    return Results(timings, notes)


def verified(each: Format, x: Tensor) -> tuple[dict[str, Way], dict[str, float], list[str]]:
    """Return the ways that compute the format, baseline first, the SQNR of their values, and what is to be told."""
    definition = each.definition
    held = definition.quantize(x)
    expected, values = _stored(definition, held), definition.dequantize(held)
    own = {"torch eager": definition, **each.ours}
    decibels = dict.fromkeys(own, float(sqnr(x, values)))
    for name, way in each.ours.items():
        held = way.quantize(x)
        wrong = differences(expected, _stored(way, held))
        if not wrong and not torch.equal(way.dequantize(held), values):
            wrong = [f"values by up to {_apart(way.dequantize(held), values):.3g}"]
        if wrong:
            raise RuntimeError(f"{name} differs from the definition of {each.name} in {', '.join(wrong)}; not timed")
    peers, notes = {}, []
    for name, way in each.peers.items():
        if not way.installed:
            continue
        try:
            with silenced():
                held = way.quantize(x)
                theirs = way.dequantize(held)
        except Exception as error:  # noqa: BLE001 - another library fails in any way it likes; the notes say how
            notes.append(f"{name} is not timed for {each.name}: {told(error)}")
            continue
        decibels[name] = float(sqnr(x, theirs))
        told_of = _judged(name, each.name, way, held, theirs, expected, values, decibels)
        notes += told_of.notes
        if told_of.timed:
            peers[name] = way
    return peers | own, decibels, notes


@dataclass(frozen=True)
class _Verdict:
    timed: bool
    notes: tuple[str, ...] = ()


def _judged(
    name: str,
    what: str,
    way: Way,
    held: Any,
    theirs: Tensor,
    expected: dict[str, Tensor],
    values: Tensor,
    decibels: dict[str, float],
) -> _Verdict:
    """Return whether a peer is timed. Another grid is judged by its SQNR, the same one by codes and values."""
    if way.stored is None:
        worse = decibels["torch eager"] - decibels[name]
        if worse <= _WORSE_DB:
            return _Verdict(True)
        return _Verdict(False, (f"{name} is not timed for {what}: its values are {worse:.1f} dB worse than ours",))
    allowed = _DIFFERENT_ON_GPU if values.is_cuda else 0.0
    wrong = differences(expected, way.stored(held))
    if differences(expected, way.stored(held), allowed):
        told_of = f"{name} and the definition of {what} differ in {', '.join(wrong)}; not timed"
        if values.is_cuda:
            return _Verdict(False, (told_of,))
        raise RuntimeError(told_of)
    notes = [f"{name} and the definition of {what} differ in {', '.join(wrong)}"] if wrong else []
    apart = _apart(theirs, values)
    if not wrong and apart > 2 * torch.finfo(values.dtype).eps * float(values.abs().max()):
        notes.append(f"{name} gives values of {what} that are off by up to {apart:.3g} from its own codes and scales")
    return _Verdict(True, tuple(notes))


def differences(expected: dict[str, Tensor], found: dict[str, Tensor], allowed: float = 0.0) -> list[str]:
    """Return what differs, in words; a share of ``allowed`` of a tensor's elements may."""
    wrong = []
    for name, right in expected.items():
        tensor = found[name]
        if tensor.dtype != right.dtype or tensor.shape != right.shape:
            wrong.append(f"{name} ({tensor.dtype}, {tensor.numel()} elements, not {right.dtype}, {right.numel()})")
        elif (count := int((tensor != right).sum())) > allowed * right.numel():
            first = int((tensor != right).nonzero()[0])
            wrong.append(f"{name} ({count} of {right.numel()}, the first at {first})")
    return wrong


def _stored(way: Way, held: Any) -> dict[str, Tensor]:
    if way.stored is None:
        raise ValueError("our own ways and the definition have codes to compare; give Way(stored=...)")
    return way.stored(held)


def _apart(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).abs().max())

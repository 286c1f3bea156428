"""Benchmark group ``gptq``: codes of one layer's weight, given the Gram matrix of its inputs, against gptqmodel."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qat.ptq.chosen import output_error
from lightning_qat.ptq.gptq import GPTQOptions, choose_gptq
from lightning_qat.schemes import TensorFormat

from ._benchmark_peers import silenced, told
from ._timing import Case, Conditions, Results, Timing, interleaved

#: Sides of the weights where the settings name none.
SIDES = (1024, 4096)
#: Symmetric 4-bit integers as gptqmodel's default has them.
GROUP, BITS = 128, 4
#: Share of values that have to be the peer's, and the most that ours may lose of what it loses.
LEAST_EQUAL, MOST_LOSS = 0.999, 1.001
#: A peer takes up to minutes for a large layer: it and ours then run fewer times.
_MOST_SECONDS, _MOST_ROUNDS = 120.0, 5

#: From this side on a run takes longer than what is called several times in a turn.
_LONG = 512

PEER = "gptqmodel"
#: With what the nearest codes would lose, which is worked out by default.
_COMPARED = "lightning_qat, compared with nearest"


@dataclass(frozen=True)
class Layer:
    """A weight and the Gram matrix of its inputs."""

    weight: Tensor
    gram: Tensor

    def decibels(self, values: Tensor) -> float:
        """Return the SQNR of the layer's outputs with ``values`` for the weight."""
        power = output_error(self.weight, torch.zeros_like(self.weight), self.gram)
        return 10 * math.log10(power / output_error(self.weight, values, self.gram))


def gptq_group(conditions: Conditions, sides: tuple[int, ...] | None = None) -> Results:
    """Time GPTQ of square weights, float32, with the published algorithm and with our defaults.

    Args:
        conditions: how; its ``size`` is the only side, where given.
        sides: None is 1024 and 4096.

    Raises:
        RuntimeError: if our codes are not the peer's or lose more than its.
    """
    chosen = sides or ((conditions.size,) if conditions.size else SIDES)
    return sum((_measured(side, conditions) for side in chosen), Results())


def layer_of(side: int, device: torch.device) -> Layer:
    """Return a normal weight and the Gram matrix of correlated inputs, some of them larger than others."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(side, side, generator=generator) * 0.02
    # Correlated by little enough that float32 alone, which the peer computes in, does not tip codes over.
    mixing = 0.5 * torch.randn(side, side, generator=generator) / side**0.5 + torch.eye(side)
    inputs = torch.randn(2 * side, side, generator=generator) @ mixing
    inputs *= 1 + 2 * torch.rand(side, generator=generator)
    return Layer(weight.to(device), (inputs.t() @ inputs).to(device))


def _measured(side: int, conditions: Conditions) -> Results:
    layer, rounds = layer_of(side, conditions.device), min(conditions.rounds, _MOST_ROUNDS)
    published = GPTQOptions.published(compare=False)  # nor does the peer look at the nearest codes
    fmt = TensorFormat("gptq", BITS, True, group_size=GROUP)
    ours: dict[str, Callable[[], Tensor]] = {
        "lightning_qat": lambda: choose_gptq(layer.weight, layer.gram, fmt, published).values(),
        _COMPARED: lambda: choose_gptq(layer.weight, layer.gram, fmt, replace(published, compare=True)).values(),
        "lightning_qat, defaults": lambda: choose_gptq(layer.weight, layer.gram, fmt).values(),
    }
    decibels = {name: layer.decibels(run()) for name, run in ours.items()}
    cases: dict[str, Case] = dict(ours)
    notes: list[str] = []
    if importlib.util.find_spec(PEER) is not None:
        try:
            with silenced():
                # Each run uses up its Gram matrix: one that is verified, one that is not counted, and the rounds, of
                # which a short one is several calls.
                peers = iter([peer_of(layer) for _ in range(2 + rounds * (1 if side >= _LONG else 4))])
                values = next(peers)()
        except Exception as error:  # noqa: BLE001 - another library fails in any way it likes; the notes say how
            notes.append(f"{PEER} is not timed for GPTQ of {side} x {side}: {told(error)}")
        else:
            verify(layer, ours["lightning_qat"](), values)
            decibels[PEER] = layer.decibels(values)
            cases = {PEER: _next_of(peers), **cases}
    group = f"gptq {side} x {side}, {BITS} bits in groups of {GROUP}, activation order"
    with silenced():
        medians = interleaved(cases, rounds, group, seconds=_MOST_SECONDS, device=conditions.device)
    first = next(iter(cases))
    timings = [
        Timing(group, name, medians[name], medians[first] / medians[name], sqnr_db=decibels[name]) for name in cases
    ]
    return Results(timings, notes)


def verify(layer: Layer, ours: Tensor, theirs: Tensor) -> None:
    """Raise ``RuntimeError`` unless both chose the same values and ours lose no more."""
    equal = float(torch.isclose(ours, theirs, rtol=1e-3, atol=1e-7).float().mean())
    ratio = output_error(layer.weight, ours, layer.gram) / output_error(layer.weight, theirs, layer.gram)
    if equal < LEAST_EQUAL or ratio > MOST_LOSS:
        raise RuntimeError(
            f"lightning_qat has {100 * equal:.2f} % of {PEER}'s values and {ratio:.4f} times its loss, where "
            f"{100 * LEAST_EQUAL:.1f} % and {MOST_LOSS} are due; not timed"
        )


def peer_of(layer: Layer) -> Callable[[], Tensor]:
    """Return gptqmodel's quantizer for one run, with the Gram matrix in place."""
    from gptqmodel.quantization import QuantizeConfig
    from gptqmodel.quantization.gptq import GPTQ

    config = QuantizeConfig(
        bits=BITS, group_size=GROUP, sym=True, desc_act=True, static_groups=True, act_group_aware=False,
        damp_percent=GPTQOptions.published().damping, offload_to_disk=False,
    )  # fmt: skip
    side = len(layer.weight)
    with torch.device(layer.weight.device):
        linear = nn.Linear(side, side, bias=False)
    linear.weight.data.copy_(layer.weight)
    peer: Any = GPTQ(linear, config)
    peer.quantizer.configure(perchannel=True)
    # What its hooks add up, less the time for that: both sides begin with the Gram matrix.
    peer.add_batch(torch.eye(side, device=layer.weight.device)[None], None)
    for partial in peer._device_hessian_partials.values():
        partial.copy_(layer.gram)

    def run() -> Tensor:
        values: Tensor = peer.quantize()[0]
        return values

    return run


def _next_of(peers: Iterator[Callable[[], Tensor]]) -> Case:
    return lambda: next(peers)()

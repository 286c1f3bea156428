"""Fewer bits, step by step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from lightning_qat.callbacks.base import QuantizationCallback
from lightning_qat.callbacks.schedule import BitSchedule, Schedule
from lightning_qat.config import Step, check_int, check_step


class ProgressiveBitReduction(QuantizationCallback):
    """Reduce the bits of every quantized layer on a fixed schedule.

    Args:
        bits: step -> bits from there on, such as ``{0: 16, 1000: 8, 2000: 4}``. Before the first step
            the plan's bits hold.
        weights: change the weights.
        activations: change the activations too.
        match: glob on layer names; layers that a plan gives bits of their own are left out so.
    """

    def __init__(
        self, bits: Mapping[Step, int], *, weights: bool = True, activations: bool = False, match: str = "*"
    ) -> None:
        super().__init__()
        if not isinstance(bits, Mapping) or not bits:
            raise ValueError(f"bits={bits!r} is not allowed; use step -> bits, such as {{0: 16, 1000: 8, 2000: 4}}")
        if not (weights or activations):
            raise ValueError("weights=False with activations=False changes nothing; set one of them")
        self.bits: BitSchedule = tuple(
            (check_step("step", step), check_int(f"bits[{step!r}]", value, 2, 16)) for step, value in bits.items()
        )
        self.weights = weights
        self.activations = activations
        self.match = match

    def contribute(self, schedule: Schedule) -> Schedule:
        schedule = replace(schedule, bits_match=self.match)
        if self.weights:
            schedule = replace(schedule, weight_bits=self.bits)
        return replace(schedule, activation_bits=self.bits) if self.activations else schedule

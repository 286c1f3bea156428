"""When what happens: the phase as a pure function of the global step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from lightning_qat.config import Step, epochs_of
from lightning_qat.transforms.phase import Phase

#: Steps with the bits that hold from there on.
BitSchedule = tuple[tuple[Step, int], ...]


def resolve_step(name: str, step: Step, total_steps: float, steps_per_epoch: float | Callable[[float], float]) -> int:
    """Return ``step`` in optimizer steps, see :meth:`Schedule.resolve`."""
    epochs = epochs_of(step)
    if isinstance(step, int):
        return step
    if epochs is None:
        reached = float(step) * total_steps
    else:
        reached = steps_per_epoch(epochs) if callable(steps_per_epoch) else epochs * steps_per_epoch
    if not math.isfinite(reached):
        known = "max_steps or max_epochs" if epochs is None else "limit_train_batches, or a loader with a length"
        raise ValueError(f"{name}={step!r} needs the length of the run; give the Trainer {known}, or a step")
    return round(reached)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """What the quantization callbacks of a Trainer agree on.

    Steps count as ``trainer.global_step`` does: optimizer steps, each of several optimizers counted.

    Args:
        start: from here on the forward is fake-quantized.
        freeze_scales: from here on scales stand still.
        freeze_norm: from here on BatchNorm statistics stand still.
        weight_bits: bits of the weights from a step on.
        activation_bits: bits of the activations from a step on.
        bits_match: glob on the names of the layers whose bits change.
        calibration_batches: training batches observed before the first step.
        fold_norm: fold BatchNorm that directly follows a layer on conversion.
    """

    start: Step = 0
    freeze_scales: Step | None = None
    freeze_norm: Step | None = None
    weight_bits: BitSchedule = ()
    activation_bits: BitSchedule = ()
    bits_match: str = "*"
    calibration_batches: int = 0
    fold_norm: bool = True

    def resolve(self, total_steps: float, steps_per_epoch: float | Callable[[float], float]) -> Schedule:
        """Return the schedule in optimizer steps.

        Args:
            total_steps: of the run; infinite if unknown.
            steps_per_epoch: infinite if unknown; a function of the epochs where they have unlike many steps.

        Raises:
            ValueError: for a fraction or epochs of a run whose length is not known.
        """

        def steps(name: str, step: Step) -> int:
            return resolve_step(name, step, total_steps, steps_per_epoch)

        def bits(name: str, entries: BitSchedule) -> BitSchedule:
            return tuple(sorted((steps(name, step), value) for step, value in entries))

        return replace(
            self,
            start=steps("start_step", self.start),
            freeze_scales=None if self.freeze_scales is None else steps("freeze_step", self.freeze_scales),
            freeze_norm=None if self.freeze_norm is None else steps("freeze_step", self.freeze_norm),
            weight_bits=bits("bits", self.weight_bits),
            activation_bits=bits("bits", self.activation_bits),
        )

    def phase(self, step: int) -> Phase:
        """Return the phase at optimizer step ``step`` of a resolved schedule."""

        def reached(at: Step | None) -> bool:
            return at is not None and step >= at  # type: ignore[operator]

        def bits(entries: BitSchedule) -> int | None:
            return next((value for at, value in reversed(entries) if reached(at)), None)

        return Phase(
            observing=not reached(self.freeze_scales),
            quantizing=reached(self.start),
            frozen=reached(self.freeze_scales),
            frozen_norm=reached(self.freeze_norm),
            weight_bits=bits(self.weight_bits),
            activation_bits=bits(self.activation_bits),
            bits_match=self.bits_match,
        )

    def has_final_bits(self, step: int) -> bool:
        """Return whether a resolved schedule changes no bits after optimizer step ``step``."""
        return all(at <= step for at, _ in (*self.weight_bits, *self.activation_bits))  # type: ignore[operator]

    def beyond(self, total_steps: float) -> list[str]:
        """Return, in words, what a resolved schedule does too late for a run of ``total_steps``."""
        late: list[tuple[Step, str]] = [(self.start, "nothing is fake-quantized before step")]
        late += [(step, f"no weight has {value} bits before step") for step, value in self.weight_bits]
        late += [(step, f"no activation has {value} bits before step") for step, value in self.activation_bits]
        return [f"{what} {step}, and the run has {total_steps:.0f}" for step, what in late if step >= total_steps > 0]  # type: ignore[operator]

    def state_dict(self) -> dict[str, Any]:
        """Return builtins only: anything else makes a checkpoint unloadable with ``weights_only=True``."""
        state = asdict(self)
        return state | {key: [list(e) for e in state[key]] for key in ("weight_bits", "activation_bits")}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Schedule:
        """Return the schedule that :meth:`state_dict` described."""
        known = {key: state[key] for key in (f.name for f in fields(cls)) if key in state}
        pairs = {key: tuple((s, b) for s, b in known[key]) for key in ("weight_bits", "activation_bits")}
        return cls(**{**known, **pairs})

    def explain(self) -> list[tuple[str, str]]:
        """Return ``(when, what)``, in order, of what this schedule does."""
        rows: list[tuple[Step, str]] = []
        if self.calibration_batches:
            rows.append(
                (0, f"calibrate activation ranges on {self.calibration_batches} training batches, before training")
            )
        rows.append((0, "train in float, observing ranges") if self.start != 0 else (0, "train fake-quantized"))
        if self.start != 0:
            rows.append((self.start, "train fake-quantized"))
        where = "" if self.bits_match == "*" else f" in {self.bits_match}"
        rows += [(step, f"weights at {value} bits{where}") for step, value in self.weight_bits]
        rows += [(step, f"activations at {value} bits{where}") for step, value in self.activation_bits]
        if self.freeze_scales is not None:
            rows.append((self.freeze_scales, "scales stand still"))
        if self.freeze_norm is not None:
            rows.append((self.freeze_norm, "BatchNorm statistics stand still"))
        if all(isinstance(step, int) for step, _ in rows):
            rows.sort(key=lambda row: row[0])
        return [(when(step), what) for step, what in rows]


def when(step: Step) -> str:
    """Return ``step`` in words."""
    if isinstance(step, int):
        return f"step {step}"
    return f"{step:.0%} of the run" if isinstance(step, float) else f"after {step}"

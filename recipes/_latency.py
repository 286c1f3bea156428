"""How long the forms of a model take for 1 and for 64 samples, and where quantization does not pay."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_qat.nn import QuantizedLayer

from ._timing import interleaved

BATCHES = (1, 64)
_ROUNDS = 30
#: For each batch size; one round is counted however long it takes.
_SECONDS = 1.0
#: A batch that would take longer than this in all is left out.
_MOST_SECONDS = 20.0
#: Below this factor a difference may be the machine's.
_SLOWER = 1.05

#: Start of a layer's reason for the reference path -> what helps.
_HINTS = {
    "weight-only": "weight-only layers save memory, not time; quantization=int8 computes with integers",
    "weights in groups": "scales for groups of weights save memory, not time; quantization=int8 computes with integers",
    "ranges per sample": "quantization=int8 calibrates ranges, which convolutions compute with integers from",
}


@dataclass(frozen=True)
class Example:
    """The arguments of the first forward pass that a test made of a task, or of its one network.

    Args:
        module: name of what was called in the task, ``""`` for the task itself.
        args: positional.
        kwargs: by name.
    """

    module: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def keep(cls, module: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Example:
        """Return copies of the arguments: what is called may change them."""
        return cls(module, *tree_map_only(Tensor, lambda t: t.detach().to("cpu", copy=True), (args, kwargs)))

    def of_batch(self, batch: int) -> Example:
        """Return the same with its samples, along dimension 0 of every tensor, cut or repeated to ``batch``.

        Raises:
            ValueError: that cannot be done; the message says why.
        """
        leaves = tree_leaves((self.args, self.kwargs))
        strange = [x for x in leaves if not isinstance(x, (Tensor, str, bool, int, float, type(None)))]
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        if strange:
            raise ValueError(f"the model takes a {type(strange[0]).__name__}, which cannot be cut into samples")
        if any(x.layout != torch.strided or x.is_nested or not x.dim() for x in tensors):
            raise ValueError("the model takes a tensor that cannot be cut along dimension 0")
        sizes = sorted({len(x) for x in tensors})
        if len(sizes) != 1 or not sizes[0]:
            raise ValueError(f"the tensors that the model takes have no common dimension 0 (sizes {sizes})")
        index = torch.arange(batch) % sizes[0]
        return Example(self.module, *tree_map_only(Tensor, lambda t: t[index], (self.args, self.kwargs)))

    def call(self, task: nn.Module) -> Any:
        """Run the same forward pass of ``task``."""
        return task.get_submodule(self.module)(*self.args, **self.kwargs)


@dataclass(frozen=True)
class Latency:
    """Median milliseconds of a forward pass on the CPU.

    Args:
        milliseconds: variant -> batch -> time.
        execution: how many layers of the quantized model run by which arithmetic.
        notes: why a batch has no time.
    """

    milliseconds: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    execution: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def of(self, variant: str) -> Mapping[int, float]:
        """Return batch -> milliseconds of one variant."""
        return self.milliseconds.get(variant, {})

    def lines(self) -> list[str]:
        """Return what is to be said besides the table: each batch for which quantization does not pay, and why."""
        if len(self.milliseconds) < 2:
            return list(self.notes)
        (_, before), (name, after) = self.milliseconds.items()
        factors = {batch: after[batch] / before[batch] for batch in after}
        slower = {batch: factor for batch, factor in factors.items() if factor > _SLOWER}
        if not slower:
            return list(self.notes)
        told = " and ".join(
            f"{factor:.2f} times the float model's time at batch {batch}" for batch, factor in slower.items()
        )
        return [f"The {name} model takes {told} on this CPU: {_why(self.execution)}", *self.notes]

    def facts(self) -> dict[str, Any]:
        """Return what ``results.json`` keeps besides the times."""
        return {
            "device": "cpu",
            "threads": torch.get_num_threads(),
            "layers_by_execution": dict(self.execution),
            "notes": self.lines(),
        }


def latency(variants: Mapping[str, nn.Module], example: Example | None) -> Latency:
    """Time a forward pass of the float model and of the quantized one in turn, for each of ``BATCHES``.

    Both are in evaluation mode; every module's mode is put back. Nothing is raised for a model that cannot be timed:
    the notes say why.
    """
    times: dict[str, dict[int, float]] = {name: {} for name in variants}
    notes: list[str] = []
    seconds_per_sample = 0.0  # of an uncounted and a counted round
    with ExitStack() as stack:
        for model in variants.values():
            stack.enter_context(_evaluated(model))
        layers = [module for model in variants.values() for module in model.modules()]
        execution = Counter(layer.execution for layer in layers if isinstance(layer, QuantizedLayer))
        for batch in BATCHES:
            expected = seconds_per_sample * batch
            if expected > _MOST_SECONDS:
                notes.append(f"Batch {batch} was not timed: it would take about {expected:.0f} s")
                break
            found, note = _timed(variants, example, batch)
            if note:
                notes.append(note)
                break
            for name, milliseconds in found.items():
                times[name][batch] = milliseconds
            seconds_per_sample = 2 * sum(found.values()) / 1e3 / batch
    return Latency(times, dict(execution.most_common()), tuple(notes))


def _timed(variants: Mapping[str, nn.Module], example: Example | None, batch: int) -> tuple[dict[str, float], str]:
    """Return the median of each variant, or why there is none."""
    if example is None:
        return {}, "Not timed: the test calls neither the task's forward nor that of its one network"
    if any(p.device.type != "cpu" for model in variants.values() for p in model.parameters()):
        return {}, "Not timed: the model is not on the CPU"
    try:
        inputs = example.of_batch(batch)
    except ValueError as error:
        return {}, f"Not timed: {error}"
    cases = {name: _case(inputs, model) for name, model in variants.items()}
    try:
        return interleaved(cases, _ROUNDS, "", seconds=_SECONDS), ""
    except Exception as error:  # noqa: BLE001 - the user's forward outside of a Trainer, at a batch it never saw
        told = str(error).partition("\n")[0]
        return {}, f"Not timed: a forward pass of batch {batch} raised {type(error).__name__}: {told}"


def _case(inputs: Example, model: nn.Module) -> Callable[[], Any]:
    def run() -> Any:
        with torch.inference_mode():
            return inputs.call(model)

    return run


@contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _why(execution: Mapping[str, int]) -> str:
    """Return which layers compute in float and why, or what else costs the time."""
    reasons = {
        name.removeprefix("reference: "): count for name, count in execution.items() if name.startswith("reference")
    }
    total = sum(execution.values())
    weight_only = sum(count for name, count in execution.items() if name.endswith("weight-only"))
    if not reasons and weight_only == total:
        return (
            f"all {total} layers multiply float inputs by the weight as it is stored, which saves memory, and time for "
            "few tokens alone; quantization=int8 computes with integers"
        )
    if not reasons:
        return f"all {total} layers compute with integers; here quantizing their inputs costs more than that saves"
    listed = "; ".join(f"{reason}: {count}" for reason, count in reasons.items())
    hints = [hint for start, hint in _HINTS.items() if any(reason.startswith(start) for reason in reasons)]
    return f"{sum(reasons.values())} of {total} layers compute in float from their codes ({listed})" + "".join(
        f". {hint[0].upper()}{hint[1:]}" for hint in hints
    )

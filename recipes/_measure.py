"""How a variant of the model does: its test, what it predicted, and its size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn

from lightning_qat.metrics import Agreement, sqnr
from lightning_qat.report import Variant

from ._errors import ConfigError
from ._latency import Example

#: Predictions are compared up to this many numbers (256 MB in float32); more of them say nothing more.
_MOST_NUMBERS = 2**26
#: The Trainer's verb, and what the task and the data need for it.
_EVALUATIONS = (("test", "test_step", "test_dataloader"), ("validate", "validation_step", "val_dataloader"))


@dataclass(frozen=True)
class Measurement:
    """What a test logged, the outputs ``[N, ..., classes]`` of the model in it, and what its first batch was."""

    metrics: dict[str, float]
    outputs: Tensor | None
    example: Example | None = None

    def variant(
        self,
        name: str,
        bytes_on_disk: int | None,
        *,
        like: Measurement | None = None,
        trained: Measurement | None = None,
        milliseconds: Mapping[int, float] | None = None,
    ) -> Variant:
        """Return the row of the final table, compared with the float model and the one that was trained."""
        agreement = None if like is None else self.agreement(like)
        sqnr_db = None if trained is None else self.sqnr_db(trained)
        distance = None if like is None else self.sqnr_db(like)
        return Variant(name, self.metrics, bytes_on_disk, agreement, sqnr_db, milliseconds or {}, distance)

    def agreement(self, other: Measurement) -> float | None:
        """Return the share of equal top-1 predictions, or None where they cannot be compared."""
        pair = self._pair(other)
        if pair is None:
            return None
        metric = Agreement()
        metric.update(*pair)
        return float(metric.compute())

    def sqnr_db(self, reference: Measurement) -> float | None:
        """Return the SQNR of these outputs against those of ``reference``, or None where they cannot be compared."""
        pair = self._pair(reference)
        return None if pair is None else float(sqnr(*pair))

    def _pair(self, reference: Measurement) -> tuple[Tensor, Tensor] | None:
        """Return the outputs of the reference and of this one, or None where they cannot be compared."""
        if self.outputs is None or reference.outputs is None or self.outputs.shape != reference.outputs.shape:
            return None
        return reference.outputs, self.outputs


def measure(task: L.LightningModule, data: L.LightningDataModule, trainer: L.Trainer, *, seed: int) -> Measurement:
    """Test ``task``; every variant sees the same batches in the same order, even where the loader shuffles."""
    L.seed_everything(seed, workers=True, verbose=False)
    run = getattr(trainer, evaluation_step(task, data))
    with _recorded_outputs(task) as recorded:
        logged = run(task, datamodule=data, verbose=False)
    metrics = {name: float(value) for loader in logged for name, value in loader.items()}
    found = [outputs for outputs in (one.joined() for one in recorded) if outputs is not None]
    called = [one.example for one in recorded if one.example is not None]
    return Measurement(metrics, found[0] if found else None, called[0] if called else None)


def evaluation_step(task: L.LightningModule, data: L.LightningDataModule, *, first: str = "test") -> str:
    """Return ``"test"`` or ``"validate"``, whichever the task and the data can do; ``first`` where they can both.

    Raises:
        ConfigError: neither is possible.
    """
    for verb, step, loader in sorted(_EVALUATIONS, key=lambda way: way[0] != first):
        if is_overridden(step, task, L.LightningModule) and is_overridden(loader, data, L.LightningDataModule):
            return verb
    names = f"{type(task).__name__} and {type(data).__name__}"
    raise ConfigError(f"{names} need test_step and test_dataloader, or validation_step and val_dataloader")


def folder_bytes(folder: Path) -> int:
    """Return the size of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


class _Outputs:
    """Outputs of one module's forward, batch after batch, on the CPU, and the arguments of the first.

    Args:
        name: of the module in the task.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.example: Example | None = None
        self._batches: list[Tensor] = []
        self._numbers = 0
        self._usable = True

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the arguments of the first call."""
        if self.example is None:
            self.example = Example.keep(self.name, args, kwargs)

    def add(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """Keep an output; one that is no batch of float vectors makes all of them useless."""
        if not isinstance(output, Tensor) or output.dim() < 2 or not output.is_floating_point():
            self._usable = False
        elif self._numbers < _MOST_NUMBERS:
            self._numbers += output.numel()
            self._batches.append(output.detach().float().cpu())

    def joined(self) -> Tensor | None:
        """Return all of them along the batch, or None."""
        if not self._usable or not self._batches or len({batch.shape[1:] for batch in self._batches}) > 1:
            return None
        return torch.cat(self._batches)


@contextmanager
def _recorded_outputs(task: nn.Module) -> Iterator[list[_Outputs]]:
    """Record what the task's forward returns, and what its network does where a step calls that one instead."""
    networks = [name for name, child in task.named_children() if any(True for _ in child.parameters())]
    recorded, handles = [], []
    for name in ["", *(networks if len(networks) == 1 else [])]:
        recorded.append(_Outputs(name))
        module = task.get_submodule(name)
        handles.append(module.register_forward_pre_hook(recorded[-1].begin, with_kwargs=True))
        handles.append(module.register_forward_hook(recorded[-1].add))
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()

"""How a variant of the model does: its test, what it predicted, and its size."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from os import SEEK_END
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn

from lightning_qat.metrics import SQNR, Agreement, Cosine
from lightning_qat.ptq.freed_memory import return_freed_memory
from lightning_qat.report import Variant

from ._errors import ConfigError
from ._latency import Example

#: Predictions are compared up to this many numbers (256 MB in float32); more of them say nothing more.
_MOST_NUMBERS = 2**26
#: Bytes of predictions that stay in memory; more of them go to a temporary file.
_IN_MEMORY = 2**24
#: Numbers of predictions that are compared at once.
_PIECE = 2**20
#: The Trainer's verb, and what the task and the data need for it.
_EVALUATIONS = (("test", "test_step", "test_dataloader"), ("validate", "validation_step", "val_dataloader"))


@dataclass(frozen=True)
class Measurement:
    """What a test logged, the outputs ``[N, ..., classes]`` of the model in it, and what its first batch was."""

    metrics: dict[str, float]
    outputs: Outputs | None
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
        return self.compared(other, Agreement())

    def sqnr_db(self, reference: Measurement) -> float | None:
        """Return the SQNR of these outputs against those of ``reference``, or None where they cannot be compared."""
        return self.compared(reference, SQNR())

    def compared(self, reference: Measurement, metric: Agreement | Cosine | SQNR) -> float | None:
        """Return a metric of the reference's outputs and these, or None where they cannot be compared."""
        if self.outputs is None or reference.outputs is None or self.outputs.shapes != reference.outputs.shapes:
            return None
        for pair in zip(reference.outputs.vectors(), self.outputs.vectors(), strict=True):
            metric.update(*pair)
        return float(metric.compute())


def measure(task: L.LightningModule, data: L.LightningDataModule, trainer: L.Trainer, *, seed: int) -> Measurement:
    """Test ``task``; every variant sees the same batches in the same order, even where the loader shuffles."""
    L.seed_everything(seed, workers=True, verbose=False)
    run = getattr(trainer, evaluation_step(task, data))
    with _recorded_outputs(task) as recorded:
        logged = run(task, datamodule=data, verbose=False)
    return_freed_memory()  # of SmolLM2's windows it is 47 MB
    metrics = {name: float(value) for loader in logged for name, value in loader.items()}
    found = [one.outputs for one in recorded if one.usable]
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


class Outputs:
    """Batches of float vectors, in their order; in memory, and in a temporary file where they are many.

    Attributes:
        shapes: of the batches.
    """

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self._file = SpooledTemporaryFile(max_size=_IN_MEMORY)  # noqa: SIM115 - it lives as long as this

    def append(self, batch: Tensor) -> None:
        """Keep a batch in float32."""
        self._file.seek(0, SEEK_END)
        for part in batch.detach().float().cpu().flatten().split(_PIECE):  # at once, all would be in memory first
            self._file.write(part.numpy().data)
        self.shapes.append(tuple(batch.shape))

    def vectors(self) -> Iterator[Tensor]:
        """Yield all of them, ``[n, classes]``, a few at a time."""
        place = 0
        for *leading, classes in self.shapes:
            left = math.prod(leading) if classes else 0
            while left:
                count = min(left, max(_PIECE // classes, 1))
                self._file.seek(place)
                read = bytearray(self._file.read(4 * count * classes))
                yield torch.frombuffer(read, dtype=torch.float32).reshape(count, classes)
                place, left = place + len(read), left - count


class _Recorder:
    """Outputs of one module's forward, batch after batch, and the arguments of the first.

    Args:
        name: of the module in the task.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.example: Example | None = None
        self.outputs = Outputs()
        self._vectors = True

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the arguments of the first call."""
        if self.example is None:
            self.example = Example.keep(self.name, args, kwargs)

    def add(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """Keep an output; one that is no batch of float vectors makes all of them useless."""
        if not isinstance(output, Tensor) or output.dim() < 2 or not output.is_floating_point():
            self._vectors = False
        elif sum(map(math.prod, self.outputs.shapes)) < _MOST_NUMBERS:
            self.outputs.append(output)

    @property
    def usable(self) -> bool:
        """Whether there are outputs, of vectors that are alike but for their number."""
        return self._vectors and len({shape[1:] for shape in self.outputs.shapes}) == 1


@contextmanager
def _recorded_outputs(task: nn.Module) -> Iterator[list[_Recorder]]:
    """Record what the task's forward returns, and what its network does where a step calls that one instead."""
    networks = [name for name, child in task.named_children() if any(True for _ in child.parameters())]
    recorded, handles = [], []
    for name in ["", *(networks if len(networks) == 1 else [])]:
        recorded.append(_Recorder(name))
        module = task.get_submodule(name)
        handles.append(module.register_forward_pre_hook(recorded[-1].begin, with_kwargs=True))
        handles.append(module.register_forward_hook(recorded[-1].add))
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()

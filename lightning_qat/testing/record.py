"""What a training run held after each step, and where two runs begin to differ."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint
from torch import Tensor

#: Returns the modules of one run's own callbacks.
MakeCallbacks = Callable[[], Iterable[Callback]]


def digest(value: Any) -> str:
    """Return a digest of a tensor's bits, or the text of anything else."""
    if not isinstance(value, Tensor):
        return repr(value)
    data = value.detach().cpu().contiguous()
    raw = data.reshape(-1).view(torch.uint8).numpy().tobytes() if data.numel() else b""
    return f"{data.dtype}{tuple(data.shape)}{hashlib.blake2b(raw, digest_size=16).hexdigest()}"


def named_leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the tensors, numbers and strings in nested dicts and lists, with dotted names."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from named_leaves(f"{name}.{key}" if name else str(key), item)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from named_leaves(f"{name}.{index}", item)
    else:
        yield name, value


@dataclass
class Record:
    """Digests by step and name, and the values themselves at the end.

    Args:
        steps: optimizer steps done -> name -> digest.
        last: name -> value after the last of them.
    """

    steps: dict[int, dict[str, str]] = field(default_factory=dict)
    last: dict[str, Any] = field(default_factory=dict)

    def first_difference(self, other: Record) -> str | None:
        """Return, in words, where ``other`` begins to differ, or None; only steps that both have are compared."""
        for step in sorted(self.steps.keys() & other.steps.keys()):
            mine, theirs = self.steps[step], other.steps[step]
            found = [name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name)]
            if found:
                others = f" and {len(found) - 1} more" if len(found) > 1 else ""
                return f"after step {step}: {self._shown(found[0], mine, other, theirs)}{others}"
        return None

    def _shown(self, name: str, mine: dict[str, str], other: Record, theirs: dict[str, str]) -> str:
        if name not in mine or name not in theirs:
            return f"{name!r} is in one of the runs only"
        a, b = self.last.get(name), other.last.get(name)
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            return f"{name!r} is {mine[name]} and {theirs[name]}"
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"{name!r} is {tuple(a.shape)} {a.dtype} and {tuple(b.shape)} {b.dtype}"
        difference = (a.double() - b.double()).abs()
        size = difference.max().item() if difference.numel() else 0.0
        return (
            f"{name!r} (at the end of the runs by at most {size:.3g} in {int((a != b).sum())} of {a.numel()} elements)"
        )


class Recorder(Callback):
    """Records what ``select`` returns after each optimizer step.

    Args:
        select: called as ``select(trainer, module)``; yields names and values.
        loss: record the loss and validation metrics too.
    """

    def __init__(
        self, select: Callable[[pl.Trainer, pl.LightningModule], Iterable[tuple[str, Any]]], *, loss: bool = True
    ) -> None:
        super().__init__()
        self.select, self.loss = select, loss
        self.record = Record()
        self._recorded = -1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # A resumed run has this step behind it; with accumulation its first batches belong to the next one.
        self._recorded = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._recorded:
            return  # gradients are being accumulated
        self._recorded = trainer.global_step
        values = dict(self.select(trainer, pl_module))
        if self.loss:
            values["the loss"] = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        self.record.steps[trainer.global_step] = {name: digest(value) for name, value in values.items()}
        self.record.last = {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in values.items()}

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.loss or trainer.sanity_checking or trainer.global_step not in self.record.steps:
            return
        measured = trainer._logger_connector.metrics["callback"]
        found = {f"the validation metric {name}": value for name, value in measured.items()}
        self.record.steps[trainer.global_step].update((name, digest(value)) for name, value in found.items())
        self.record.last.update((name, value.detach().clone()) for name, value in found.items())


class Interrupted(Exception):  # noqa: N818 - it is no error
    """A run was broken off on purpose."""


class Interruption(Checkpoint):
    """Saves at a step, after all other callbacks, and breaks the run off.

    At the end of an epoch it does so after the epoch's validation, where any loader can go on.
    """

    def __init__(self, step: int, path: str) -> None:
        super().__init__()
        self.step, self.path = step, path
        self.in_mid_epoch = False

    def _break_off(self, trainer: pl.Trainer) -> None:
        trainer.save_checkpoint(self.path)
        raise Interrupted

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step >= self.step and not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            self.in_mid_epoch = True
            self._break_off(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step >= self.step:
            self._break_off(trainer)

"""Is a run that was interrupted and resumed the run that never stopped?"""

from __future__ import annotations

import contextlib
import random
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_qat.testing.record import Interrupted, Interruption, MakeCallbacks, Record, Recorder, named_leaves

#: Other initial weights for the resumed run, so that what a checkpoint forgets shows.
_OTHER_SEED = 1000


class _RandomState(Callback):
    """Puts the random state back when a run goes on, which Lightning does not: dropout would differ without us.

    At the end of an epoch that is before the loader's order is drawn anew, in mid-epoch before the next batch.
    """

    def __init__(self) -> None:
        super().__init__()
        self.saved: dict[str, Any] | None = None
        self.in_mid_epoch = False

    def keep(self) -> None:
        """Keep the state of now for the run that goes on."""
        self.saved = _collect_rng_states()

    def _put_back(self) -> None:
        if self.saved is not None:
            _set_rng_states(self.saved)
            self.saved = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.in_mid_epoch:
            self._put_back()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._put_back()


def assert_resume_exact(
    make_module: Callable[[], pl.LightningModule],
    make_data: Callable[[], Any],
    callbacks: MakeCallbacks,
    interrupt_at: Sequence[int],
    *,
    folder: str | Path | None = None,
    witness: bool = True,
    seed: int = 0,
    **trainer_options: Any,
) -> None:
    """Assert that a run broken off and resumed ends as the uninterrupted one, bit for bit.

    After every step module, optimizers, schedulers and the loss are compared, and after every validation its metrics.
    A new module with other initial weights loads the checkpoint; the random state is put back for it, as Lightning
    does not.

    Args:
        make_module: returns a new module.
        make_data: returns new data: a ``LightningDataModule``, a training loader, or a tuple of a training and a
            validation loader.
        callbacks: returns new quantization callbacks for a Trainer.
        interrupt_at: optimizer steps after which to break off; in mid-epoch the loader needs a ``state_dict``, such as
            torchdata's ``StatefulDataLoader``.
        folder: where checkpoints go for the time being; None is a temporary folder.
        witness: assert first that the module resumes exactly without the callbacks.
        seed: of the random numbers.
        **trainer_options: of the Trainer; two epochs on a CPU unless they say otherwise.

    Raises:
        AssertionError: naming the step of the break and the first step and tensor that differ.
        ValueError: the run does not get as far as a step to interrupt at.
    """
    runs = [("without the quantization callbacks", list)] if witness else []
    with contextlib.ExitStack() as stack:
        where = Path(stack.enter_context(tempfile.TemporaryDirectory()) if folder is None else folder)
        for what, make_callbacks in [*runs, ("", callbacks)]:
            harness = _Harness(make_module, make_data, make_callbacks, where, seed, trainer_options)
            whole = harness.whole()
            for step in interrupt_at:
                resumed, in_mid_epoch = harness.broken(step, whole)
                difference = whole.first_difference(resumed)
                if difference is not None:
                    raise AssertionError(_message(step, difference, what, in_mid_epoch))


def _message(step: int, difference: str, what: str, in_mid_epoch: bool) -> str:
    text = f"interrupted after step {step} and resumed, the run differs from the uninterrupted one {difference}"
    if not what:
        return text
    text = f"{what}, {text}. That is plain Lightning, so quantization is not the cause; "
    if in_mid_epoch:
        return text + (
            "a loader without state_dict starts its epoch anew: use one with it (torchdata's StatefulDataLoader), or "
            "interrupt at the end of an epoch"
        )
    return text + "the module or its data keeps something that is not in the checkpoint"


class _Harness:
    def __init__(
        self,
        make_module: Callable[[], pl.LightningModule],
        make_data: Callable[[], Any],
        callbacks: MakeCallbacks,
        folder: Path,
        seed: int,
        options: dict[str, Any],
    ) -> None:
        self.make_module, self.make_data, self.callbacks = make_module, make_data, callbacks
        self.folder, self.seed, self.options = folder, seed, options

    def whole(self) -> Record:
        recorder = Recorder(_everything)
        with seeded(self.seed):
            module, data = self.make_module(), self.make_data()
            fit(self._trainer(recorder), module, data)
        return recorder.record

    def broken(self, step: int, whole: Record) -> tuple[Record, bool]:
        """Return the record of the run that went on, and whether it was broken off in mid-epoch."""
        if step >= max(whole.steps, default=0) or step < 1:
            raise ValueError(
                f"interrupt_at={step}: the run takes {max(whole.steps, default=0)} steps; use steps from 1 to one "
                "before that, or let it be longer with max_epochs=..."
            )
        path = self.folder / f"interrupted_{step}.ckpt"
        interruption, random_state = Interruption(step, str(path)), _RandomState()
        with seeded(self.seed):
            module, data = self.make_module(), self.make_data()
            with contextlib.suppress(Interrupted):
                fit(self._trainer(Recorder(_everything), interruption), module, data)
            random_state.keep()
        random_state.in_mid_epoch = interruption.in_mid_epoch
        recorder = Recorder(_everything)
        with seeded(self.seed + _OTHER_SEED):
            module = self.make_module()
        with seeded(self.seed):
            data = self.make_data()
            fit(self._trainer(recorder, first=random_state), module, data, ckpt_path=str(path))
        path.unlink()
        missing = [s for s in whole.steps if s > step and s not in recorder.record.steps]
        if missing:
            recorder.record.steps[missing[0]] = {}  # told as a difference
        return recorder.record, interruption.in_mid_epoch

    def _trainer(self, *added: Callback, first: Callback | None = None) -> pl.Trainer:
        before = [] if first is None else [first]  # a callback may draw random numbers before a batch
        return quiet_trainer(self.folder, [*before, *self.callbacks(), *added], self.options)


def quiet_trainer(folder: Path, callbacks: list[Callback], options: dict[str, Any]) -> pl.Trainer:
    """Return a Trainer of two epochs on a CPU that writes nothing, unless ``options`` say otherwise."""
    defaults: dict[str, Any] = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
    }
    chosen = {**defaults, **options}
    more = list(chosen.pop("callbacks", None) or ())
    if not any(isinstance(callback, Checkpoint) for callback in (*callbacks, *more)):
        chosen.setdefault("enable_checkpointing", False)
    return pl.Trainer(callbacks=[*callbacks, *more], **chosen)


def fit(trainer: pl.Trainer, module: pl.LightningModule, data: Any, **options: Any) -> None:
    """Fit with ``data`` as a caller's ``make_data`` returns it."""
    if isinstance(data, pl.LightningDataModule):
        trainer.fit(module, datamodule=data, **options)
    elif isinstance(data, tuple):
        trainer.fit(module, *data, **options)
    else:
        trainer.fit(module, data, **options)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Begin with the same random numbers, and leave the caller's as they are."""
    with isolate_rng():
        random.seed(seed)
        torch.manual_seed(seed)
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed(seed)
        yield


def _everything(trainer: pl.Trainer, module: pl.LightningModule) -> Iterator[tuple[str, Any]]:
    yield from named_leaves("", module.state_dict())
    for index, optimizer in enumerate(trainer.optimizers):
        yield from named_leaves(f"optimizer {index}", optimizer.state_dict())
    for index, config in enumerate(trainer.lr_scheduler_configs):
        yield from named_leaves(f"scheduler {index}", config.scheduler.state_dict())

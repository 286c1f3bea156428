"""A run interrupted anywhere and resumed ends as the run that never stopped, in every bit.

Lightning decides what can be exact at all, so each kind of interruption is first proved on plain float training:
that it loses nothing there is the witness for ours.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from classifier import Classifier, StopBeforeEpoch, data, loader, trainer
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.loggers.logger import Logger
from torch.utils.data import DataLoader, DistributedSampler
from torchdata.stateful_dataloader import StatefulDataLoader

import lightning_qat as lq

SCHEDULES = {
    "float": (list, {}),
    "delayed start and freeze": (
        lambda: [lq.QuantizationAwareTraining(lq.QATConfig("int8", start_step=0.25, freeze_step="1.5 epochs"))],
        {},
    ),
    "progressive bits": (
        lambda: [lq.ProgressiveBitReduction({0: 16, 4: 8, 9: 4}, activations=True), lq.ObserverCalibration(2)],
        {"val_check_interval": 3},
    ),
    "accumulation": (
        lambda: [
            lq.QuantizationAwareTraining("int8"),
            lq.BatchNormFolding(freeze_step=4),
            lq.FreezeQuantization(0.7, batch_norm=False),
        ],
        {"accumulate_grad_batches": 2, "max_epochs": 3},
    ),
}
OURS = [name for name in SCHEDULES if name != "float"]


class Rows(Logger):
    """Keeps what is logged."""

    name, version = "rows", 0

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, *_, **__):
        pass


class Scheduled(Classifier):
    """With an optimizer and a learning rate that have a history of their own."""

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.02)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 24)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def positioned():
    return StatefulDataLoader(data(24), batch_size=4, shuffle=True)


class Run:
    """A fit, and all that it leaves behind."""

    def __init__(self, folder, callbacks, make_loader=positioned, ckpt_path=None, error=(), seed=0, **options):
        L.seed_everything(5, verbose=False)
        self.module, self.logger = Scheduled(seed=seed), Rows()
        saves = any(isinstance(callback, Checkpoint) for callback in callbacks)
        options = {"max_epochs": 2, "enable_checkpointing": saves, **options}
        self.trainer = trainer(folder, callbacks, logger=self.logger, **options)
        arguments = (self.module, make_loader(), loader(8, seed=1))
        resume = {"ckpt_path": ckpt_path, "weights_only": True} if ckpt_path else {}
        self.began = torch.load(ckpt_path, weights_only=True)["global_step"] if ckpt_path else 0
        if error:
            with pytest.raises(error):
                self.trainer.fit(*arguments, **resume)
        else:
            self.trainer.fit(*arguments, **resume)

    def state(self):
        (scheduler,) = self.trainer.lr_scheduler_configs
        return {
            "module": dict(self.module.state_dict()),
            "optimizer": self.trainer.optimizers[0].state_dict(),
            "scheduler": scheduler.scheduler.state_dict(),
            "metrics": dict(self.trainer.callback_metrics),
            "step": self.trainer.global_step,
            "phase": self.module.phase(),
        }


def differences(one, other, path=""):
    """Return where two trees of tensors and builtins differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        found = [f"{path}.{key} is in one only" for key in one.keys() ^ other.keys()]
        return found + [
            d for key in one.keys() & other.keys() for d in differences(one[key], other[key], f"{path}.{key}")
        ]
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        found = [] if len(one) == len(other) else [f"{path}: {len(one)} and {len(other)} entries"]
        return found + [
            d for i, (a, b) in enumerate(zip(one, other, strict=False)) for d in differences(a, b, f"{path}[{i}]")
        ]
    same = torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    return [] if same and type(one) is type(other) else [f"{path}: {one} and {other}"]


def assert_same_end(resumed, whole):
    """Compare states, and the rows that the resumed run still had to log."""
    assert differences(resumed.state(), whole.state()) == []
    rest = [(step, row) for step, row in whole.logger.rows if step >= resumed.began]
    assert differences(resumed.logger.rows, rest) == []


def settings(schedule):
    """Return its callbacks and options; those of float training under the same options."""
    callbacks, options = SCHEDULES[schedule]
    return callbacks, options, {"float": list, schedule: callbacks}


@pytest.mark.parametrize("schedule", OURS)
def test_a_run_resumed_at_any_step_ends_in_the_same_bits(tmp_path, schedule):
    """One checkpoint after every optimizer step but an epoch's last, resumed each: 10, 10 and 6 interruptions.

    There, Lightning itself does not go on where it was: it restores an exhausted loader and skips an epoch. An
    epoch's end is the next test's.
    """
    _, options, runs = settings(schedule)
    per_epoch = 6 // options.get("accumulate_grad_batches", 1)
    for name, callbacks in runs.items():
        whole = Run(tmp_path, callbacks(), **options)
        saver = ModelCheckpoint(tmp_path / name, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        assert_same_end(Run(tmp_path, [*callbacks(), saver], **options), whole)
        for step in (s for s in range(1, whole.trainer.global_step) if s % per_epoch):
            path = tmp_path / name / f"step={step}.ckpt"
            assert_same_end(Run(tmp_path, callbacks(), ckpt_path=path, seed=7, **options), whole)


@pytest.mark.parametrize("schedule", ["progressive bits"])
def test_a_run_resumed_from_a_validation_ends_in_the_same_bits(tmp_path, schedule):
    """What ``ModelCheckpoint(monitor=...)`` writes after a validation in mid-epoch, with the kept weights in use."""
    _, options, runs = settings(schedule)
    for name, callbacks in runs.items():
        whole = Run(tmp_path, callbacks(), **options)
        saver = ModelCheckpoint(tmp_path / name, "{step}", monitor="val/loss", save_top_k=-1)
        assert_same_end(Run(tmp_path, [*callbacks(), saver], **options), whole)
        for step in (3, 9):
            path = tmp_path / name / f"step={step}.ckpt"
            assert_same_end(Run(tmp_path, callbacks(), ckpt_path=path, seed=7, **options), whole)


class SaveAtStart(Callback):
    """Saves before the callbacks behind it begin: before calibration."""

    def __init__(self, path):
        self.path = path

    def on_train_start(self, trainer, pl_module):
        trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("schedule", OURS)
def test_a_run_resumed_before_calibration_calibrates(tmp_path, schedule):
    _, options, runs = settings(schedule)
    for name, callbacks in runs.items():
        path = tmp_path / f"{name}.ckpt"
        whole = Run(tmp_path, [SaveAtStart(path), *callbacks()], **options)
        assert_same_end(Run(tmp_path, callbacks(), ckpt_path=path, seed=0, **options), whole)


class BreaksOff(Callback):
    """Breaks off at the start of a batch, in the middle of gradient accumulation."""

    def __init__(self, batch):
        self.batch = batch

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.fit_loop.total_batch_idx == self.batch:
            raise RuntimeError("out of memory")


@pytest.mark.parametrize("batch", [3, 9, 11])
def test_a_run_broken_off_while_gradients_accumulate_goes_on_from_its_last_step(tmp_path, batch):
    _, options, runs = settings("accumulation")
    for name, callbacks in runs.items():
        whole = Run(tmp_path, callbacks(), **options)
        saver = ModelCheckpoint(tmp_path / name, filename="last", every_n_train_steps=1)
        Run(tmp_path, [BreaksOff(batch), *callbacks(), saver], error=RuntimeError, **options)
        path = tmp_path / name / "last.ckpt"
        assert torch.load(path, weights_only=True)["global_step"] == batch // 2
        assert_same_end(Run(tmp_path, callbacks(), ckpt_path=path, seed=7, **options), whole)


def shuffled_by_epoch():
    samples = data(24)
    return DataLoader(samples, 4, sampler=DistributedSampler(samples, num_replicas=1, rank=0, seed=3))


def positioned_in_order():
    return StatefulDataLoader(data(24), batch_size=4)


@pytest.mark.parametrize(
    ("schedule", "make_loader"), list(zip(OURS, (loader, shuffled_by_epoch, positioned_in_order), strict=True))
)
def test_a_run_resumed_at_an_epochs_end_ends_in_the_same_bits(tmp_path, schedule, make_loader):
    """With any loader whose order does not hang on the random state, which Lightning does not restore."""
    _, options, runs = settings(schedule)
    for name, callbacks in runs.items():
        everything = {**options, "max_epochs": 3, "num_sanity_val_steps": 2}
        whole = Run(tmp_path, callbacks(), make_loader, **everything)
        for stop in (1, 2):
            saver = ModelCheckpoint(tmp_path / name, filename=f"{stop}", save_on_train_epoch_end=True)
            stopped = [StopBeforeEpoch(stop), *callbacks(), saver]
            Run(tmp_path, stopped, make_loader, error=(KeyboardInterrupt, SystemExit), **everything)
            path = tmp_path / name / f"{stop}.ckpt"
            assert_same_end(Run(tmp_path, callbacks(), make_loader, path, seed=7, **everything), whole)


class FailsInCalibration(lq.ObserverCalibration):
    """Its first calibration breaks off after a batch, as on a node that dies."""

    def __init__(self):
        super().__init__(3, forward=self.run)
        self.seen = 0

    def run(self, module, batch):
        self.seen += 1
        if self.seen == 2:
            raise RuntimeError("node died")
        module(batch[0])


def test_a_calibration_that_broke_off_is_done_again(tmp_path):
    """Its checkpoint must not pass for that of a calibrated run."""
    whole = Run(tmp_path, [lq.ObserverCalibration(3)])
    callback = FailsInCalibration()
    broken = Run(tmp_path, [callback, OnExceptionCheckpoint(tmp_path)], error=RuntimeError)
    assert not broken.module.conv.input_quantizer.calibrated
    assert_same_end(Run(tmp_path, [lq.ObserverCalibration(3)], ckpt_path=tmp_path / "on_exception.ckpt"), whole)


KILLED = """
import os, signal, sys
sys.path[:0] = [{tests!r}, {here!r}]
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from test_resume_exact import Run, SCHEDULES

class Kills(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == {step}:
            os.kill(os.getpid(), signal.SIGKILL)

torch.set_num_threads(1)
callbacks, options = SCHEDULES[{schedule!r}][0], {options!r}
saver = ModelCheckpoint({folder!r}, save_last=True, every_n_train_steps=1)
Run({folder!r}, [Kills(), *callbacks(), saver], **options)
"""


@pytest.mark.parametrize(("schedule", "step"), [("progressive bits", 9)])
def test_a_killed_process_is_resumed_from_its_last_checkpoint(tmp_path, schedule, step):
    """SIGKILL leaves no time for anything; the run goes on in another process. Witness: killed float training."""
    here = Path(__file__).parent
    _, options, runs = settings(schedule)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    processes = {}
    for name in runs:
        names = {"tests": str(here.parent), "here": str(here), "folder": str(tmp_path / name)}
        script = KILLED.format(**names, step=step, schedule=name, options=options)
        processes[name] = subprocess.Popen(
            [sys.executable, "-c", script],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
    for name, callbacks in runs.items():
        _, errors = processes[name].communicate()
        assert processes[name].returncode == -signal.SIGKILL, errors[-2000:]
        whole = Run(tmp_path, callbacks(), **options)
        path = tmp_path / name / "last.ckpt"
        assert_same_end(Run(tmp_path, callbacks(), ckpt_path=path, seed=7, **options), whole)

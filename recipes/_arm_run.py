"""Running one arm of a comparison, so that a run killed at any moment goes on and ends as if it had not been."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint

from lightning_qat.transforms import parity_report, save_quantized

from ._arms import SHARED, Arm
from ._build import Parts
from ._convert import convert_verified
from ._errors import ConfigError
from ._files import FLOAT_WEIGHTS, MODEL, load_weights, save_weights
from ._ledger import write_text
from ._measure import Measurement, folder_bytes, measure
from .train import quantize_after_training

logger = logging.getLogger(__name__)

_LAST = "last.ckpt"
_MARK = "fingerprint.json"


class EpochCheckpoint(Checkpoint):
    """Keep the last epoch's end as one file, and let the random state be a function of seed, epoch and batch.

    ``ModelCheckpoint`` goes through a temporary file that may lie on another disk, where replacing is copying: a
    file half written when the process is killed. A checkpoint holds no random state, so a model with dropout
    would go on with other numbers than in a run that was not interrupted. (What a loader draws for the first batch
    after going on stays its own: Lightning makes its iterator at another moment then.)

    Args:
        path: of the file.
        seed: of the run.
    """

    def __init__(self, path: Path, seed: int) -> None:
        self.path = path
        self.seed = seed

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        mixed = random.Random(f"{self.seed} {trainer.current_epoch} {batch_idx}").getrandbits(32)
        L.seed_everything(mixed, verbose=False)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        partial = self.path.with_name(f".{self.path.name}.partial")
        trainer.save_checkpoint(partial)
        if trainer.is_global_zero:
            os.replace(partial, self.path)


def open_folder(folder: Path, fingerprint: Mapping[str, str]) -> None:
    """Make the folder of an arm; one of another config, other data or other code is emptied.

    Raises:
        ConfigError: a folder with files is there that no comparison made.
    """
    if _holds(folder, fingerprint):
        return
    mark = folder / _MARK
    if mark.is_file():
        # Moved first: a folder that is only half removed must not pass for one of an arm that goes on.
        old = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        shutil.rmtree(old)
    elif folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise ConfigError(f"{folder} is there and not of `lightning-qat compare`; move it or give another output_dir")
    write_text(mark, json.dumps(dict(fingerprint), indent=1))


def weights_of(folder: Path, name: str) -> Path:
    """Return where the float weights of an arm, or of the shared float fit, are kept in the folder of a seed."""
    return folder / name / FLOAT_WEIGHTS


def has_weights(folder: Path, name: str, fingerprint: Mapping[str, str]) -> bool:
    """Return whether those weights are there, and of this config, data and code."""
    return _holds(folder / name, fingerprint) and weights_of(folder, name).is_file()


def _holds(folder: Path, fingerprint: Mapping[str, str]) -> bool:
    mark = folder / _MARK
    return mark.is_file() and mark.read_text(encoding="utf-8") == json.dumps(dict(fingerprint), indent=1)


def run_shared(parts: Parts, folder: Path) -> dict[str, Any]:
    """Train in float what all arms of a seed go on from; return how it does."""
    task = parts.task()
    _fit(parts, parts.float_trainer, task, folder / SHARED)
    return _measured_float(parts, task, weights_of(folder, SHARED), parts.cfg.float_fit)


def run_arm(parts: Parts, arm: Arm, folder: Path) -> dict[str, Any]:
    """Do what an arm does in the folder of its seed; return how the result does."""
    own = folder / arm.name
    task = parts.task(**({} if arm.after is not None else parts.cfg.qat_task))
    load_weights(task, weights_of(folder, arm.after or SHARED))
    if arm.after is not None:
        converted = quantize_after_training(parts, task)  # which leaves ``task`` calibrated
        return _measured_integers(parts, task, converted, own, {"max_epochs": 0})
    _fit(parts, parts.qat_trainer, task, own)
    if arm.quantization is None:
        return _measured_float(parts, task, weights_of(folder, arm.name), parts.cfg.qat_fit)
    return _measured_integers(parts, task, convert_verified(parts, task), own, parts.cfg.qat_fit)


def forget_progress(folder: Path) -> None:
    """Remove what only an interrupted arm needs."""
    (folder / _LAST).unlink(missing_ok=True)


def _fit(parts: Parts, trainer: L.Trainer, task: L.LightningModule, folder: Path) -> None:
    last = folder / _LAST
    trainer.callbacks.append(EpochCheckpoint(last, parts.cfg.seed))  # type: ignore[attr-defined]
    if last.is_file():
        logger.info("going on from %s", last)
    trainer.fit(task, datamodule=parts.data, ckpt_path=last if last.is_file() else None, weights_only=True)


def _measured_float(parts: Parts, task: L.LightningModule, path: Path, fit: Any) -> dict[str, Any]:
    partial = path.with_name(f".{path.name}.partial")
    size = save_weights(task, partial)
    os.replace(partial, path)
    test = measure(task, parts.data, parts.test_trainer, seed=parts.cfg.seed)
    return {"metrics": test.metrics, "bytes": size, "epochs": fit.get("max_epochs")}


def _measured_integers(
    parts: Parts, task: L.LightningModule, converted: L.LightningModule, folder: Path, fit: Any
) -> dict[str, Any]:
    """Save a verified converted model and compare it, over the whole test, with what it was converted from."""
    size = folder_bytes(save_quantized(converted, folder / MODEL))
    trained: Measurement = measure(task, parts.data, parts.test_trainer, seed=parts.cfg.seed)
    test = measure(converted, parts.data, parts.test_trainer, seed=parts.cfg.seed)
    report = parity_report(converted)
    return {
        "metrics": test.metrics,
        "fake_quantized_metrics": trained.metrics,
        "same_top1_as_fake_quantized": test.agreement(trained),
        "sqnr_db": test.sqnr_db(trained),
        "certificate": None if report is None else report.summary(),
        "bytes": size,
        "epochs": fit.get("max_epochs"),
    }

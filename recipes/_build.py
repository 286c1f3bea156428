"""From a config to the objects of a run: the only place that instantiates, and everything is checked once, here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback, Checkpoint, ProgressBar
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from lightning_qat.config import QuantizationPlan, check_int, resolve_plan
from lightning_qat.tracking import Tracker
from lightning_qat.transforms.prepare import prepare

from ._errors import ConfigError
from ._measure import evaluation_step
from ._targets import check_targets, explain_call, locate

#: What a class raises when it cannot work with what it was given; anything else keeps its traceback.
_REFUSALS = (ValueError, TypeError, OSError, ImportError)


@dataclass(frozen=True)
class Parts:
    """The objects of a run, fit for each other."""

    cfg: DictConfig
    data: L.LightningDataModule
    plan: QuantizationPlan
    float_trainer: L.Trainer
    qat_trainer: L.Trainer
    calibration_trainer: L.Trainer
    parity_trainer: L.Trainer
    test_trainer: L.Trainer
    tracker: Tracker
    output_dir: Path

    def task(self, weights: Mapping[str, Tensor] | None = None, **changes: Any) -> L.LightningModule:
        """Seed all random numbers and return a new float task, with ``weights`` where given."""
        L.seed_everything(self.cfg.seed, workers=True, verbose=False)
        return make_task(self.cfg.task, weights, **changes)

    @contextmanager
    def tracked(self) -> Iterator[Tracker]:
        """Have the fits inside logged; the tracker is finished on leaving, however that happens."""
        self.tracker.start({str(key): value for key, value in _builtins(self.cfg).items()})
        failed = True
        try:
            for trainer, stage in ((self.float_trainer, "float"), (self.qat_trainer, "qat")):
                logger = self.tracker.logger(stage)
                trainer.loggers = [] if isinstance(logger, bool) else [logger]
            yield self.tracker
            failed = False
        finally:
            self.tracker.finish(failed=failed)


def build(cfg: DictConfig) -> Parts:
    """Make everything that ``lightning-qat train`` needs.

    Raises:
        ConfigError: a class, an argument or a value is wrong; nothing was trained yet.
    """
    plan = check(cfg)
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    data = make_data(cfg.data)
    evaluation_step(make_task(cfg.task), data)  # raises where the two cannot be tested together
    every_fit, qat_fit = (cfg.callbacks.get(key) or {} for key in ("every_fit", "qat_fit"))
    callbacks = make_callbacks(every_fit, "callbacks.every_fit")
    # Tensors made in inference mode could not be worked with later: ranges found, weights unpacked.
    plain = {"inference_mode": False, "enable_progress_bar": False}
    return Parts(
        cfg=cfg,
        data=data,
        plan=plan,
        float_trainer=make_trainer(cfg.trainer, callbacks, **cfg.float_fit),
        qat_trainer=make_trainer(
            cfg.trainer,
            make_callbacks(every_fit, "callbacks.every_fit") + make_callbacks(qat_fit, "callbacks.qat_fit"),
            **cfg.qat_fit,
        ),
        calibration_trainer=make_trainer(cfg.trainer, [], **plain, **_evaluation_limits(cfg.calibration_batches)),
        parity_trainer=make_trainer(cfg.trainer, [], **plain, **_evaluation_limits(cfg.parity.batches)),
        test_trainer=make_test_trainer(cfg),
        tracker=make(cfg.logger, "logger"),
        output_dir=Path(cfg.output_dir),
    )


def check(cfg: DictConfig) -> QuantizationPlan:
    """Return the plan of a config whose names, arguments and values fit; raise :class:`ConfigError` otherwise.

    The cheap half of :func:`build`: it makes the task (twice) and the plan, and reads no data.
    """
    for part in ("data", "model", "task", "quantization", "trainer", "callbacks", "logger"):
        check_targets(cfg[part], part)
    check_targets(_merged(cfg.task, cfg.qat_task), "qat_task")
    for fit in ("float_fit", "qat_fit"):
        check_targets(_merged(cfg.trainer, cfg[fit]), fit)
    try:
        check_int("calibration_batches", cfg.calibration_batches, 1)
        check_int("parity.batches", cfg.parity.batches, 1)
        for name in ("layer_threshold", "metric_tolerance"):
            _check_number(f"parity.{name}", cfg.parity[name])
        if cfg.threads is not None:
            check_int("threads", cfg.threads, 1)
        plan = resolve_plan(make(cfg.quantization, "quantization"))
        prepare(make_task(cfg.task), plan)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    make_task(cfg.task, **cfg.qat_task)
    if cfg.float_checkpoint is not None and not Path(cfg.float_checkpoint).is_file():
        raise ConfigError(f"float_checkpoint={cfg.float_checkpoint!r} is no file")
    return plan


def make(node: Any, where: str, **arguments: Any) -> Any:
    """Instantiate a part of the config, its own parts first.

    Args:
        node: holds ``_target_``.
        where: its name in messages.
        **arguments: more of the target's, or instead of those in ``node``.

    Raises:
        ConfigError: the class refused what it was given.
    """
    try:
        return instantiate(node, **arguments, _convert_="all")
    except InstantiationException as error:
        cause = error.__cause__
        if cause is not None and not isinstance(cause, _REFUSALS):
            raise
        told = explain_call(locate(str(node._target_), where), cause) if cause is not None else str(error)
        raise ConfigError(f"{where}: {told}") from error


def make_task(node: DictConfig, weights: Mapping[str, Tensor] | None = None, **changes: Any) -> L.LightningModule:
    """Return the task of a config in float, with ``weights`` where given."""
    task = make(node, "task", **changes)
    if not isinstance(task, L.LightningModule):
        raise ConfigError(f"task._target_={node._target_!r} made a {type(task).__name__}; it must be a LightningModule")
    task.configure_model()  # layers that are built late; a second call does nothing by Lightning's rules
    if weights is not None:
        task.load_state_dict(weights)
    return task


def make_data(node: DictConfig, **changes: Any) -> L.LightningDataModule:
    """Return the data module of a config, with its data read."""
    data = make(node, "data", **changes)
    if not isinstance(data, L.LightningDataModule):
        raise ConfigError(f"data._target_={node._target_!r} made a {type(data).__name__}, not a LightningDataModule")
    try:
        data.prepare_data()
        data.setup("fit")
    except (ValueError, OSError, ImportError) as error:
        raise ConfigError(f"data: {error}") from error
    return data


def make_callbacks(node: Mapping[str, Any] | None, where: str) -> list[Callback]:
    """Return the callbacks under the names of ``node``, in their order."""
    made = []
    for name, callback in (node or {}).items():
        made.append(make(callback, f"{where}.{name}"))
        if not isinstance(made[-1], Callback):
            raise ConfigError(f"{where}.{name} made a {type(made[-1]).__name__}, not a Lightning Callback")
    return made


def make_trainer(node: DictConfig, callbacks: Sequence[Callback], **changes: Any) -> L.Trainer:
    """Return a Trainer without a logger; it keeps checkpoints only where a callback says how."""
    checkpointing = any(isinstance(callback, Checkpoint) for callback in callbacks)
    arguments = {"enable_checkpointing": checkpointing, "enable_model_summary": False, "logger": False, **changes}
    trainer = make(node, "trainer", callbacks=list(callbacks), **arguments)
    if not isinstance(trainer, L.Trainer):
        raise ConfigError(f"trainer._target_={node._target_!r} made a {type(trainer).__name__}, not a Trainer")
    return trainer


def make_test_trainer(cfg: DictConfig) -> L.Trainer:
    """Return the Trainer that tests every variant of the model; of the callbacks it has the progress bar."""
    callbacks = make_callbacks(cfg.get("callbacks", {}).get("every_fit"), "callbacks.every_fit")
    return make_trainer(cfg.trainer, [callback for callback in callbacks if isinstance(callback, ProgressBar)])


def _evaluation_limits(batches: int) -> dict[str, int]:
    return {"limit_test_batches": batches, "limit_val_batches": batches}


def _check_number(name: str, value: Any) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0):
        raise ConfigError(f"{name}={value!r} must be a number from 0, or null")


def _builtins(cfg: DictConfig) -> dict[Any, Any]:
    found = OmegaConf.to_container(cfg, resolve=True)
    return found if isinstance(found, dict) else {}


def _merged(node: DictConfig, changes: DictConfig) -> DictConfig:
    """Return ``node`` with the entries of ``changes``, which may be new ones."""
    base = OmegaConf.create(OmegaConf.to_container(node, resolve=False))
    merged = OmegaConf.merge(base, OmegaConf.to_container(changes, resolve=False))
    if not isinstance(merged, DictConfig):
        raise ConfigError(f"expected named arguments, got {merged!r}")
    return merged

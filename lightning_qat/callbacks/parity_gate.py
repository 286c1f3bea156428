"""After fit: is the model that would be converted now the one that trained? Told, never raised."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from lightning_qat.callbacks.both_lightnings import in_both, own_class
from lightning_qat.callbacks.calibration_run import (
    batches_of,
    call_step,
    generators_kept,
    inert_steps,
    without_effects,
)
from lightning_qat.transforms.certificate import ParityReport, fingerprint_of, keep_fit_report
from lightning_qat.transforms.convert import convert
from lightning_qat.transforms.parity import check_parity
from lightning_qat.transforms.prepare import qat_layers
from lightning_qat.transforms.ranges import static_quantizers

#: Where each rank holds a part of the weights only, so that no rank can convert.
_SHARDED = ("DeepSpeedStrategy", "FSDPStrategy", "ModelParallelStrategy")


def certify_run(trainer: pl.Trainer, module: pl.LightningModule, batches: int) -> ParityReport | None:
    """Convert a copy of ``module``, compare it with ``module``, and log and return what was found.

    The module's own ``validation_step`` runs on the first batches of the Trainer's validation loader;
    without these, its ``training_step`` on training batches. ``module``, its metrics, the random state
    and the loaders are as they were afterwards. A finished run is worth more than its certificate: what
    fails here is a warning.

    Args:
        trainer: at the end of training.
        module: that trained.
        batches: at most this many.

    Returns:
        The report, or None where there is nothing to convert yet or it could not be compared.
    """
    if is_sharded(trainer) or not _has_trained_quantized(module):
        return None
    try:
        report = _compare(trainer, module, batches)
    except Exception as error:  # noqa: BLE001 - the user's step runs on a copy of the module: anything may come of it
        rank_zero_warn(
            f"the quantized model could not be verified ({type(error).__name__}: {error}); the trained model is not "
            "affected. Try convert(model, verify=batches), or leave it with certify=False"
        )
        return None
    if not report.passed:
        rank_zero_warn(
            f"converted now, the quantized model would not be the trained one: {report.failure()}. The trained model "
            "is not affected; the report is in the certificate attribute of QuantizationAwareTraining"
        )
    _log(trainer, report)
    return report


def is_sharded(trainer: pl.Trainer) -> bool:
    """Whether each rank of ``trainer`` holds a part of the weights only."""
    return any(isinstance(trainer.strategy, in_both(f"strategies.{name}")) for name in _SHARDED)


def _has_trained_quantized(module: nn.Module) -> bool:
    weights = [layer.weight_quantizer for _, layer in qat_layers(module)]
    static = static_quantizers(module)
    observed = not static or any(quantizer.calibrated for quantizer in static)
    return bool(weights) and all(quantizer.quantizing for quantizer in weights) and observed


def _compare(trainer: pl.Trainer, module: pl.LightningModule, batches: int) -> ParityReport:
    loader, step_name, step_context, limit = _loader_and_step(trainer, module)
    logged: dict[bool, dict[str, list[float]]] = {True: {}, False: {}}

    def run(model: nn.Module, item: tuple[Any, int]) -> Any:
        with _recorded_logs(model, logged[model is module]):
            return call_step(getattr(model, step_name), *item)

    with contextlib.ExitStack() as stack:
        stack.enter_context(isolate_rng())
        stack.enter_context(generators_kept(loader.iterables))
        stack.enter_context(_loggers_silent(trainer))
        stack.enter_context(_validating(trainer, step_name))
        stack.enter_context(step_context)
        converted = convert(module)
        fingerprint = fingerprint_of(converted)
        converted.trainer = trainer
        stack.enter_context(without_effects(module))
        stack.enter_context(inert_steps(converted))
        report = check_parity(module, converted, batches_of(trainer, loader, int(min(batches, limit))), run)
    means = {whose: {key: sum(v) / len(v) for key, v in found.items()} for whose, found in logged.items()}
    report = report.with_metrics(means[True], means[False])
    keep_fit_report(module, report, fingerprint)  # what is converted later may be the very same
    return report


def _loader_and_step(
    trainer: pl.Trainer, module: pl.LightningModule
) -> tuple[CombinedLoader, str, contextlib.AbstractContextManager[Any], float]:
    """Return the loader to take batches from, the step to run on them and in which context, and how many there are."""
    fit: Any = trainer.fit_loop
    loader, limit = fit.epoch_loop.val_loop._combined_loader, sum(trainer.num_val_batches)
    if loader is not None and limit and is_overridden("validation_step", module, own_class(module, "LightningModule")):
        return loader, "validation_step", trainer.precision_plugin.val_step_context(), limit
    context = trainer.precision_plugin.train_step_context()
    return fit._combined_loader, "training_step", context, trainer.num_training_batches


@contextlib.contextmanager
def _validating(trainer: pl.Trainer, step_name: str) -> Iterator[None]:
    """Let ``trainer.validating`` be what a ``validation_step`` is used to."""
    stage = trainer.state.stage
    if step_name == "validation_step":
        trainer.validating = True
    try:
        yield
    finally:
        trainer.state.stage = stage


@contextlib.contextmanager
def _loggers_silent(trainer: pl.Trainer) -> Iterator[None]:
    """Steps may write to ``self.logger`` directly: let that go nowhere, as under ``fast_dev_run``."""
    loggers = trainer.loggers
    trainer.loggers = [DummyLogger() for _ in loggers]
    try:
        yield
    finally:
        trainer.loggers = loggers


@contextlib.contextmanager
def _recorded_logs(model: nn.Module, found: dict[str, list[float]]) -> Iterator[None]:
    """Collect the numbers that a step logs; metric objects belong to the module and stay out."""

    def log(name: str, value: Any, *_: Any, **__: Any) -> None:
        if isinstance(value, (int, float)) or (isinstance(value, torch.Tensor) and value.numel() == 1):
            found.setdefault(name, []).append(float(value))

    def log_dict(dictionary: Any, *_: Any, **__: Any) -> None:
        for name, value in dictionary.items():
            log(name, value)

    before = {name: model.__dict__.get(name) for name in ("log", "log_dict")}
    model.__dict__.update(log=log, log_dict=log_dict)
    try:
        yield
    finally:
        model.__dict__.update(before)


def _log(trainer: pl.Trainer, report: ParityReport) -> None:
    worst = report.worst_layer
    found = {
        "parity/worst_layer_sqnr": None if worst is None else worst.sqnr_db,
        "parity/output_sqnr": report.output_sqnr_db,
    }
    numbers = {name: value for name, value in found.items() if value is not None}
    for logger in trainer.loggers:
        logger.log_metrics(numbers, step=trainer.global_step)

"""Conversion in a recipe: what is saved is what trained, or the recipe stops."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import nn

from lightning_qat.report import Variant, main_metric
from lightning_qat.transforms import ParityReport, attach_report, check_parity, convert

from ._build import Parts
from ._errors import ConfigError
from ._files import TRAINED_WEIGHTS
from ._measure import evaluation_step


def convert_verified(parts: Parts, task: L.LightningModule) -> L.LightningModule:
    """Return ``task`` in integers, verified on validation batches; saving it writes the certificate.

    Raises:
        ConfigError: it is not what trained. The trained weights are kept in the run's folder.
    """
    converted = convert(task)
    report = _verify(parts, task, converted)
    if not report.passed:
        weights = _keep_weights(task, parts.output_dir)
        raise ConfigError(f"the converted model is not the trained one: {report.failure()}. Its weights: {weights}")
    attach_report(converted, report)
    return converted


def _verify(parts: Parts, task: L.LightningModule, converted: L.LightningModule) -> ParityReport:
    trainer, settings = parts.parity_trainer, parts.cfg.parity
    verb = evaluation_step(task, parts.data, first="validate")
    logged: dict[bool, dict[str, float]] = {}

    def run(model: nn.Module, _: Any) -> None:
        L.seed_everything(parts.cfg.seed, workers=True, verbose=False)  # the same batches, even where they are shuffled
        found = getattr(trainer, verb)(model, datamodule=parts.data, verbose=False)
        logged[model is task] = {name: float(value) for loader in found for name, value in loader.items()}

    report = check_parity(task, converted, [None], run, layer_threshold=settings.layer_threshold)
    counts = trainer.num_val_batches if verb == "validate" else trainer.num_test_batches
    metric, tolerance = main_metric([Variant("trained", logged[True])]), settings.metric_tolerance
    tolerances = {metric: float(tolerance)} if metric is not None and tolerance is not None else {}
    return replace(report.with_metrics(logged[True], logged[False], tolerances), batches=int(sum(counts)))


def _keep_weights(task: L.LightningModule, folder: Path) -> Path:
    path = folder / TRAINED_WEIGHTS
    torch.save({"state_dict": task.state_dict()}, path)
    return path

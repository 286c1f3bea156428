"""Quantize a pretrained model after training; compare it with the float one, and save it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import hydra
import lightning as L
import torch
from hydra.errors import InstantiationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from omegaconf import DictConfig, OmegaConf
from torch import nn

from lightning_qat.config import QuantizationPlan, check_int, resolve_plan
from lightning_qat.metrics import Cosine
from lightning_qat.ptq import PTQOptions, WeightFiles, preflight, ptq_report, quantize_model, without_weights
from lightning_qat.ptq.journal import delete_journal
from lightning_qat.ptq.methods import METHODS
from lightning_qat.ptq.preflight import check_tasks
from lightning_qat.report import Variant, main_metric
from lightning_qat.tracking import Tracker
from lightning_qat.transforms import parity_report, save_quantized
from lightning_qat.validation import check_choice

from ._build import make, make_data, make_task, make_test_trainer
from ._errors import ConfigError
from ._files import MODEL, load_weights, save_config
from ._latency import Latency
from ._measure import Measurement, evaluation_step, folder_bytes, measure
from ._ptq_table import LiveTable, show_tasks
from ._show import show
from ._targets import check_targets

logger = logging.getLogger(__name__)


def quantize(cfg: DictConfig) -> list[Variant]:
    """Run the whole recipe and return how the float and the quantized model did."""
    plan, options = check(cfg)  # a wrong config stops here, before any data is read
    out = Path(cfg.output_dir)
    task, data, trainer = float_task(cfg), make_data(cfg.data), make_test_trainer(cfg)
    evaluation_step(task, data)  # raises where the two cannot be tested together
    check_layers(task, plan, cfg.method)
    save_config(cfg, out)
    tracker: Tracker = make(cfg.logger, "logger")
    with tracked(cfg, tracker):
        float_test = None
        if not cfg.stream:
            logger.info("the float model's test")
            float_test = measure(task, data, trainer, seed=cfg.seed)

        batches = calibration_batches(cfg, data)
        logger.info("quantization with %d calibration batches", len(batches))
        journal = None if cfg.journal is None else Path(cfg.journal)
        with LiveTable() as table:
            quantized = quantize_model(
                task,
                plan,
                batches,
                cfg.method,
                forward=forward_of(task),
                options=options,
                verify=cfg.verify,
                observer=table,
                journal=journal,
                weights=weight_files(cfg) if cfg.stream else None,
            )
        size, float_size = folder_bytes(save_quantized(quantized, out / MODEL)), float_bytes(task)
        del task  # its memory is free from when the Trainer has the other one

        logger.info("the quantized model's test")
        quantized_test = measure(quantized, data, trainer, seed=cfg.seed)
        variants = compared(float_test, float_size, quantized_test, size)
        tracker.log_results([variant.row() for variant in variants])
        tracker.log_model(out / MODEL, variants[-1].row())
    report: Any = ptq_report(quantized)
    show(variants, out, parity_report(quantized), Latency(), method=report.method, layers=report.rows())
    clear(journal)
    return variants


def check(cfg: DictConfig) -> tuple[QuantizationPlan, PTQOptions]:
    """Return plan and options of a config whose names, arguments and values fit.

    Raises:
        ConfigError: they do not.
    """
    if cfg.get("qat_fit") is not None:
        raise ConfigError("this recipe trains; run it with `lightning-qat train`, or choose one such as smollm2_gptq")
    for part in ("data", "model", "task", "quantization", "options", "trainer", "logger"):
        check_targets(cfg[part], part)
    try:
        if cfg.method is not None:
            check_choice("method", cfg.method, tuple(METHODS))
        for name in ("calibration_batches", "threads"):
            if cfg[name] is not None:
                check_int(name, cfg[name], 1)
        plan, options = resolve_plan(make(cfg.quantization, "quantization")), make(cfg.options, "options")
        whole = {
            "verify=true": cfg.verify,
            "options.order=one_pass": options.order == "one_pass",
            "options.equalization": options.equalization is not None,
        }
        for what in (what for what, asked in whole.items() if cfg.stream and asked):
            raise ValueError(f"{what} needs all weights at once, and stream=true reads them block by block")
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    return plan, options


def check_layers(task: nn.Module, plan: QuantizationPlan, method: str | None) -> None:
    """Show what will be done to each layer; raise :class:`ConfigError` where one cannot be quantized so."""
    try:
        tasks = preflight(task, plan, method)
        show_tasks(tasks)
        check_tasks(tasks)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def float_task(cfg: DictConfig) -> L.LightningModule:
    """Return the task with its pretrained weights, or without any where they are streamed."""
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    if cfg.stream:
        return empty_task(cfg)
    task = make_task(cfg.task).eval()
    if cfg.float_checkpoint is not None:
        load_weights(task, Path(cfg.float_checkpoint))
    return task


def empty_task(cfg: DictConfig) -> L.LightningModule:
    """Return the task without memory for its parameters; raise :class:`ConfigError` where the files hold others."""
    files = weight_files(cfg)
    node: Any = OmegaConf.create(OmegaConf.to_container(cfg.task, resolve=True))
    if isinstance(network := node.get("model"), DictConfig) and "weights" in network:
        network.weights = False
    try:
        with without_weights():
            task = make_task(node).eval()
    except InstantiationException as error:
        told = f"{type(error.__cause__).__name__}: {error.__cause__}"
        raise ConfigError(f"stream=true: the model cannot be built without its weights ({told})") from error
    try:
        files.match(task)
    except ValueError as error:
        raise ConfigError(f"stream=true: {error}") from error
    return task


def weight_files(cfg: DictConfig) -> WeightFiles:
    """Return the files that weights are streamed from; raise :class:`ConfigError` where there are none."""
    path = cfg.float_checkpoint or cfg.model.get("path")
    if path is None:
        raise ConfigError("stream=true reads safetensors; say where: float_checkpoint=FILE, or model=huggingface")
    try:
        return WeightFiles(path)
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(f"stream=true: {error}") from error


def calibration_batches(cfg: DictConfig, data: L.LightningDataModule) -> list[Any]:
    """Return training batches; another seed draws others."""
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    return list(islice(data.train_dataloader(), cfg.calibration_batches))


def forward_of(task: L.LightningModule) -> Callable[[nn.Module, Any], Any]:
    """Return how a batch runs through ``task``: as its ``predict_step`` says, or its images or ids alone."""
    if is_overridden("predict_step", task, L.LightningModule):
        return lambda model, batch: model.predict_step(batch, 0)  # type: ignore[operator]
    return lambda model, batch: model(batch[0] if isinstance(batch, (tuple, list)) else batch)


def compared(float_test: Measurement | None, float_size: int, test: Measurement, size: int) -> list[Variant]:
    """Return the rows of the table; of a float model that was never in memory only the size is known."""
    if float_test is None:
        return [Variant("float (not tested)", {}, float_size), test.variant("quantized", size)]
    quantized = with_cosine(test.variant("quantized", size, like=float_test), test, float_test)
    return [float_test.variant("float", float_size), quantized]


def float_bytes(task: nn.Module) -> int:
    """Return the bytes of all parameters, shared ones once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in task.parameters())


def with_cosine(variant: Variant, test: Measurement, like: Measurement) -> Variant:
    """Return a row of embeddings, which have no metric of their own, with their cosine to the float model's."""
    if test.metrics or test.outputs is None or like.outputs is None or len(test.outputs.shapes[0]) != 2:
        return variant
    cosine = test.compared(like, Cosine())
    return variant if cosine is None else replace(variant, metrics={"cosine": cosine})


@contextmanager
def tracked(cfg: DictConfig, tracker: Tracker) -> Iterator[None]:
    """Have what is inside logged; the tracker is finished on leaving, however that happens."""
    found = OmegaConf.to_container(cfg, resolve=True)
    tracker.start({str(key): value for key, value in found.items()} if isinstance(found, dict) else {})
    failed = True
    try:
        yield
        failed = False
    finally:
        tracker.finish(failed=failed)


def clear(journal: Path | None) -> None:
    """Delete the finished blocks of a run that is saved."""
    if journal is not None and journal.is_dir():
        delete_journal(journal)


@hydra.main(version_base="1.3", config_path="pkg://lightning_qat.conf", config_name="quantize")
def main(cfg: DictConfig) -> float | None:
    """Run ``lightning-qat quantize``; a sweeper gets the quantized model's main metric."""
    variants = quantize(cfg)
    metric = main_metric(variants)
    return None if metric is None else variants[-1].metrics.get(metric)

"""Train in float, then quantization-aware; convert to integers, verify, and compare all forms of the model."""

from __future__ import annotations

import logging
from pathlib import Path

import hydra
from lightning import LightningModule
from omegaconf import DictConfig
from torch import nn

from lightning_qat.report import Variant, main_metric
from lightning_qat.transforms import calibrate, parity_report, prepare, save_quantized

from ._build import Parts, build
from ._convert import convert_verified
from ._files import FLOAT_WEIGHTS, MODEL, PTQ_MODEL, load_weights, save_config, save_weights
from ._latency import latency
from ._measure import evaluation_step, folder_bytes, measure
from ._show import show
from ._sweep import check_sweep

logger = logging.getLogger(__name__)


def train(cfg: DictConfig) -> list[Variant]:
    """Run the whole recipe and return how the float, PTQ, QAT and converted models did."""
    parts = build(cfg)  # a wrong config stops here, before anything is trained
    out = parts.output_dir
    save_config(cfg, out)
    with parts.tracked() as tracker:
        float_task = fit_float(parts)
        float_bytes = save_weights(float_task, out / FLOAT_WEIGHTS)
        float_test = measure(float_task, parts.data, parts.test_trainer, seed=cfg.seed)
        weights = float_task.state_dict()

        logger.info("post-training quantization with the same settings, to compare with")
        ptq_task = quantize_after_training(parts, parts.task(weights))
        ptq_bytes = folder_bytes(save_quantized(ptq_task, out / PTQ_MODEL))
        ptq_test = measure(ptq_task, parts.data, parts.test_trainer, seed=cfg.seed)

        logger.info("quantization-aware training from the float weights")
        qat_task = parts.task(weights, **cfg.qat_task)
        parts.qat_trainer.fit(qat_task, datamodule=parts.data)
        qat_test = measure(qat_task, parts.data, parts.test_trainer, seed=cfg.seed)

        logger.info("conversion to integers")
        converted = convert_verified(parts, qat_task)
        converted_bytes = folder_bytes(save_quantized(converted, out / MODEL))
        converted_test = measure(converted, parts.data, parts.test_trainer, seed=cfg.seed)
        times = latency({"float": float_task, "converted": converted}, float_test.example)

        variants = [
            float_test.variant("float", float_bytes, milliseconds=times.of("float")),
            ptq_test.variant("PTQ", ptq_bytes, like=float_test),
            qat_test.variant("QAT", None, like=float_test),
            converted_test.variant(
                "converted", converted_bytes, like=float_test, trained=qat_test, milliseconds=times.of("converted")
            ),
        ]
        tracker.log_results([variant.row() for variant in variants])
        tracker.log_model(out / MODEL, variants[-1].row())
    show(variants, out, parity_report(converted), times, same_top1_as_trained=converted_test.agreement(qat_test))
    return variants


def fit_float(parts: Parts) -> LightningModule:
    """Return the task trained in float, or with the weights of ``float_checkpoint``."""
    task = parts.task()
    if parts.cfg.float_checkpoint is not None:
        load_weights(task, Path(parts.cfg.float_checkpoint))
    else:
        logger.info("float training")
        parts.float_trainer.fit(task, datamodule=parts.data)
    return task


def quantize_after_training(parts: Parts, task: LightningModule) -> LightningModule:
    """Return ``task`` in integers with ranges from training batches, which its own test step is run on."""
    run = getattr(parts.calibration_trainer, evaluation_step(task, parts.data))

    def test_on(model: nn.Module, loader: object) -> None:
        run(model, dataloaders=loader, verbose=False)

    prepare(task, parts.plan)
    calibrate(task, [parts.data.train_dataloader()], forward=test_on)
    return convert_verified(parts, task)


@hydra.main(version_base="1.3", config_path="pkg://lightning_qat.conf", config_name="train")
def main(cfg: DictConfig) -> float | None:
    """Run ``lightning-qat train``; a sweeper gets the converted model's main metric."""
    check_sweep()
    variants = train(cfg)
    metric = main_metric(variants)
    return None if metric is None else variants[-1].metrics[metric]

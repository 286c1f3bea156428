"""Test the float model and the quantized one of an earlier run, side by side, and show its certificate."""

from __future__ import annotations

from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig

from lightning_qat.report import Variant
from lightning_qat.transforms import QuantizedFileError, load_quantized, parity_report, quantization_statistics

from ._build import make_data, make_task, make_test_trainer
from ._errors import ConfigError
from ._files import FLOAT_WEIGHTS, MODEL, load_config, load_weights
from ._latency import latency
from ._measure import folder_bytes, measure
from ._show import show, show_layers


def evaluate(cfg: DictConfig) -> list[Variant]:
    """Return how the float and the quantized model do.

    The classes that ``config.yaml`` of the run names are imported: evaluate only runs that you trust.
    """
    folder, model_path = run_folder(Path(cfg.model_path).expanduser())
    trained = load_config(folder)
    if trained.threads is not None:
        torch.set_num_threads(trained.threads)
    trainer = make_test_trainer(cfg)
    data = make_data(trained.data, **cfg.data)

    float_task = make_task(trained.task)
    weights = float_weights(trained, folder)
    if weights is not None:
        load_weights(float_task, weights)
    try:
        quantized = load_quantized(model_path, make_task(trained.task))
    except QuantizedFileError as error:  # before anything takes its time
        raise ConfigError(str(error)) from error
    float_test = measure(float_task, data, trainer, seed=trained.seed)
    quantized_test = measure(quantized, data, trainer, seed=trained.seed)
    times = latency({"float": float_task, "quantized": quantized}, float_test.example)

    size = (
        sum(p.numel() * p.element_size() for p in float_task.parameters())
        if weights is None
        else weights.stat().st_size
    )
    variants = [
        float_test.variant("float", size, milliseconds=times.of("float")),
        quantized_test.variant(
            "quantized", folder_bytes(model_path), like=float_test, milliseconds=times.of("quantized")
        ),
    ]
    if cfg.layers:
        show_layers(quantization_statistics(quantized).values())
    show(variants, Path(cfg.output_dir), parity_report(quantized), times, model_path=str(model_path))
    return variants


def float_weights(trained: DictConfig, folder: Path) -> Path | None:
    """Return the file of the float weights; None where the model came with its own and `quantize` left them there."""
    if "qat_fit" in trained or (folder / FLOAT_WEIGHTS).is_file():
        return folder / FLOAT_WEIGHTS
    return None if trained.float_checkpoint is None else Path(trained.float_checkpoint)


def run_folder(path: Path) -> tuple[Path, Path]:
    """Return the folder of the run and of its model, given either."""
    if not path.is_dir():
        raise ConfigError(f"model_path={str(path)!r} is no folder; give the one that `lightning-qat train` wrote")
    path = path.resolve()
    return (path, path / MODEL) if (path / MODEL).is_dir() else (path.parent, path)


@hydra.main(version_base="1.3", config_path="pkg://lightning_qat.conf", config_name="evaluate")
def main(cfg: DictConfig) -> None:
    """Run ``lightning-qat evaluate``."""
    evaluate(cfg)

"""Write the quantized model of an earlier run as files that other libraries load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig
from rich.console import Console
from torch import nn

from lightning_qat.formats.export import ONNX
from lightning_qat.formats.export import export as write
from lightning_qat.transforms import QuantizedFileError, load_quantized

from ._build import make_data, make_task, make_test_trainer
from ._errors import ConfigError
from ._files import load_config
from ._measure import folder_bytes, measure
from .evaluate import run_folder


def export(cfg: DictConfig) -> Path:
    """Return what was written.

    The classes that ``config.yaml`` of the run names are imported: export only runs that you trust.
    """
    folder, model_path = run_folder(Path(cfg.model_path).expanduser())
    trained = load_config(folder)
    try:
        model: nn.Module = load_quantized(model_path, make_task(trained.task))
    except QuantizedFileError as error:
        raise ConfigError(str(error)) from error
    example = None
    if cfg.format == ONNX:
        model, example = called_in_test(cfg, trained, model)

    path = Path(cfg.path or Path(cfg.output_dir) / ("model.onnx" if cfg.format == ONNX else cfg.format)).expanduser()
    try:
        write(model, path, cfg.format, tokenizer=cfg.tokenizer, example=example)
    except (ValueError, FileExistsError, ModuleNotFoundError) as error:
        raise ConfigError(str(error)) from error
    size = path.stat().st_size if path.is_file() else folder_bytes(path)
    Console().print(f"{cfg.format}: {path} ({size / 1e6:,.1f} MB)", soft_wrap=True, highlight=False)
    return path


def called_in_test(cfg: DictConfig, trained: DictConfig, model: nn.Module) -> tuple[nn.Module, Any]:
    """Return the network of ``model`` that a test of the float task calls, and what it calls it with."""
    data = make_data(trained.data, **cfg.data)
    example = measure(make_task(trained.task), data, make_test_trainer(cfg), seed=trained.seed).example
    if example is None or (example.args and example.kwargs):
        raise ConfigError("a test of the task calls no network that can be traced; export it in Python, with example=")
    return model.get_submodule(example.module), example.kwargs or example.args


@hydra.main(version_base="1.3", config_path="pkg://lightning_qat.conf", config_name="export")
def main(cfg: DictConfig) -> None:
    """Run ``lightning-qat export``."""
    export(cfg)

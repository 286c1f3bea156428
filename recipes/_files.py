"""What a run leaves in its folder, and how it is read again."""

from __future__ import annotations

from pathlib import Path

import torch
from lightning import LightningModule
from omegaconf import DictConfig, OmegaConf
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from yaml import YAMLError  # type: ignore[import-untyped]

from lightning_qat.transforms import float_state_dict

from ._errors import ConfigError

MODEL = "model"
PTQ_MODEL = "ptq_model"
FLOAT_WEIGHTS = "float.safetensors"
TRAINED_WEIGHTS = "trained.ckpt"
CONFIG = "config.yaml"
RESULTS = "results.json"
PICTURE = "results.png"


def save_config(cfg: DictConfig, folder: Path) -> None:
    """Write the config with every reference resolved."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(OmegaConf.to_yaml(cfg, resolve=True), encoding="utf-8")


def load_config(folder: Path) -> DictConfig:
    """Read the config of an earlier run.

    Raises:
        ConfigError: the folder holds none, or a damaged one.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise ConfigError(f"{folder} holds no {CONFIG}; give the folder that `lightning-qat train` wrote")
    try:
        cfg = OmegaConf.load(path)
    except (YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is damaged: {error}") from error
    if not isinstance(cfg, DictConfig):
        raise ConfigError(f"{path} is damaged: it holds no names")
    return cfg


def save_weights(task: LightningModule, path: Path) -> int:
    """Write the float weights as safetensors and return the bytes of the file."""
    save_model(task, str(path), metadata={"format": "pt"})
    return path.stat().st_size


def load_weights(task: LightningModule, path: Path) -> None:
    """Fill a float task from a safetensors file or a Lightning checkpoint, of a float or a prepared model.

    Raises:
        ConfigError: the file is missing, damaged, or of another model.
    """
    try:
        if path.suffix == ".safetensors":
            load_model(task, str(path))
            return
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        task.load_state_dict(float_state_dict(checkpoint["state_dict"]))
    except FileNotFoundError as error:
        raise ConfigError(f"{path} is not there") from error
    except (SafetensorError, RuntimeError, KeyError, EOFError) as error:
        raise ConfigError(f"{path} does not hold the float weights of this {type(task).__name__}: {error}") from error

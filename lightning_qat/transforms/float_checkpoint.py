"""Checkpoints of quantization-aware training, turned into those of a plain float run."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from lightning_qat.transforms.checkpoint import float_state_dict

#: What a Lightning checkpoint may hold weights under: weight averaging keeps those it averages beside the average.
_STATE_DICTS = ("state_dict", "current_model_state")
#: What the quantization callbacks add.
CHECKPOINT_KEY = "lightning_qat"


def float_checkpoint(checkpoint: str | os.PathLike[str], path: str | os.PathLike[str]) -> Path:
    """Write a Lightning checkpoint of quantization-aware training as one of the plain float module.

    ``MyModule.load_from_checkpoint(path)`` and a Trainer without quantization callbacks load it strictly, and
    the float run can go on from it: hyperparameters, optimizer and progress are kept. It holds the float weights
    that were trained, not their fake-quantized values. A float checkpoint is written as it is.

    The file appears whole or not at all; nothing is unpickled but tensors and builtins.

    Args:
        checkpoint: what Lightning saved, a single file.
        path: of the file to write; may be ``checkpoint`` itself.

    Returns:
        ``path``.

    Raises:
        ValueError: if ``checkpoint`` is no Lightning checkpoint in a single file.
    """
    source, target = Path(checkpoint), Path(path)
    if source.is_dir():
        raise ValueError(
            f"{source} is a folder, as sharded strategies save; consolidate it into one file first: "
            "python -m lightning.pytorch.utilities.consolidate_checkpoint"
        )
    content: Any = torch.load(source, map_location="cpu", weights_only=True)
    if not isinstance(content, dict) or "state_dict" not in content:
        raise ValueError(
            f"{source} is no Lightning checkpoint: it has no 'state_dict'; float_state_dict(state_dict) takes the "
            "float part of a bare state dict"
        )
    stripped = {key: float_state_dict(content[key]) for key in _STATE_DICTS if key in content}
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}-", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save({key: value for key, value in {**content, **stripped}.items() if key != CHECKPOINT_KEY}, file)
        shutil.copymode(source, name)  # mkstemp lets nobody else read
        Path(name).replace(target)
    except BaseException:
        Path(name).unlink()
        raise
    return target

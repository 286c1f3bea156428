"""Models of transformers from a folder on disk; no hub is asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

_INSTALL = "pip install transformers"


def import_transformers() -> Any:
    """Return the package transformers; raise ``ModuleNotFoundError`` that says how to install it."""
    try:
        import transformers
    except ImportError as error:
        raise ModuleNotFoundError(f"this model needs transformers, which is not installed; run: {_INSTALL}") from error
    return transformers


def load_huggingface(
    path: str, *, auto_class: str = "AutoModelForCausalLM", dtype: str = "float32", weights: bool = True
) -> nn.Module:
    """Return the model of a folder that ``save_pretrained`` wrote or that was downloaded, in evaluation mode.

    Code in the folder is not run, pickled weights are not read, and no hub is asked.

    Args:
        path: a folder with ``config.json`` and safetensors.
        auto_class: of transformers, such as ``"AutoModel"`` or ``"AutoModelForSequenceClassification"``.
        dtype: of the parameters.
        weights: False builds the model as ``config.json`` says and reads nothing else, for weights that come later.

    Raises:
        ModuleNotFoundError: transformers is not installed.
        FileNotFoundError: there is no such folder, or no ``config.json`` in it.
        ValueError: ``auto_class`` or ``dtype`` is not known.
    """
    transformers = import_transformers()
    folder = Path(path).expanduser()
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"path={path!r} is no folder with a config.json; give one that save_pretrained wrote")
    loader: Any = getattr(transformers, auto_class, None) if auto_class.startswith("Auto") else None
    if not hasattr(loader, "from_pretrained"):
        raise ValueError(f"auto_class={auto_class!r} is not known; use AutoModelForCausalLM or another of transformers")
    if not isinstance(kind := getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"dtype={dtype!r} is not known; use float32, bfloat16 or float16")
    if weights:
        model = loader.from_pretrained(folder, dtype=kind, local_files_only=True, use_safetensors=True)
    else:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        model = loader.from_config(config, dtype=kind)
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    found: nn.Module = model.eval()
    return found

"""What a comparison has measured: one JSON file, and of what config, data and code each entry is."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
from collections.abc import Iterator, Mapping
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from omegaconf import DictConfig, OmegaConf
from torch.utils._pytree import tree_leaves

from ._errors import ConfigError

#: Of each loader this much is read to recognize the data: enough to see other files or another order.
_DIGESTED_BATCHES = 64
#: What decides the numbers besides the library itself.
_RECIPE_FILES = ("_arm_run.py", "_arms.py", "_build.py", "_convert.py", "_measure.py", "train.py")
#: Where a run writes and what it shows changes no number.
_WITHOUT_EFFECT = ("output_dir", "logger", "callbacks.every_fit.rich_progress_bar", "trainer.default_root_dir")


class Ledger:
    """The entries of ``results.json``, one for each seed and arm.

    Args:
        path: of the file, which need not be there.

    Raises:
        ConfigError: the file is there and is not one of a comparison.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._entries: dict[tuple[int, str], dict[str, Any]] = {}
        if not path.is_file():
            return
        try:
            self._entries = {(e["seed"], e["arm"]): e for e in json.loads(path.read_text(encoding="utf-8"))["runs"]}
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{path} is not a file of `lightning-qat compare`; move it away or give another output_dir"
            ) from error

    def get(self, seed: int, arm: str) -> dict[str, Any] | None:
        """Return what is known of an arm, measured with whatever config."""
        return self._entries.get((seed, arm))

    def add(self, entry: Mapping[str, Any]) -> None:
        """Take an entry, instead of an older one of that seed and arm; :meth:`write` keeps it."""
        self._entries[entry["seed"], entry["arm"]] = _json_value(dict(entry))

    def write(self, **facts: Any) -> None:
        """Write ``facts`` and all entries, atomically; a file that says so already is left alone."""
        content = {**_json_value(facts), "runs": list(self._entries.values())}
        text = json.dumps(content, indent=1, allow_nan=False) + "\n"
        if not self.path.is_file() or self.path.read_text(encoding="utf-8") != text:
            write_text(self.path, text)


def write_text(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def config_digest(*configs: DictConfig) -> str:
    """Return what tells configs apart that lead to different numbers."""
    kept = []
    for config in configs:
        copied = OmegaConf.create(OmegaConf.to_container(config, resolve=True))
        for path in _WITHOUT_EFFECT:
            parent, _, key = path.rpartition(".")
            node = OmegaConf.select(copied, parent) if parent else copied
            if isinstance(node, DictConfig):
                node.pop(key, None)
        kept.append(OmegaConf.to_container(copied))
    return _digest([json.dumps(kept, sort_keys=True, default=str).encode()])


def data_digest(data: L.LightningDataModule) -> str:
    """Return what tells data apart: the lengths and the first batches of the loaders, under one seed."""
    return _digest(_data_bytes(data))


def _data_bytes(data: L.LightningDataModule) -> Iterator[bytes]:
    data.setup("test")
    for name in ("train_dataloader", "val_dataloader", "test_dataloader"):
        if not is_overridden(name, data, L.LightningDataModule):
            continue
        L.seed_everything(0, workers=True, verbose=False)
        for loader in tree_leaves([getattr(data, name)()]):
            yield f"{name} {len(loader) if hasattr(loader, '__len__') else '?'}".encode()
            for leaf in tree_leaves(list(itertools.islice(loader, _DIGESTED_BATCHES))):
                yield _leaf_bytes(leaf)


def _leaf_bytes(leaf: Any) -> bytes:
    if not isinstance(leaf, torch.Tensor):
        return repr(leaf).encode()
    flat = leaf.detach().cpu().contiguous().reshape(-1)
    return f"{leaf.dtype}{tuple(leaf.shape)}".encode() + flat.view(torch.uint8).numpy().tobytes()


def code_digest() -> str:
    """Return what tells versions of the code apart: the library's sources, and whom it computes with."""
    package = resources.files("lightning_qat")
    with resources.as_file(package) as root:
        files = [path for path in root.rglob("*.py") if path.relative_to(root).parts[0] not in ("recipes", "conf")]
        contents = [str(path.relative_to(root)).encode() + path.read_bytes() for path in sorted(files)]
    contents += [Path(__file__).with_name(name).read_bytes() for name in _RECIPE_FILES]
    return _digest([*contents, *(f"{name} {version(name)}".encode() for name in ("torch", "lightning"))])


def _digest(parts: Any) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(len(part).to_bytes(8, "little") + part)
    return found.hexdigest()[:16]


def _json_value(value: Any) -> Any:
    """Return ``value`` with the numbers that JSON does not have as ``"inf"``, ``"-inf"`` and ``"nan"``."""
    if isinstance(value, Mapping):
        return {str(key): _json_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_value(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value

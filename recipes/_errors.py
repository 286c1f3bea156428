"""Mistakes of the user: said in a sentence with the nearest valid name, without a traceback."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable
from importlib import resources

from hydra.errors import HydraException, InstantiationException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from lightning_qat.config import nearest_first

_CONF = "lightning_qat.conf"

#: What a disk says that cannot be written to as was asked; other faults of files may be the program's.
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EEXIST}


class ConfigError(ValueError):
    """What was asked for cannot be run."""


def nearest(value: object, known: Iterable[str]) -> str:
    """Return what follows ``"... is not known"``: the nearest of ``known`` if one is near, then all of them."""
    names = nearest_first(str(value), known)
    listed = f" Known: {', '.join(map(repr, names))}" if names else ""
    near = bool(names) and (str(value) in names[0] or difflib.get_close_matches(str(value), names[:1], cutoff=0.5))
    return f"; did you mean {names[0]!r}?{listed}" if near else f".{listed}"


def explain(error: Exception) -> str | None:
    """Return what to tell the user, or None where ``error`` is a fault of the program and needs its traceback."""
    if isinstance(error, ConfigError):
        return str(error)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.rpartition("/")
        return f"{group}={name!r} is not known{nearest(name, error.options or _options(group))}"
    if isinstance(error, HydraException) and not isinstance(error, InstantiationException):
        cause = error.__cause__
        if isinstance(cause, (ConfigAttributeError, ConfigKeyError)) and cause.parent_node is not None:
            return _unknown_key(cause)
        return f"{error}\n{cause}" if isinstance(cause, OmegaConfBaseException) else str(error)
    if isinstance(error, MissingMandatoryValue):
        key = _own_key(error)
        return f"{key} is missing; add {key}=..."
    if isinstance(error, OSError) and error.errno in _REFUSED and error.filename is not None:
        return f"{str(error.filename)!r} cannot be written or read: {error.strerror}"
    return str(error) if isinstance(error, OmegaConfBaseException) else None


def _own_key(error: MissingMandatoryValue) -> str:
    """Return the key that can be given: what a task calls ``task.model.path`` by ``${model}`` is ``model.path``."""
    key = str(error.full_key)
    part, _, end = key.removeprefix("task.").rpartition(".")
    root = error.parent_node._get_root() if error.parent_node is not None else None
    node = OmegaConf.select(root, part) if isinstance(root, DictConfig) and part else None
    return f"{part}.{end}" if isinstance(node, DictConfig) and OmegaConf.is_missing(node, end) else key


def _unknown_key(error: OmegaConfBaseException) -> str:
    full_key = error.full_key or str(error.key)
    known = {str(key) for key in error.parent_node if str(key) not in ("_target_", "hydra")}
    parent = full_key.rpartition(".")[0]
    if not parent:
        known |= {entry.name for entry in resources.files(_CONF).iterdir() if _is_group(entry.name)}
    place = f"{parent!r} has no {str(error.key)!r}" if parent else f"there is no {str(error.key)!r}"
    return f"{place}{nearest(error.key, known)}. To add it all the same, write +{full_key}=..."


def _is_group(name: str) -> bool:
    return resources.files(_CONF).joinpath(name).is_dir() and not name.startswith("_")


def _options(group: str) -> list[str]:
    if not group or not _is_group(group):
        return []
    files = resources.files(_CONF).joinpath(group).iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))

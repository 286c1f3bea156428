"""Checks the ``_target_`` entries of a config before anything is built: the class exists, and takes these arguments."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
import re
from collections.abc import Iterable
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from lightning_qat.config import nearest_first

from ._errors import ConfigError, nearest

_HYDRA_KEYS = ("_target_", "_args_", "_partial_", "_recursive_", "_convert_")


def check_targets(node: Any, where: str) -> None:
    """Raise :class:`ConfigError` for the first class or argument under ``node`` that does not exist.

    Args:
        node: a part of the config.
        where: its name in messages, such as ``"task"``.
    """
    if isinstance(node, ListConfig):
        for index, item in enumerate(node):
            check_targets(item, f"{where}[{index}]")
    if not isinstance(node, DictConfig):
        return
    if OmegaConf.is_missing(node, "_target_"):
        raise ConfigError(
            f"{where}._target_ is missing; give the path of a class: {where}._target_=package.module.Class"
        )
    if "_target_" in node:
        target = locate(str(node._target_), f"{where}._target_")
        known = _arguments(target)
        name = getattr(target, "__name__", str(target))
        for argument in map(str, node):
            if known is not None and argument not in known and argument not in _HYDRA_KEYS:
                told = f"{name} takes no argument {argument!r}{nearest(argument, known)}"
                raise ConfigError(f"{where}.{argument}: {told}")
    # A reference (${model}) is checked where it points to.
    children: Iterable[tuple[Any, Any]] = node.items_ex(resolve=False)
    for key, child in children:
        if isinstance(child, (DictConfig, ListConfig)) and not child._is_interpolation():
            check_targets(child, f"{where}.{key}")


def locate(path: str, where: str) -> Any:
    """Return the class or function at a dotted path.

    Raises:
        ConfigError: there is none; the message has the nearest path that exists.
    """
    parts = path.split(".")
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        raise ConfigError(f"{where}={path!r} is not the path of a class; write package.module.Class")
    found: Any = None
    for index, part in enumerate(parts):
        prefix = ".".join(parts[: index + 1])
        if found is not None and hasattr(found, part):
            found = getattr(found, part)
        elif (found is None or inspect.ismodule(found)) and _module_exists(prefix):
            found = importlib.import_module(prefix)
        else:
            parent = ".".join(parts[:index])
            known = [f"{parent}.{name}" for name in _names(found)] if found is not None else []
            raise ConfigError(f"{where}={path!r} is not known{_nearest_paths(prefix, known)}")
    if not callable(found):
        raise ConfigError(f"{where}={path!r} is no class or function but a {type(found).__name__}")
    return found


def _module_exists(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def _names(owner: Any) -> list[str]:
    names = [name for name in {*dir(owner), *getattr(owner, "__all__", ())} if not name.startswith("_")]
    if inspect.ismodule(owner) and hasattr(owner, "__path__"):
        names += [module.name for module in pkgutil.iter_modules(owner.__path__) if not module.name.startswith("_")]
    return sorted(set(names))


def _nearest_paths(path: str, known: list[str]) -> str:
    if not known:
        return "; is its package installed, or its file in this folder?"
    # A module has dozens of names: the three nearest are enough.
    return nearest(path, nearest_first(path, known)[:3])


def _arguments(target: Any) -> list[str] | None:
    """Return the names that ``target`` takes as arguments, or None where it takes any."""
    try:
        parameters = inspect.signature(target).parameters.values()
    except ValueError:  # some classes written in C have no signature
        return None
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return None
    return [p.name for p in parameters if p.kind is not inspect.Parameter.VAR_POSITIONAL]


def explain_call(target: Any, error: BaseException) -> str:
    """Return the text of what a class raised; an argument that it passed on in vain gets the nearest name."""
    match = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    if not (match and isinstance(error, TypeError) and inspect.isclass(target)):
        return str(error)
    inits = [vars(owner)["__init__"] for owner in target.__mro__[:-1] if "__init__" in vars(owner)]
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = [p for init in inits for p in inspect.signature(init).parameters.values()]
    known = dict.fromkeys(p.name for p in parameters if p.kind in kinds and p.name != "self")
    return f"{target.__name__} takes no argument {match[1]!r}{nearest(match[1], known)}"

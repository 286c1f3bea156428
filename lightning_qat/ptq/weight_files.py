"""Weights that stay in safetensors files until they are needed, for models that are larger than memory."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.nn.parameter import is_lazy
from torch.utils.weak import WeakIdKeyDictionary

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
#: What safetensors calls the dtypes that a float weight may be stored in.
_FLOATS = ("F64", "F32", "F16", "BF16")


@contextlib.contextmanager
def without_weights() -> Iterator[None]:
    """Build modules inside without memory for their parameters, which are on the meta device.

    Other than with ``torch.device("meta")``, buffers are computed: what no file holds, such as the angles of rotary
    embeddings, is there. :func:`quantize_model` reads the weights with ``weights=...``.
    """
    placed: Any = WeakIdKeyDictionary()  # one parameter that two modules register stays one

    def hook(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta or is_lazy(parameter):
            return None
        if parameter not in placed:
            placed[parameter] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        found: nn.Parameter = placed[parameter]
        return found

    handle = register_module_parameter_registration_hook(hook)  # type: ignore[arg-type]  # it may return another one
    try:
        yield
    finally:
        handle.remove()


@dataclass(frozen=True)
class _Stored:
    """Where a tensor is, and what it is."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


class WeightFiles:
    """Tensors by name in safetensors files; nothing is read before it is asked for, and nothing is unpickled.

    Args:
        path: a folder with ``model.safetensors`` or ``model.safetensors.index.json``, such an index, or one file.
        device: that tensors are read to.

    Raises:
        FileNotFoundError: there is no such file, or the index names one that is missing.
        ValueError: a file is damaged, or is no file of safetensors.
    """

    def __init__(self, path: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> None:
        self.path, self.device = Path(path).expanduser(), torch.device(device)
        self._stored: dict[str, _Stored] = {}
        for file, names in _files_of(self.path).items():
            with _opened(file) as opened:
                found = set(opened.keys())
                if missing := sorted(set(names or ()) - found):
                    raise ValueError(f"{file} has no {missing[0]!r}, which the index says; download the folder again")
                for name in found if names is None else names:
                    part = opened.get_slice(name)
                    self._stored[name] = _Stored(file, tuple(part.get_shape()), part.get_dtype())

    @property
    def names(self) -> list[str]:
        """Of all tensors."""
        return list(self._stored)

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, from the header of its file."""
        return self._stored[name].shape

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Return a tensor in memory of its own, as ``dtype``."""
        with _opened(self._stored[name].file, self.device) as file:
            mapped: Tensor = file.get_tensor(name)
            # A copy, and the file closed: the pages of a mapped file count as memory for as long as it is open.
            return mapped.to(dtype or mapped.dtype, copy=True)

    def match(self, model: nn.Module) -> MatchedWeights:
        """Return which of the tensors are the parameters on the meta device, and the persistent buffers, of ``model``.

        Names may differ by what they begin with: a LightningModule's begin with the name of its network, and those of
        a part of a model lack the name of the part.

        Raises:
            ValueError: nothing of the model is on the meta device, tensors are missing or of another shape or no
                floats, or a buffer on the meta device is in no file.
        """
        slots = _meta_parameters(model)
        if not slots:
            raise ValueError(
                f"no parameter of {type(model).__name__} is on the meta device, so that there is nothing to read; "
                "build it inside `with without_weights():`, or leave weights=... out"
            )
        buffers = _persistent_buffers(model)
        prefixes = self._prefixes([*(names[0] for _, names in slots), *buffers])
        parameters: dict[int, tuple[nn.Parameter, str]] = {}
        wrong: list[str] = []
        for parameter, names in slots:
            # Tied parameters are stored once, under any of their names, or twice alike.
            stored = next((n for n in (_renamed(name, prefixes) for name in names) if n in self._stored), None)
            problem = self._problem(stored, names[0], parameter)
            if problem or stored is None:
                wrong.append(problem)
            else:
                parameters[id(parameter)] = (parameter, stored)
        found: dict[str, str] = {}
        learned = _running_statistics(model)
        for name, buffer in buffers.items():
            stored = _renamed(name, prefixes)
            if stored in self._stored or buffer.is_meta or name in learned:
                problem = self._problem(stored if stored in self._stored else None, name, buffer)
                wrong += [problem] if problem else []
                found[name] = stored
        if wrong:
            more = f", and {len(wrong) - 4} more" if len(wrong) > 4 else ""
            told = f"{'; '.join(wrong[:4])}{more}"
            raise ValueError(f"{self.path} does not hold the weights of this {type(model).__name__}: {told}")
        _check_buffers(model, buffers)
        return MatchedWeights(self, parameters, found)

    def _problem(self, stored: str | None, name: str, tensor: Tensor) -> str:
        """Return why a stored tensor is not that of the model, or nothing."""
        if stored is None:
            return f"it has no {name!r}"
        known = self._stored[stored]
        if known.shape != tuple(tensor.shape):
            return f"{stored!r} has shape {list(known.shape)} there and {list(tensor.shape)} in the model"
        if tensor.is_floating_point() and known.dtype not in _FLOATS:
            return f"{stored!r} is stored as {known.dtype}, which is quantized already or no float"
        return ""

    def _prefixes(self, names: list[str]) -> tuple[str, str]:
        """Return what to take off the model's names, and what to put before them, so that most are stored."""
        tried: dict[tuple[str, str], None] = {("", ""): None}
        for name in {names[0], names[len(names) // 2], names[-1]}:
            for stored in self._stored:
                if name.endswith(f".{stored}"):
                    tried[name[: -len(stored)], ""] = None
                elif stored.endswith(f".{name}"):
                    tried["", stored[: -len(name)]] = None
        return max(tried, key=lambda prefixes: sum(_renamed(name, prefixes) in self._stored for name in names))


@dataclass(frozen=True, eq=False)
class MatchedWeights:
    """The parameters and buffers of a model that are in files.

    Args:
        files: where.
        parameters: id of a parameter on the meta device -> the parameter, and its name in the files.
        buffers: name of a buffer in the model -> in the files.
    """

    files: WeightFiles
    parameters: Mapping[int, tuple[nn.Parameter, str]]
    buffers: Mapping[str, str]

    def value(self, name: str, tensor: Tensor) -> Tensor:
        """Return what a parameter, or the buffer of this name, is with the weights."""
        stored = self.parameters[id(tensor)][1] if id(tensor) in self.parameters else self.buffers.get(name)
        return tensor if stored is None else self.files.read(stored, tensor.dtype)


def has_meta_parameters(model: nn.Module) -> bool:
    """Return whether a parameter of ``model`` has no memory."""
    return any(parameter.is_meta for parameter in model.parameters())


def _meta_parameters(model: nn.Module) -> list[tuple[nn.Parameter, list[str]]]:
    """Return the parameters on the meta device with all their names."""
    found: dict[int, tuple[nn.Parameter, list[str]]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.is_meta:
            found.setdefault(id(parameter), (parameter, []))[1].append(name)
    return list(found.values())


def _persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    saved = model.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in model.named_buffers() if name in saved}


def _running_statistics(model: nn.Module) -> set[str]:
    """Return the names of the buffers that training fills, so that a new model's say nothing."""
    norms = ((name, module) for name, module in model.named_modules() if isinstance(module, _NormBase))
    return {f"{name}.{end}" if name else end for name, _ in norms for end in ("running_mean", "running_var")}


def _check_buffers(model: nn.Module, persistent: Iterable[str]) -> None:
    known = set(persistent)
    lost = [name for name, buffer in model.named_buffers() if buffer.is_meta and name not in known]
    if lost:
        raise ValueError(
            f"the buffer {lost[0]!r} of {type(model).__name__} is on the meta device, and no file holds it, because it "
            "is not persistent; build the model inside `with without_weights():`, which computes buffers"
        )


def _renamed(name: str, prefixes: tuple[str, str]) -> str:
    dropped, added = prefixes
    return added + name.removeprefix(dropped)


@contextlib.contextmanager
def _opened(file: Path, device: torch.device | None = None) -> Iterator[Any]:
    try:
        with safe_open(str(file), framework="pt", device=str(device or "cpu")) as opened:
            yield opened
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged, or no file of safetensors: {error}") from error


def _files_of(path: Path) -> dict[Path, list[str] | None]:
    """Return the files and which of their tensors are meant; None is all."""
    if path.is_dir():
        present = [path / name for name in (INDEX, WHOLE) if (path / name).is_file()]
        if not present:
            raise FileNotFoundError(
                f"{path} holds neither {WHOLE} nor {INDEX}; give a folder of safetensors, or a file"
            )
        path = present[0]
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there; give a folder of safetensors, or a file")
    if path.suffix != ".json":
        return {path: None}
    try:
        placed = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        files: dict[Path, list[str]] = {}
        for name, file in placed.items():
            if Path(file).name != file:
                raise ValueError(f"{path} names a file in another folder, {file!r}")
            files.setdefault(path.parent / file, []).append(name)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is damaged: it has no map from names to files") from error
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise FileNotFoundError(f"{path} names {missing[0]!r}, which is not there; download the folder again")
    return {**files}

"""Finished blocks on disk, so that a run that was killed goes on where it was and ends with the same bytes."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten
from torch.utils.weak import WeakIdKeyDictionary

from lightning_qat.nn import QATLayer
from lightning_qat.nn.computed_weight import weight_now
from lightning_qat.ptq.adopt import adopt
from lightning_qat.ptq.chosen import ChosenCodes
from lightning_qat.ptq.outcome import LayerOutcome
from lightning_qat.quantizers.input_arrangement import ARRANGEMENT
from lightning_qat.schemes import TensorFormat

FINGERPRINT = "fingerprint.json"
_LAYER, _CHANGED = "layer:", "changed:"


def fingerprint(
    model: nn.Module,
    batches: Iterable[Any],
    value_of: Callable[[str, Tensor], Tensor] | None = None,
    **settings: Any,
) -> dict[str, str]:
    """Return digests of what a run's result depends on.

    Args:
        model: its parameters and buffers, and what its modules say of themselves.
        batches: of calibration.
        value_of: returns what a parameter or buffer is, given its name and itself; None where they are in ``model``.
        **settings: anything whose ``repr`` says what it is.
    """
    # A function that a module names may lie elsewhere in the next process.
    state = hashlib.sha256(re.sub("0x[0-9a-f]+", "", repr(model)).encode())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        _feed(state, name, tensor if value_of is None else value_of(name, tensor))
    data = hashlib.sha256()
    for batch in batches:
        _feed_all(data, batch)
    told = {name: repr(value) for name, value in settings.items()}
    return {"model": state.hexdigest(), "calibration": data.hexdigest(), **told}


def _feed_all(digest: Any, value: Any) -> None:
    leaves, spec = tree_flatten(value)
    digest.update(str(spec).encode())
    for leaf in leaves:
        # What PyTorch does not know how to flatten: its repr would leave out most of a large tensor.
        if isinstance(leaf, Mapping):
            _feed_all(digest, dict(leaf))
        elif is_dataclass(leaf) and not isinstance(leaf, type):
            _feed_all(digest, {field.name: getattr(leaf, field.name) for field in fields(leaf)})
        else:
            _feed(digest, "", leaf)


def _feed(digest: Any, name: str, value: Any) -> None:
    if hasattr(value, "tobytes") and hasattr(value, "shape"):  # of NumPy
        digest.update(f"{name} {value.dtype} {value.shape}".encode() + value.tobytes())
        return
    if not isinstance(value, Tensor):
        digest.update(f"{name} {value!r}".encode())
        return
    digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
    flat = value.detach().cpu().contiguous().flatten()
    if flat.numel():
        digest.update(flat.view(torch.uint8).numpy().data)


class Journal:
    """The blocks of one run, each in a file that appears whole or not at all.

    Args:
        folder: made where it is missing.
        known: of :func:`fingerprint`.
        restart: throw away what a run with another fingerprint left, instead of raising.

    Raises:
        ValueError: the folder is of a run with other weights, data or settings.
        FileExistsError: the folder holds something else.
    """

    def __init__(self, folder: str | os.PathLike[str], known: dict[str, str], *, restart: bool = False) -> None:
        self.folder = Path(folder)
        self._unchanged: Any = WeakIdKeyDictionary()
        file = self.folder / FINGERPRINT
        if self.folder.exists() and not file.is_file() and any(self.folder.iterdir()):
            raise FileExistsError(f"{self.folder} is there and holds no journal of a run; choose another folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        found = _read_json(file) if file.is_file() else None
        if found is not None and found != known:
            other = sorted(key for key in {*found, *known} if found.get(key) != known.get(key))
            if not restart:
                raise ValueError(
                    f"{self.folder} holds blocks of a run with another {', '.join(other)}; give another folder, delete "
                    "this one, or start anew with restart=True"
                )
            self.clear()
        if found != known:
            _write_json(file, known)

    def clear(self) -> None:
        """Delete the files of the run."""
        _delete_files(self.folder)

    def begin(self, model: nn.Module) -> None:
        """Know the parameters that need not be written: as they were given, or in a file already."""
        # Not by their ids: a new parameter may have that of one which a packed layer gave up.
        self._unchanged = WeakIdKeyDictionary(dict.fromkeys(model.parameters()))

    def know(self, parameter: nn.Parameter) -> None:
        """Know one more parameter that need not be written: it was read from the files of the model."""
        self._unchanged[parameter] = None

    def _file(self, stage: str) -> Path:
        readable = "".join(c if c.isalnum() or c in "._-" else "_" for c in stage)[-80:]
        return self.folder / f"{readable}-{hashlib.sha256(stage.encode()).hexdigest()[:12]}.safetensors"

    def write(self, stage: str, model: nn.Module, layers: Sequence[str], outcomes: Sequence[LayerOutcome]) -> None:
        """Keep the codes of ``layers`` and every other parameter that the stage has changed."""
        modules = dict(model.named_modules())
        tensors: dict[str, Tensor] = {}
        formats: dict[str, Any] = {}
        for name in layers:
            layer: Any = modules[name]
            quantizer = layer.weight_quantizer
            formats[name] = quantizer.format.to_dict()
            tensors[f"{_LAYER}{name}:codes"] = quantizer.codes(weight_now(layer)).contiguous()
            tensors[f"{_LAYER}{name}:scale"] = quantizer.scale.contiguous()
            tensors[f"{_LAYER}{name}:zero_point"] = quantizer.zero_point.contiguous()
            arrangement = {end: quantizer._buffers[end] for end in ARRANGEMENT}
            tensors |= {f"{_LAYER}{name}:{end}": t for end, t in arrangement.items() if t is not None}
        quantized = {f"{name}.weight" for name in layers}
        for name, parameter in model.named_parameters():
            if parameter not in self._unchanged and name not in quantized and ".weight_quantizer." not in name:
                tensors[f"{_CHANGED}{name}"] = parameter.detach().contiguous()
        rows = [outcome.row() for outcome in outcomes]
        facts = {"stage": stage, "formats": json.dumps(formats), "outcomes": json.dumps(rows)}
        target = self._file(stage)
        part = target.with_name(f".{target.name}.part")
        save_file({name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}, str(part), metadata=facts)
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, target)
        self.begin(model)

    def restore(self, stage: str, model: nn.Module) -> list[LayerOutcome] | None:
        """Let ``model`` be as it was when ``stage`` was written; return None where it was not.

        Raises:
            ValueError: the file is damaged.
        """
        path = self._file(stage)
        if not path.is_file():
            return None
        modules = dict(model.named_modules())
        try:
            with safe_open(str(path), framework="pt") as file:
                facts = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}; delete it, and its block is quantized again") from error
        for name, tensor in tensors.items():
            if name.startswith(_CHANGED):
                owner, _, attribute = name.removeprefix(_CHANGED).rpartition(".")
                old: Any = modules[owner]._parameters[attribute]
                modules[owner]._parameters[attribute] = nn.Parameter(tensor.to(old.device), old.requires_grad)
        for name, told in json.loads(facts["formats"]).items():
            layer: Any = modules[name]
            _adopt_again(name, layer, told, tensors)
        self.begin(model)
        rows = json.loads(facts["outcomes"])
        return [LayerOutcome(**{**row, "notes": tuple(row["notes"])}) for row in rows]


def delete_journal(folder: str | os.PathLike[str]) -> None:
    """Delete the journal in ``folder``, and the folder if nothing else is in it."""
    path = Path(folder)
    if (path / FINGERPRINT).is_file():
        _delete_files(path)
        if not any(path.iterdir()):
            path.rmdir()


def _delete_files(folder: Path) -> None:
    for file in (*folder.glob("*.safetensors"), *folder.glob(".*.part"), folder / FINGERPRINT):
        file.unlink(missing_ok=True)


def _adopt_again(name: str, layer: QATLayer, told: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    device = layer.weight.device
    codes, scale, zero = (tensors[f"{_LAYER}{name}:{end}"].to(device) for end in ("codes", "scale", "zero_point"))
    adopt(name, layer, ChosenCodes(codes, scale, zero, TensorFormat(**told), 0.0, 0.0))
    kept = [tensors.get(f"{_LAYER}{name}:{end}") for end in ARRANGEMENT]
    layer.weight_quantizer.arrange_input(*(None if t is None else t.to(device) for t in kept))


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}; delete the folder") from error


def _write_json(path: Path, content: dict[str, str]) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(content, indent=1), encoding="utf-8")
    os.replace(part, path)

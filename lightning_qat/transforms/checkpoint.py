"""Saving and loading converted models: a folder with safetensors and a readable manifest."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from lightning_qat.nn import (
    FoldedBatchNorm,
    QATLayer,
    QuantizedConv2d,
    QuantizedLayer,
    QuantizedLinear,
    keep_codes_inside,
)
from lightning_qat.nn.computed_weight import weight_now
from lightning_qat.nn.layer import float_type, make_quantized, supported_class
from lightning_qat.quantizers.input_arrangement import ARRANGEMENT, by_feature_in
from lightning_qat.schemes import TensorFormat
from lightning_qat.transforms.certificate import (
    CERTIFICATE,
    ParityReport,
    attach_report,
    certificate_text,
    report_of,
    report_to_save,
)
from lightning_qat.transforms.convert import drop_norm, strip_reparametrization
from lightning_qat.transforms.prepare import leave_fast_paths
from lightning_qat.transforms.save_pretrained import refuse_save_pretrained
from lightning_qat.transforms.saved_split import QuantizedFileError, split_as_saved, split_layers_saved

ModelT = TypeVar("ModelT", bound=nn.Module)

FORMAT = "lightning_qat"
VERSION = 1
TENSORS = "model.safetensors"
MANIFEST = "manifest.json"

_QUANTIZED_TENSORS = (
    "weight_packed",
    "weight_scale",
    "weight_zero_point",
    "input_scale",
    "input_zero_point",
    *ARRANGEMENT,
)
_EXTRA_STATE = "_extra_state"


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def _split_state(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str], dict[str, Any]]:
    """Return the distinct tensors, ``alias -> name`` of those stored under another name, and extra state."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    extra: dict[str, Any] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            extra[name] = value
            continue
        key = (value.data_ptr(), value.shape, value.stride(), value.dtype)
        if value.numel() and key in seen:
            aliases[name] = seen[key]
        else:
            seen[key] = name
            tensors[name] = value.detach().cpu().contiguous()
    storages: dict[int, int] = {}
    for name, tensor in tensors.items():  # views of one storage: safetensors stores each whole
        start = tensor.untyped_storage().data_ptr()
        storages[start] = storages.get(start, 0) + 1
        if start and storages[start] > 1:
            tensors[name] = tensor.clone()
    return tensors, aliases, extra


def _layer_entry(layer: QuantizedLayer) -> dict[str, Any]:
    return {
        "type": float_type(layer).__name__,
        "weight": layer.weight_format.to_dict(),
        "input": None if layer.input_format is None else layer.input_format.to_dict(),
        "shape": list(layer.weight_shape),
        "dtype": str(layer.weight_dtype).removeprefix("torch."),
        "feeds_one_layer": layer.feeds_one_layer,
        "execution": layer.execution,  # on the machine that saved it, for the reader
        **{name: list(tensor.shape) for name in ARRANGEMENT if (tensor := layer._buffers[name]) is not None},
    }


def _manifest_digest(body: dict[str, Any]) -> str:
    text = json.dumps({key: value for key, value in body.items() if key != "manifest_sha256"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _manifest(model: nn.Module, aliases: dict[str, str], extra: dict[str, Any], folder: Path) -> str:
    layers = {n: _layer_entry(m) for n, m in model.named_modules() if isinstance(m, QuantizedLayer)}
    body = {
        "format": FORMAT,
        "version": VERSION,
        "model": type(model).__name__,
        "sha256": _digest(folder / TENSORS),
        "layers": layers,
        "folded_norms": [n for n, m in model.named_modules() if isinstance(m, FoldedBatchNorm)],
        **split_layers_saved(model),
        "aliases": aliases,
        "extra_state": extra,
    }
    if (folder / CERTIFICATE).is_file():
        body["certificate"] = _digest(folder / CERTIFICATE)
    try:
        return json.dumps(body | {"manifest_sha256": _manifest_digest(body)}, indent=1)
    except TypeError as error:
        raise ValueError(
            f"the extra state {sorted(extra)} of the model is not plain JSON and cannot be saved: {error}"
        ) from None


def save_quantized(model: nn.Module, path: str | os.PathLike[str]) -> Path:
    """Save a converted model as the folder ``path``: ``model.safetensors`` and ``manifest.json``.

    A model that was verified, as by ``convert(model, verify=batches)``, gets ``certificate.json`` too. The
    folder appears whole or not at all; one that is there is replaced only if it was saved by this function.

    Args:
        model: what :func:`convert` returned.
        path: of the folder.

    Returns:
        The folder.

    Raises:
        ValueError: if ``model`` is not converted.
        FileExistsError: if ``path`` is something else.
    """
    if any(isinstance(module, QATLayer) for module in model.modules()):
        raise ValueError(f"{type(model).__name__} is prepared but not converted; save convert(model)")
    if not any(isinstance(module, QuantizedLayer) for module in model.modules()):
        raise ValueError(f"{type(model).__name__} holds no quantized layer; save convert(model) of a prepared model")
    target = Path(path)
    if target.exists() and not (target / MANIFEST).is_file() and not (target.is_dir() and not any(target.iterdir())):
        raise FileExistsError(f"{target} is there and is not a saved quantized model; choose another path")
    target.parent.mkdir(parents=True, exist_ok=True)
    tensors, aliases, extra = _split_state(model)
    workspace = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        fresh, old = workspace / "new", workspace / "old"
        fresh.mkdir()
        # One entry: safetensors writes several in an order that differs from process to process.
        save_file(tensors, str(fresh / TENSORS), metadata={"format": "pt"})
        report = report_to_save(model)
        if report is not None:
            (fresh / CERTIFICATE).write_text(certificate_text(report, _digest(fresh / TENSORS)))
        (fresh / MANIFEST).write_text(_manifest(model, aliases, extra, fresh))
        if target.exists():
            target.rename(old)
        fresh.rename(target)
    finally:
        shutil.rmtree(workspace)
    return target


def read_manifest(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the manifest of a saved model; raise :class:`QuantizedFileError` if it is not one."""
    folder = Path(path)
    file = folder / MANIFEST
    if not file.is_file():
        raise QuantizedFileError(f"{folder} is not a saved quantized model: it holds no {MANIFEST}")
    try:
        manifest = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise QuantizedFileError(f"{file} is damaged: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise QuantizedFileError(f"{file} was not written by {FORMAT}")
    if manifest.get("version") != VERSION:
        raise QuantizedFileError(f"{file} has version {manifest.get('version')!r}; this library reads {VERSION}")
    keys = ("sha256", "layers", "folded_norms", "aliases", "extra_state")
    missing = [key for key in keys if key not in manifest]
    if missing:
        raise QuantizedFileError(f"{file} is damaged: it lacks {', '.join(missing)}")
    if manifest.get("manifest_sha256", None) not in (None, _manifest_digest(manifest)):
        raise QuantizedFileError(f"{file} is altered: its checksum is not its own; save the model again")
    return manifest


def _check_tensors(folder: Path, manifest: dict[str, Any]) -> Path:
    file = folder / TENSORS
    if not file.is_file():
        raise QuantizedFileError(f"{folder} holds no {TENSORS}")
    if _digest(file) != manifest["sha256"]:
        raise QuantizedFileError(f"{file} is truncated or altered: its checksum is not the one in {MANIFEST}")
    return file


def _read_tensors(folder: Path, manifest: dict[str, Any]) -> dict[str, Tensor]:
    file = _check_tensors(folder, manifest)
    try:
        tensors = load_file(str(file))
    except SafetensorError as error:
        raise QuantizedFileError(f"{file} is damaged: {error}") from None
    return tensors | {alias: tensors[name] for alias, name in manifest["aliases"].items()}


def read_certificate(path: str | os.PathLike[str]) -> ParityReport | None:
    """Return the report that certifies a saved model, or None where it was saved without one.

    Raises:
        QuantizedFileError: if the folder is no saved model, or the certificate is missing, altered or about
            other tensors than those in the folder.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    report = _read_certificate(folder, manifest)
    if report is not None:
        _check_tensors(folder, manifest)
    return report


def _read_certificate(folder: Path, manifest: dict[str, Any]) -> ParityReport | None:
    file, listed = folder / CERTIFICATE, manifest.get("certificate")
    if listed is None and not file.exists():
        return None
    if listed is None:
        raise QuantizedFileError(f"{file} was not saved with this model: {MANIFEST} does not list it; delete it")
    if not file.is_file():
        raise QuantizedFileError(f"{folder} holds no {CERTIFICATE}, which {MANIFEST} lists")
    if _digest(file) != listed:
        raise QuantizedFileError(f"{file} is truncated or altered: its checksum is not the one in {MANIFEST}")
    try:
        return report_of(file.read_text(), manifest["sha256"])
    except ValueError as error:
        raise QuantizedFileError(f"{file} certifies nothing: {error}") from None


def _check_layer(folder: Path, name: str, entry: dict[str, Any], modules: dict[str, nn.Module]) -> nn.Module:
    layer = modules.get(name)
    if layer is None:
        raise QuantizedFileError(f"{folder} holds a layer {name!r} that the model does not have; build the same model")
    if isinstance(layer, (QATLayer, QuantizedLayer)):
        raise QuantizedFileError(
            f"layer {name!r} is already prepared or converted; load into a freshly built float model"
        )
    own = layer._parameters.get("weight")
    if own is not None and is_lazy(own):
        raise QuantizedFileError(f"layer {name!r} is lazy and has no weight yet; run one batch through the model first")
    # ``parametrize`` gives a layer a class of its own; what was converted is the class before it.
    kind = type(layer).__bases__[0] if parametrize.is_parametrized(layer) else type(layer)
    shape = list(weight_now(layer).shape) if hasattr(layer, "weight") else [0]
    if kind.__name__ != entry["type"] or supported_class(kind) is None or shape != entry["shape"]:
        raise QuantizedFileError(
            f"layer {name!r} is a {kind.__name__} of shape {shape} in the model and a {entry['type']} of shape "
            f"{entry['shape']} in {folder}; build the same model"
        )
    return layer


def load_quantized(path: str | os.PathLike[str], model: ModelT) -> ModelT:
    """Fill a freshly built float model from a folder that :func:`save_quantized` wrote.

    Nothing is unpickled. ``model`` is changed only after everything is read and fits.

    Args:
        path: of the folder.
        model: built as the one that was converted, with any weights.

    Returns:
        ``model``, converted, in evaluation mode; :func:`parity_report` returns what it was certified with.

    Raises:
        QuantizedFileError: if the folder is missing, damaged, altered or of another model.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    tensors, report = _read_tensors(folder, manifest), _read_certificate(folder, manifest)
    with split_as_saved(folder, model, manifest):
        modules = dict(model.named_modules())
        layers = {name: _check_layer(folder, name, entry, modules) for name, entry in manifest["layers"].items()}
        _check_names(folder, model, manifest, tensors)
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    for name, layer in layers.items():
        entry = manifest["layers"][name]
        prefix = f"{name}." if name else ""
        held = {key: tensors.get(prefix + key) for key in _QUANTIZED_TENSORS}
        scales = [key for key in tensors if key.startswith(prefix + "weight_scale")]  # a scheme may store several
        held |= {key[len(prefix) :]: tensors[key] for key in scales}
        strip_reparametrization(layer)
        if prefix + "bias" in tensors and getattr(layer, "bias", None) is None:
            layer.register_parameter("bias", nn.Parameter(tensors[prefix + "bias"].clone(), requires_grad=False))
        make_quantized(
            layer,
            TensorFormat(**entry["weight"]),
            None if entry["input"] is None else TensorFormat(**entry["input"]),
            {key: None if value is None else value.clone() for key, value in held.items()},
            torch.Size(entry["shape"]),
            getattr(torch, entry["dtype"]),
            feeds_one_layer=bool(entry.get("feeds_one_layer", False)),
        )
    for name in manifest["folded_norms"]:
        strip_reparametrization(modules[name])
        drop_norm(modules[name])
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and tensor.dtype != tensors[name].dtype:
            tensor.data = tensor.data.to(tensors[name].dtype)  # a half-precision model loads as one
    # What was built on the meta device has no memory to copy into.
    assign = any(t.is_meta for t in itertools.chain(model.parameters(), model.buffers()))
    model.load_state_dict(tensors | manifest["extra_state"], strict=True, assign=assign)
    leave_fast_paths(model)
    keep_codes_inside(model, QuantizedConv2d, (QuantizedConv2d, QuantizedLinear))
    refuse_save_pretrained(model)
    model.to(device).eval()
    if report is not None:
        attach_report(model, report)
    return model


def _check_names(folder: Path, model: nn.Module, manifest: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Raise if what is left in float does not fit, before anything of the model is changed."""
    modules = dict(model.named_modules(remove_duplicate=False))
    changed = {id(modules[name]) for name in [*manifest["layers"], *manifest["folded_norms"]]}
    inside = tuple(f"{name}." for name, module in modules.items() if id(module) in changed)
    whole = "" in manifest["layers"]
    expected = {} if whole else {k: v for k, v in model.state_dict().items() if not k.startswith(inside)}
    found = {} if whole else {k: v for k, v in tensors.items() if not k.startswith(inside)}
    extra = {key for key in expected if key.endswith(_EXTRA_STATE)}
    for key in sorted((expected.keys() - extra) ^ found.keys()):
        where = "the model" if key in found else str(folder)
        raise QuantizedFileError(f"{where} has no {key!r}; build the same model that was converted")
    for key, value in found.items():
        if expected[key].shape != value.shape:
            raise QuantizedFileError(
                f"{key!r} has shape {list(expected[key].shape)} in the model and {list(value.shape)} in {folder}"
            )


def float_state_dict(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a prepared model's state dict that the plain float model loads strictly.

    Weights of layers that scale their inputs are those of the layer that does not.
    """
    quantizers = (".weight_quantizer.", ".input_quantizer.")
    found = by_feature_in(state_dict, "weight_quantizer")
    return {key: value for key, value in found.items() if not any(part in f".{key}" for part in quantizers)}

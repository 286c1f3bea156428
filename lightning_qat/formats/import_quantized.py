"""Reading the files of other libraries into our converted layers, code for code."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_qat.formats.contents import pretrained_part
from lightning_qat.formats.export import CONFIG, TENSORS
from lightning_qat.formats.model_format import HeldLayer, ModelFormat, format_of_method
from lightning_qat.nn import QATLayer, QuantizedConv2d, QuantizedLayer, QuantizedLinear, keep_codes_inside
from lightning_qat.nn.layer import make_quantized
from lightning_qat.transforms import QuantizedFileError
from lightning_qat.transforms.convert import drop_norm
from lightning_qat.transforms.prepare import leave_fast_paths

ModelT = TypeVar("ModelT", bound=nn.Module)

_INDEX = "model.safetensors.index.json"


def import_quantized(path: str | os.PathLike[str], model: ModelT) -> ModelT:
    """Fill a freshly built float model from a GPTQ, AWQ, bitsandbytes or compressed-tensors checkpoint.

    Its Linears become our own quantized layers with exactly the codes and scales of the file, whichever library wrote
    it. Nothing is unpickled. ``model`` is changed only after everything is read and fits.

    Args:
        path: a folder with ``config.json``, whose ``quantization_config`` says the format, and safetensors.
        model: built as the one in the folder, with any weights, such as ``AutoModelForCausalLM.from_config``; or a
            module that wraps one and nothing else.

    Returns:
        ``model``, in evaluation mode.

    Raises:
        QuantizedFileError: if the folder is missing, damaged, of another model, or holds what our layers do not.
    """
    folder = Path(path)
    facts = _read_config(folder)
    tensors = _read_tensors(folder)
    inner = pretrained_part(model)
    if any(isinstance(module, (QATLayer, QuantizedLayer)) for module in inner.modules()):
        raise QuantizedFileError("the model is prepared or converted already; import into a freshly built float model")
    config: dict[str, Any] = facts["quantization_config"]
    try:
        kind = format_of_method(str(config.get("quant_method")))
        linears = {name: module for name, module in inner.named_modules() if isinstance(module, nn.Linear)}
        held = {name: kind.read(name, own, linears[name], config) for name, own in _by_layer(kind, tensors, linears)}
    except (ValueError, KeyError, TypeError) as error:
        told = error if isinstance(error, ValueError) else f"its {CONFIG} or a layer lacks {error}"
        raise QuantizedFileError(f"{folder} cannot be read: {told}") from error
    if not held:
        raise QuantizedFileError(f"{folder} holds no quantized layer that the model has; build the same model")
    folded = list(facts.get("folded_norms", []))
    rest = _rest(folder, inner, tensors, held, folded)
    _fill(inner, held, rest, tensors, folded)
    leave_fast_paths(model)
    keep_codes_inside(model, QuantizedConv2d, (QuantizedConv2d, QuantizedLinear))
    return model.eval()


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG
    if not file.is_file():
        raise QuantizedFileError(f"{folder} holds no {CONFIG}; give the folder of a quantized checkpoint")
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise QuantizedFileError(f"{file} is damaged: {error}") from None
    if not isinstance(facts, dict) or not isinstance(facts.get("quantization_config"), dict):
        raise QuantizedFileError(f"{file} has no quantization_config; a float checkpoint is loaded by its own library")
    return facts


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    index = folder / _INDEX
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else [TENSORS]
        tensors: dict[str, Tensor] = {}
        for name in names:
            tensors |= load_file(folder / Path(name).name)
    except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
        raise QuantizedFileError(f"{folder} holds no readable tensors: {error}") from None
    return tensors


def _by_layer(
    kind: ModelFormat, tensors: Mapping[str, Tensor], linears: Mapping[str, nn.Linear]
) -> list[tuple[str, dict[str, Tensor]]]:
    """Return the layers that the file holds quantized, and their tensors by the ends of the names."""
    own: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        # The owner is the longest name of a layer that the tensor's begins with.
        parts = name.split(".")
        owner = next((o for i in range(len(parts) - 1, -1, -1) if (o := ".".join(parts[:i])) in linears), None)
        if owner is not None:
            own.setdefault(owner, {})[name[len(owner) + 1 :] if owner else name] = tensor
    return [(name, found) for name, found in own.items() if any(mark in found for mark in kind.marks)]


def _rest(
    folder: Path,
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    held: Mapping[str, HeldLayer],
    folded_norms: list[str],
) -> dict[str, Tensor]:
    """Return what is left in float, checked against the model; tensors that are tied may be missing."""
    owned = tuple(f"{name}." if name else "" for name in held)
    gone = tuple(f"{name}." for name in folded_norms)
    state = {k: v for k, v in model.state_dict().items() if not k.startswith(gone)}
    # A BatchNorm that was folded may have left a bias that the float layer lacks.
    made = {k for name in held if (k := f"{name}.bias" if name else "bias") not in state} if gone else set()
    expected = {k: v for k, v in state.items() if not k.startswith(owned) or k.endswith("bias")}
    found = {k: v for k, v in tensors.items() if k not in made and (not k.startswith(owned) or k.endswith("bias"))}
    present = {expected[key].data_ptr() for key in expected.keys() & found.keys()}
    for key in sorted(expected.keys() ^ found.keys()):
        if key in expected and expected[key].data_ptr() in present:
            continue  # tied to one that is there
        where = "the model" if key in found else str(folder)
        raise QuantizedFileError(f"{where} has no {key!r}; build the same model")
    for key in found:
        if expected[key].shape != found[key].shape:
            raise QuantizedFileError(
                f"{key!r} has shape {list(expected[key].shape)} in the model and {list(found[key].shape)} in {folder}"
            )
    return found


def _fill(
    model: nn.Module,
    held: Mapping[str, HeldLayer],
    rest: dict[str, Tensor],
    tensors: Mapping[str, Tensor],
    folded_norms: list[str],
) -> None:
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    modules = dict(model.named_modules())
    for name, layer in held.items():
        linear: Any = modules[name]
        bias = f"{name}.bias" if name else "bias"
        if bias in tensors and linear.bias is None:  # of a BatchNorm that was folded
            linear.register_parameter("bias", nn.Parameter(tensors[bias].clone(), requires_grad=False))
        shape, dtype = torch.Size((linear.out_features, linear.in_features)), linear.weight.dtype
        make_quantized(linear, layer.weight_format, layer.input_format, layer.tensors, shape, dtype)
    for name in folded_norms:
        drop_norm(modules[name])
    assign = any(t.is_meta for t in itertools.chain(model.parameters(), model.buffers()))
    model.load_state_dict(rest, strict=False, assign=assign)
    model.to(device)

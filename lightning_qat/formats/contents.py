"""What of a converted model goes into a file: the part that other libraries know, its Linears, its other tensors."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qat.nn import (
    QATLayer,
    QuantizedLayer,
    QuantizedLinear,
    QuantizedMultiheadAttention,
)


@dataclass(frozen=True, eq=False)
class Contents:
    """A converted model as a file sees it.

    Args:
        model: the model of transformers where there is one, or else the whole.
        layers: its quantized Linears by name.
        kept: names of its Linears that are left in float.
        head: name of the output head of a model of transformers, or None.
    """

    model: nn.Module
    layers: dict[str, QuantizedLinear]
    kept: tuple[str, ...]
    head: str | None

    @property
    def is_pretrained(self) -> bool:
        """Whether transformers can load it."""
        return is_pretrained(self.model)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the float weights had."""
        return next(iter(self.layers.values())).weight_dtype

    def float_tensors(self) -> dict[str, Tensor]:
        """Return everything of the state dict that is not of a quantized layer, its bias excepted.

        A tensor that transformers ties to another one is left out, as its own ``save_pretrained`` does.
        """
        owned = tuple(f"{name}." for name in self.layers)
        tied = _tied_names(self.model)
        found: dict[str, Tensor] = {}
        seen: set[tuple[Any, ...]] = set()
        for name, value in self.model.state_dict().items():
            if name.startswith(owned) and not name.endswith(".bias"):
                continue
            if not isinstance(value, Tensor):
                raise ValueError(f"{name!r} is extra state, which is no tensor to write; use save_quantized")
            key = (value.data_ptr(), value.shape, value.stride(), value.dtype)
            if not (value.numel() and key in seen and name in tied):
                found[name] = value.detach().cpu().clone().contiguous()
            seen.add(key)
        return found


def contents_of(model: nn.Module) -> Contents:
    """Return what of ``model`` goes into a file.

    Raises:
        ValueError: if the model is not converted, or holds a quantized layer that is no Linear.
    """
    whole: nn.Module = getattr(model, "_orig_mod", model)
    if any(isinstance(module, QATLayer) for module in whole.modules()):
        raise ValueError(f"{type(whole).__name__} is prepared but not converted; export convert(model)")
    inner = pretrained_part(whole)
    layers: dict[str, QuantizedLinear] = {}
    for name, module in inner.named_modules(remove_duplicate=False):
        if isinstance(module, QuantizedMultiheadAttention):
            raise ValueError(
                f"layer {name!r} is a quantized nn.MultiheadAttention, which only format='onnx' and save_quantized "
                f"hold; leave it in float with LayerRule({name + '*'!r})"
            )
        if isinstance(module, QuantizedLayer):
            if not isinstance(module, QuantizedLinear):
                raise ValueError(
                    f"layer {name!r} is a {type(module).__name__}, and this format holds plain Linears only; use "
                    f"format='onnx', or leave it in float with LayerRule({name!r})"
                )
            _check_input_as_it_comes(name, module)
            layers[name] = module
    if not layers:
        raise ValueError(f"{type(whole).__name__} holds no quantized layer; export convert(model) of a prepared model")
    everything = inner.named_modules(remove_duplicate=False)
    kept = tuple(n for n, m in everything if isinstance(m, nn.Linear) and not isinstance(m, QuantizedLayer))
    return Contents(inner, layers, kept, _head_of(inner))


def _check_input_as_it_comes(name: str, layer: QuantizedLinear) -> None:
    if layer.input_factor is not None:
        raise ValueError(
            f"layer {name!r} multiplies its input by an input_factor, the inverse of a scale of AWQ or SmoothQuant that"
            " nothing before it could take in, and only format='onnx' and save_quantized hold that; quantize with "
            "PTQOptions(awq=AWQOptions(keep_scales=False), smoothing=SmoothingOptions(keep_scales=False))"
        )


def check_no_order(contents: Contents, kind: str) -> None:
    """Raise if groups of a layer are of inputs that do not lie together, which files of ``kind`` do not hold."""
    for name, layer in contents.layers.items():
        if layer.input_order is not None:
            raise ValueError(
                f"layer {name!r} takes its input features in an input_order of its own, and {kind} has groups of inputs"
                " that lie together; use format='gptq' or 'onnx', or quantize with GPTQOptions(static_groups=True)"
            )


def check_weight_only(name: str, layer: QuantizedLayer, kind: str) -> None:
    """Raise if the input of a layer is quantized, which files of ``kind`` do not hold."""
    if layer.input_format is not None:
        raise ValueError(
            f"layer {name!r} quantizes its input to {layer.input_format.bits} bits, and {kind} holds weights only; use "
            "a weight-only plan such as 'w4a16', or format='compressed_tensors' or 'onnx'"
        )


def check_head_in_float(contents: Contents, kind: str) -> None:
    """Raise if the output head is quantized, which transformers leaves in float when it loads ``kind``."""
    if contents.head in contents.layers:
        raise ValueError(
            f"layer {contents.head!r} is the output head, which transformers keeps in float when it loads {kind}; "
            f"leave it in float with LayerRule({contents.head!r})"
        )


def check_last_in_float(contents: Contents, kind: str) -> None:
    """Raise if the last layer of all is quantized, which transformers leaves in float too when it loads ``kind``."""
    if not contents.is_pretrained:
        return
    owners = (n for n, m in contents.model.named_modules() if m._parameters or isinstance(m, QuantizedLayer))
    last = list(owners)[-1]
    if last in contents.layers:
        raise ValueError(
            f"layer {last!r} is the last of all, which transformers keeps in float when it loads {kind}; leave it in "
            f"float with LayerRule({last!r}), or use format='compressed_tensors'"
        )


def check_not_held_in_float32(contents: Contents, kind: str) -> None:
    """Raise if a layer is quantized that the model's class holds in float32, which transformers then leaves so."""
    held = getattr(contents.model, "_keep_in_fp32_modules", None) if contents.is_pretrained else None
    for key, name in itertools.product(sorted(held or ()), contents.layers):
        if re.match(rf"(?:{key})(?:\.|$)", name) or name.endswith(key):  # as transformers compares them
            rule = f"*{key}" if name.endswith(key) else f"{key}*"
            raise ValueError(
                f"layer {name!r} is of those that {type(contents.model).__name__} holds in float32 ({key!r}), which "
                f"transformers leaves in float when it loads {kind}; leave them in float with LayerRule({rule!r})"
            )


def check_head_untied(contents: Contents) -> None:
    """Raise if the output head is quantized and transformers would tie it to the embedding again."""
    if contents.head in contents.layers and getattr(contents.model.config, "tie_word_embeddings", False):
        raise ValueError(
            f"layer {contents.head!r} is the output head, which transformers ties to the embedding again; leave it in "
            f"float with LayerRule({contents.head!r}), or set config.tie_word_embeddings=False"
        )


def is_pretrained(module: nn.Module) -> bool:
    """Return whether ``module`` is a model of transformers, without importing it."""
    return hasattr(module, "save_pretrained") and hasattr(getattr(module, "config", None), "to_dict")


def pretrained_part(model: nn.Module) -> nn.Module:
    """Return the model of transformers that ``model`` is or wraps, or ``model`` itself.

    What is wrapped counts only if nothing beside it has parameters: those would be lost.
    """
    for module in model.modules():  # from the outside in
        if is_pretrained(module):
            inside = {id(part) for part in module.modules()}
            beside = (part for part in model.modules() if id(part) not in inside)
            own = {id(parameter) for parameter in module.parameters()}
            return model if any(_holds_more(part, own) for part in beside) else module
    return model


def _holds_more(module: nn.Module, known: set[int]) -> bool:
    more = any(p is not None and id(p) not in known for p in module._parameters.values())
    return more or isinstance(module, QuantizedLayer)


def _head_of(model: nn.Module) -> str | None:
    head = model.get_output_embeddings() if is_pretrained(model) else None  # type: ignore[operator]
    return next((name for name, module in model.named_modules() if module is head), None) if head is not None else None


def _tied_names(model: nn.Module) -> set[str]:
    """Return the names that transformers fills from another tensor when it loads."""
    if not is_pretrained(model) or not getattr(model.config, "tie_word_embeddings", False):
        return set()
    return {name for prefix, keys in _ties(model) for name in (prefix + key for key in keys)}


def _ties(model: nn.Module) -> Iterator[tuple[str, list[str]]]:
    for prefix, module in model.named_modules():
        keys = getattr(module, "_tied_weights_keys", None)
        if keys:
            yield (f"{prefix}." if prefix else ""), list(keys)

"""float model -> model of int8 weights whose activation ranges are found at run time, in one call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from itertools import chain
from typing import Any, TypeAlias, TypeVar, Union

import torch
from torch import nn

from lightning_qat.config import PRESETS, QATConfig, QuantizationConfig, nearest_first
from lightning_qat.nn import QATLayer, QuantizedLayer, RecurrentLayer, recurrent
from lightning_qat.nn.layer import make_qat
from lightning_qat.nn.single import single_layer_configs
from lightning_qat.schemes import get_scheme
from lightning_qat.transforms.convert import convert
from lightning_qat.transforms.fuse import decide_no_folding
from lightning_qat.transforms.match import LayerConfigs, candidate_layers
from lightning_qat.transforms.prepare import copy_model, leave_fast_paths

ModelT = TypeVar("ModelT", bound=nn.Module)

#: A layer type, or the exact name of a module.
Key: TypeAlias = Union[type[nn.Module], str]

_DEFAULT = "int8_dynamic"

#: What torch.ao's weight observers look for -> the observer here. A moving average of one weight is its range.
_OBSERVERS = {
    "MinMaxObserver": "min_max",
    "PerChannelMinMaxObserver": "min_max",
    "MovingAverageMinMaxObserver": "min_max",
    "MovingAveragePerChannelMinMaxObserver": "min_max",
    "HistogramObserver": "histogram",
}

#: qscheme -> symmetric, per channel.
_QSCHEMES = {
    torch.per_tensor_symmetric: (True, False),
    torch.per_tensor_affine: (False, False),
    torch.per_channel_symmetric: (True, True),
    torch.per_channel_affine: (False, True),
}

#: What torch.ao quantizes by default.
_BY_DEFAULT: tuple[type[nn.Module], ...] = (nn.Linear, nn.LSTM, nn.GRU, nn.LSTMCell, nn.RNNCell, nn.GRUCell)


def quantize_dynamic(
    model: ModelT,
    qconfig_spec: Set[Key] | Mapping[Key, Any] | None = None,
    dtype: torch.dtype = torch.qint8,
    mapping: None = None,
    inplace: bool = False,
) -> ModelT:
    """Return ``model`` with packed integer weights whose activation ranges are found at run time.

    The call of ``torch.ao.quantization.quantize_dynamic``. Its default here is the preset ``"int8_dynamic"``: one
    weight scale for each output channel and one activation scale for each token, symmetric; torch's own kernel has
    one for the weight and one, asymmetric, for the whole input. Of LSTM, GRU, RNN and their cells the weights are
    quantized, one scale for each row of a gate; inputs and states stay in float, where torch's kernels quantize them
    too. BatchNorm is not folded, and nothing needs calibration.

    Args:
        model: an ``nn.Module`` or ``LightningModule``.
        qconfig_spec: what to quantize. None is what torch takes: Linear, LSTM, GRU and recurrent cells. A set holds
            layer types, which mean their subclasses too, and exact module names; a mapping says for each how: with a
            preset's name, a :class:`QATConfig`, a :class:`QuantizationConfig` (weight-only), None (stay in float) or
            a torch ``QConfig``, of which the weight is read as torch does; its activations have one asymmetric 8-bit
            range for each call. A name goes before a type, a type before what an outer module says, and a ``qconfig``
            attribute of a module before all. What an outer module says is meant for Linears and recurrent layers in it;
            convolutions and embeddings are quantized where their own type or name is given.
        dtype: ``torch.qint8``. Not read where ``qconfig_spec`` is a mapping.
        mapping: None; there for the signature.
        inplace: quantize ``model`` itself: the layers stay the objects they are.

    Returns:
        A new model of the same class, or ``model`` with ``inplace``; in evaluation mode. Without ``inplace`` the given
        model is untouched, its training mode included. If an error is raised it is, in either case.

    Raises:
        ValueError: if a name, a type, a config or ``dtype`` cannot be quantized, or nothing was found to quantize.
    """
    if mapping is not None:
        raise ValueError(
            f"mapping={mapping!r} is not allowed: layers of this library take the place of float ones; leave it out"
        )
    spec = _configs(qconfig_spec, dtype)
    original: ModelT = getattr(model, "_orig_mod", model)  # of torch.compile
    chosen = _choose(original, spec)
    # A copy that shares all tensors with the original: conversion copies what it keeps, so that no moment needs
    # the memory of a second float model.
    tensors = chain(original.parameters(), original.buffers())
    replica = copy_model(original, {id(tensor): tensor for tensor in tensors}).eval()
    layers = dict(replica.named_modules())
    for name, (weight, activation) in chosen.items():
        for part, layer in _parts(name or type(original).__name__, layers[name]):
            make_qat(layer, weight, activation, part)
    decide_no_folding(replica)
    converted = convert(replica)
    if not inplace:
        return converted
    for name, layer in converted.named_modules():
        if isinstance(layer, RecurrentLayer):
            _become_recurrent(original.get_submodule(name), layer)
        elif isinstance(layer, QuantizedLayer) and not isinstance(layer, recurrent.RecurrentWeight):
            _become(original.get_submodule(name), layer)
    leave_fast_paths(original)
    model.eval()
    return model


def _configs(spec: Any, dtype: torch.dtype) -> dict[Key, LayerConfigs | None]:
    """Return what each key of ``qconfig_spec`` stands for."""
    if isinstance(spec, Mapping):
        found = {key: _layer_configs(key, value) for key, value in spec.items()}
    elif spec is None or isinstance(spec, (Set, list, tuple)):
        if dtype is not torch.qint8:
            raise ValueError(_dtype_message(dtype))
        found = dict.fromkeys(_BY_DEFAULT if spec is None else spec, _layer_configs(nn.Linear, _DEFAULT))
    else:
        raise ValueError(f"qconfig_spec={spec!r} is not allowed; use None, a set of layer types and names, or a dict")
    for key in found:
        if not isinstance(key, str) and not (isinstance(key, type) and issubclass(key, nn.Module)):
            raise ValueError(f"qconfig_spec has {key!r}; use layer types (nn.Linear) and names of modules")
    return found


def _dtype_message(dtype: Any) -> str:
    ways = {
        torch.float16: "for weights in float16 use model.half()",
        torch.quint8: "for embeddings use prepare(model, QuantizationPlan([LayerRule(nn.Embedding, "
        "'int8_weight_only')])) and convert(model)",
        torch.quint4x2: "for 4-bit weights give a dict: {nn.Linear: 'w4a16'}",
    }
    return f"dtype={dtype} is not allowed; use torch.qint8" + (f", or {ways[dtype]}" if dtype in ways else "")


def _layer_configs(key: Key, value: Any) -> LayerConfigs | None:
    """Return weight and activation of a value of ``qconfig_spec``; None stays None."""
    shown = repr(key) if isinstance(key, str) else getattr(key, "__name__", repr(key))
    if value is None:
        return None
    if _is_qconfig(value):
        return _of_qconfig(shown, value)
    if not isinstance(value, (str, QATConfig, QuantizationConfig)):
        raise ValueError(
            f"qconfig_spec[{shown}]={value!r} is not allowed; use a preset's name, a QATConfig, a QuantizationConfig, "
            "a torch QConfig, or None to leave it in float"
        )
    weight, activation = single_layer_configs(value)
    if activation is not None and not (activation.dynamic or get_scheme(activation.scheme).finds_ranges):
        dynamic = ", ".join(repr(n) for n, p in PRESETS.items() if p.activation_bits is None or p.activation_dynamic)
        raise ValueError(
            f"qconfig_spec[{shown}]={value!r} has activation ranges that need calibration; use prepare, calibrate and "
            f"convert, or activation_dynamic=True, activation_bits=None, or one of: {dynamic}"
        )
    return weight, activation


def _is_qconfig(value: Any) -> bool:
    return callable(getattr(value, "weight", None)) and hasattr(value, "activation")


def _of_qconfig(shown: str, qconfig: Any) -> LayerConfigs:
    """Return what a torch QConfig says of the weight, and the activations of torch's dynamic kernels."""
    observer = qconfig.weight()
    observer = getattr(observer, "activation_post_process", observer)  # of a FakeQuantize
    where = f"the weight of qconfig_spec[{shown}], a {type(observer).__name__},"
    dtype, qscheme = getattr(observer, "dtype", None), getattr(observer, "qscheme", None)
    if dtype is not torch.qint8:
        raise ValueError(f"{where} has {_dtype_message(dtype)}")
    if type(observer).__name__ not in _OBSERVERS or qscheme not in _QSCHEMES:
        known = ", ".join(_OBSERVERS)
        raise ValueError(f"{where} with qscheme={qscheme} is not known; use one of {known}, or a QuantizationConfig")
    symmetric, per_channel = _QSCHEMES[qscheme]
    if per_channel and observer.ch_axis != 0:
        raise ValueError(f"{where} has ch_axis={observer.ch_axis}; output channels are ch_axis=0")
    codes = observer.quant_max - observer.quant_min + 1
    bits = codes.bit_length() if codes & (codes - 1) else codes.bit_length() - 1
    if codes not in (2**bits, 2**bits - 1) or not 2 <= bits <= 8:
        ends = f"quant_min={observer.quant_min}, quant_max={observer.quant_max}"
        raise ValueError(f"{where} has {ends}; use 2 to 8 bits, such as -128 to 127")
    weight = QuantizationConfig(
        "int8",
        bits=bits,
        symmetric=symmetric,
        per_channel=per_channel,
        observer=_OBSERVERS[type(observer).__name__],
    )
    return weight, PRESETS["int8_dynamic_per_tensor"].activation_config()


def _choose(model: nn.Module, spec: dict[Key, LayerConfigs | None]) -> dict[str, LayerConfigs]:
    """Return name -> configs of the layers to quantize, each once.

    Raises:
        ValueError: if a key means nothing that can be quantized, or no layer is left.
    """
    for name, module in model.named_modules():
        if isinstance(module, (QATLayer, QuantizedLayer)):
            state = "prepared" if isinstance(module, QATLayer) else "converted"
            raise ValueError(f"layer {name!r} of {type(model).__name__} is already {state}; give a float model")
    layers = {id(layer): name for name, layer in candidate_layers(model).items()}
    layers |= {id(module): name for name, module in model.named_modules() if recurrent.can_be_split(module)}
    _check_keys(model, spec, layers)
    decided: dict[str, LayerConfigs | None] = {}
    for module, own, inherited in _walk(model, "", spec, None):
        if id(module) not in layers:
            continue
        inherits = isinstance(module, nn.Linear) or recurrent.can_be_split(module)
        wanted = own if own is not None or not inherits else inherited
        if wanted is not None:
            decided.setdefault(layers[id(module)], wanted[0])
    chosen = {name: configs for name, configs in decided.items() if configs is not None}
    if not chosen:
        looked_for = ", ".join(_shown(key) for key in spec) or "nothing"
        found = ", ".join(sorted({type(m).__name__ for m in model.modules()}))
        raise ValueError(f"no layer to quantize: looked for {looked_for}; {type(model).__name__} has: {found}")
    return chosen


def _parts(name: str, layer: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the names and layers that ``layer`` stands for: the weights of a recurrent one, which is split."""
    if not recurrent.can_be_split(layer):
        return [(name, layer)]
    recurrent.split(layer)
    return [(f"{name}.{part}", child) for part, child in layer.named_children()]


_UNMARKED = object()

#: Configs that somebody decided on; the configs themselves are None for "stay in float".
_Decision: TypeAlias = tuple[Union[LayerConfigs, None]]


def _walk(
    module: nn.Module, name: str, spec: dict[Key, LayerConfigs | None], inherited: _Decision | None
) -> Iterator[tuple[nn.Module, _Decision | None, _Decision | None]]:
    """Yield every module with its own decision and that of the modules around it."""
    own: _Decision | None = None
    typed = next((cls for cls in type(module).__mro__ if cls in spec), None)
    marked = module.__dict__.get("qconfig", _UNMARKED)
    if marked is None or _is_qconfig(marked):
        own = (_layer_configs(name, marked),)
    elif name in spec:
        own = (spec[name],)
    elif typed is not None:
        own = (spec[typed],)
    yield module, own, inherited
    for child_name, child in module.named_children():
        yield from _walk(child, f"{name}.{child_name}" if name else child_name, spec, own or inherited)


def _check_keys(model: nn.Module, spec: dict[Key, LayerConfigs | None], layers: dict[int, str]) -> None:
    """Raise ``ValueError`` for a name that is not there, and for a module that is and cannot be quantized."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for key, configs in spec.items():
        if isinstance(key, str) and key not in modules:
            near = ", ".join(repr(n) for n in nearest_first(key, modules)[:3])
            raise ValueError(f"qconfig_spec names {key!r}, which {type(model).__name__} does not have; nearest: {near}")
        if configs is None:
            continue
        asked = {n: m for n, m in modules.items() if (n == key if isinstance(key, str) else isinstance(m, key))}
        if asked and not any(id(child) in layers for m in asked.values() for child in m.modules()):
            name, module = next(iter(asked.items()))
            raise ValueError(
                f"qconfig_spec asks for {_shown(key)}, but {type(module).__name__} (layer {name!r}) cannot be "
                f"quantized; leave {_shown(key)} out, and it stays in float"
            )


def _shown(key: Key) -> str:
    return repr(key) if isinstance(key, str) else key.__name__


def _become_recurrent(layer: nn.Module, converted: nn.Module) -> None:
    """Turn a recurrent layer into ``converted``, in place; the biases are the user's own parameters."""
    own = {name: layer._parameters[name] for name, p in converted._parameters.items() if p is not None}
    layer.__class__ = type(converted)
    layer._parameters.update({**converted._parameters, **own})
    layer._modules.update(converted._modules)
    for child in converted.children():
        if isinstance(child, recurrent.RecurrentWeight):
            child.__dict__["owner"] = layer
    if isinstance(layer, nn.RNNBase):
        layer._init_flat_weights()


def _become(layer: nn.Module, converted: nn.Module) -> None:
    """Turn ``layer`` into ``converted``, which was made from a copy of it, in place."""
    before = layer.__dict__
    after = dict(converted.__dict__)
    for key, value in before.items():
        if key == "_modules" or (key.startswith("_") and key.endswith("_hooks")):
            # Hooks of a copy are bound to the copy's parents. The ones that conversion dropped stay dropped.
            after[key] = type(value)((k, v) for k, v in value.items() if k in after[key])
        elif key in after and key not in ("_parameters", "_buffers", "_non_persistent_buffers_set"):
            after[key] = value
    layer.__class__ = type(converted)
    layer.__dict__.clear()
    layer.__dict__.update(after)

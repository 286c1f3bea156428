"""compressed-tensors checkpoints, as transformers and vLLM read them: ``pack-quantized`` and ``int-quantized``.

Weight-only layers are packed: ``weight_packed`` int32 ``[N, K * bits / 32]`` (codes from 0 up, lowest bits first along
the inputs), ``weight_scale`` ``[N, groups]``, ``weight_shape`` and, asymmetric, ``weight_zero_point`` int32
``[N * bits / 32, groups]``, packed along the outputs. Layers whose input is quantized too have ``weight`` int8,
``weight_scale``, ``weight_zero_point`` int8 and, static, ``input_scale`` and ``input_zero_point``: codes are around
zero there, also asymmetric ones. Scales are in the dtype of the model, so those of a float32 model are exact.

What quantizes the inputs is theirs: symmetric codes go down to -128 where ours end at -127, and dynamic symmetric
scales are ``absmax / 127.5`` instead of ``absmax / 127``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qat.formats.contents import Contents, check_head_untied
from lightning_qat.formats.integer_weight import UnsignedWeight, check_integer, rounded_scale
from lightning_qat.formats.model_format import (
    HeldLayer,
    ModelFormat,
    check_held,
    groups_of,
    integer_layer,
    register_format,
)
from lightning_qat.nn import QuantizedLinear
from lightning_qat.ops.word_packing import pack_words, unpack_words
from lightning_qat.schemes import IntegerScheme, TensorFormat, get_scheme

_KIND = "compressed_tensors"
_PACKED, _PLAIN = "pack-quantized", "int-quantized"


@register_format("compressed_tensors")
class CompressedTensorsFormat(ModelFormat):
    """Integers of 2 to 8 bits, weight-only or with static or dynamic inputs; layers may differ."""

    method = "compressed-tensors"
    marks = ("weight_packed", "weight_scale")

    def __init__(self, name: str = _KIND) -> None:
        self.name = name

    def config(self, contents: Contents) -> dict[str, Any]:
        check_head_untied(contents)
        groups: dict[str, list[str]] = {}
        for name, layer in contents.layers.items():
            _check_layer(name, layer)
            rounded_scale(name, UnsignedWeight.of(layer), layer.weight_dtype, _KIND)
            groups.setdefault(json.dumps(_scheme_of(layer)), []).append(name)
        schemes = [json.loads(text) for text in groups]
        targets = [["Linear"]] if len(groups) == 1 else list(groups.values())
        kinds = {scheme["format"] for scheme in schemes}
        # compressed-tensors 0.20 makes no room for packed zero points when transformers loads a model compressed; what
        # transformers decompresses itself while loading is read right, but has no quantized inputs.
        dense = kinds == {_PACKED} and any(not scheme["weights"]["symmetric"] for scheme in schemes)
        return {
            "quant_method": self.method,
            "format": kinds.pop() if len(kinds) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "config_groups": {
                f"group_{i}": {"targets": found, **scheme}
                for i, (found, scheme) in enumerate(zip(targets, schemes, strict=True))
            },
            "ignore": list(contents.kept),
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
            **({"dequantize": True} if dense else {}),
        }

    def write(self, layer: QuantizedLinear, config: dict[str, Any]) -> dict[str, Tensor]:
        weight, fmt, dtype = UnsignedWeight.of(layer), layer.weight_format, layer.weight_dtype
        found = {"weight_scale": rounded_scale("", weight, dtype, _KIND)}
        if layer.input_format is None:
            found |= {
                "weight_packed": pack_words(weight.codes, fmt.bits),
                "weight_shape": torch.tensor(layer.weight_shape),
            }
            if not fmt.symmetric:
                found["weight_zero_point"] = pack_words(weight.zero_point.t(), fmt.bits).t().contiguous()
            return found
        found["weight"] = _around_zero(weight.codes, fmt.bits)
        if not fmt.symmetric:
            found["weight_zero_point"] = _around_zero(weight.zero_point, fmt.bits)
        if layer.input_scale is not None:
            found["input_scale"] = layer.input_scale.reshape(1).to(dtype).cpu()
            if layer.input_zero_point is not None:
                zero = layer.input_zero_point.reshape(1).cpu()
                found["input_zero_point"] = _around_zero(zero, layer.input_format.bits)
        return found

    def read(self, name: str, tensors: Mapping[str, Tensor], linear: nn.Linear, config: dict[str, Any]) -> HeldLayer:
        scheme = _scheme_for(name, tensors, config)
        args, inputs = scheme["weights"], scheme.get("input_activations")
        bits, strategy = int(args["num_bits"]), args["strategy"]
        if args["type"] != "int" or strategy not in ("group", "channel", "tensor") or args.get("actorder") == "group":
            raise ValueError(
                f"layer {name!r} has type={args['type']!r}, strategy={strategy!r}, actorder={args.get('actorder')!r}, "
                "which our layers do not hold; integers per tensor, channel or group, not actorder='group', can be read"
            )
        rows, middle = linear.out_features, 2 ** (bits - 1)
        _check_weight(name, tensors, linear, args)
        scale = tensors["weight_scale"].reshape(-1, 1) if strategy == "tensor" else tensors["weight_scale"]
        scale = scale.expand(rows, scale.shape[1]).float()
        zeros = torch.full(scale.shape, middle, dtype=torch.int32)
        stored = tensors.get("weight_zero_point")
        if "weight_packed" in tensors:
            codes = unpack_words(tensors["weight_packed"], bits, linear.in_features)
            if stored is not None and not args["symmetric"]:
                zeros = unpack_words(stored.t(), bits, rows).t().to(torch.int32)
        else:
            codes = (tensors["weight"].to(torch.int32) + middle).to(torch.uint8)
            if stored is not None and not args["symmetric"]:
                zeros = (stored.to(torch.int32) + middle).reshape(-1, scale.shape[1]).expand(scale.shape)
        held = integer_layer(codes, scale, zeros, bits, grouped=strategy == "group", symmetric=args["symmetric"])
        if inputs is None:
            return held
        return HeldLayer(held.weight_format, *_read_input(name, held.tensors, tensors, inputs))


def _check_weight(name: str, tensors: Mapping[str, Tensor], linear: nn.Linear, args: dict[str, Any]) -> None:
    """Raise unless the tensors of a weight are those of the config."""
    rows, columns, bits = linear.out_features, linear.in_features, int(args["num_bits"])
    groups = groups_of(name, columns, int(args["group_size"]) if args["strategy"] == "group" else -1)
    packed = "weight_packed" in tensors
    if args["strategy"] == "tensor":
        own = tensors["weight_scale"].shape
        scales = tuple(own) if own.numel() == 1 else (1,)
    else:
        scales = (rows, groups)
    word, width = (torch.int32, -(-columns * bits // 32)) if packed else (torch.int8, columns)
    expected: dict[str, Any] = {"weight_packed" if packed else "weight": (word, (rows, width))}
    if not args["symmetric"] and packed:
        expected["weight_zero_point"] = (torch.int32, (-(-rows * bits // 32), groups))
    elif not args["symmetric"]:
        expected["weight_zero_point"] = (torch.int8, scales)
    check_held(name, tensors, weight_scale=(None, scales), **expected)


def _check_layer(name: str, layer: QuantizedLinear) -> None:
    check_integer(name, layer, _KIND)
    fmt = layer.input_format
    if layer.weight_format.bits > 8:
        raise ValueError(f"layer {name!r} has {layer.weight_format.bits} bits, and {_KIND} at most 8; use fewer bits")
    if fmt is not None and (type(get_scheme(fmt.scheme)) is not IntegerScheme or fmt.bits > 8):
        raise ValueError(
            f"the input of layer {name!r} is in {fmt.scheme} with {fmt.bits} bits, and {_KIND} takes integers of at "
            "most 8; use an 'int8' or 'int8_dynamic' plan"
        )


def _scheme_of(layer: QuantizedLinear) -> dict[str, Any]:
    fmt, inputs = layer.weight_format, layer.input_format
    weights = {
        "num_bits": fmt.bits,
        "type": "int",
        "symmetric": fmt.symmetric,
        "strategy": "channel" if fmt.group_size is None else "group",
        "group_size": fmt.group_size,
        "dynamic": False,
    }
    activations = None
    if inputs is not None:
        activations = {
            "num_bits": inputs.bits,
            "type": "int",
            "symmetric": inputs.symmetric,
            "strategy": "token" if inputs.dynamic and inputs.dynamic_range == "token" else "tensor",
            "dynamic": inputs.dynamic,
        }
    return {
        "weights": weights,
        "input_activations": activations,
        "output_activations": None,
        "format": _PACKED if inputs is None else _PLAIN,
    }


def _around_zero(codes: Tensor, bits: int) -> Tensor:
    return (codes.to(torch.int32) - 2 ** (bits - 1)).to(torch.int8)


def _scheme_for(name: str, tensors: Mapping[str, Tensor], config: dict[str, Any]) -> dict[str, Any]:
    """Return the group of the config that a layer belongs to."""
    groups = list(config["config_groups"].values())
    named = [group for group in groups if name in group["targets"]]
    plain = [group for group in groups if "Linear" in group["targets"]]
    if not (named or plain):
        raise ValueError(
            f"layer {name!r} is in no group of the config by its name or as 'Linear'; targets that are patterns "
            "cannot be read"
        )
    scheme: dict[str, Any] = (named or plain)[0]
    return scheme


def _read_input(
    name: str, weight: dict[str, Tensor | None], tensors: Mapping[str, Tensor], args: dict[str, Any]
) -> tuple[dict[str, Tensor | None], TensorFormat]:
    bits, dynamic, symmetric = int(args["num_bits"]), bool(args.get("dynamic")), bool(args["symmetric"])
    if args["type"] != "int" or args["strategy"] not in ("tensor", "token"):
        raise ValueError(
            f"the input of layer {name!r} has type={args['type']!r}, strategy={args['strategy']!r}; integers per "
            "tensor or token can be read"
        )
    span = {"dynamic_range": "tensor"} if dynamic and args["strategy"] == "tensor" else {}
    fmt = TensorFormat("dynamic" if dynamic else "int8", bits, symmetric, dynamic=dynamic, **span)  # type: ignore[arg-type]
    scale = zero = None
    if not dynamic:
        ends = ["input_scale"] if symmetric else ["input_scale", "input_zero_point"]
        for end in ends:
            if tensors[end].numel() != 1:
                raise ValueError(f"layer {name!r} has {end} of shape {list(tensors[end].shape)} instead of one number")
        check_held(name, tensors, input_scale=(None, tuple(tensors["input_scale"].shape)))
        scale = tensors["input_scale"].reshape(()).float()
        if not symmetric:
            zero = (tensors["input_zero_point"].reshape(()).to(torch.int32) + 2 ** (bits - 1)).contiguous()
    return {**weight, "input_scale": scale, "input_zero_point": zero}, fmt

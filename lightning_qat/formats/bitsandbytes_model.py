"""Checkpoints whose Linears are bitsandbytes' ``Linear4bit`` or ``Linear8bitLt``, as transformers reads them.

The tensors of a layer are those of :mod:`lightning_qat.formats.bitsandbytes`. On a CPU with AVX512-BF16, bitsandbytes
computes 4-bit layers with block scales rounded to bfloat16, and takes only ``out_features`` divisible by 32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qat.config import BLOCK_SIZES
from lightning_qat.formats.bitsandbytes import from_bitsandbytes_format, to_bitsandbytes_format
from lightning_qat.formats.contents import Contents, check_head_untied, check_not_held_in_float32, check_weight_only
from lightning_qat.formats.model_format import HeldLayer, ModelFormat, register_format
from lightning_qat.nn import QuantizedLinear
from lightning_qat.schemes import TensorFormat
from lightning_qat.schemes.quantized_tensor import QuantizedTensor

_KIND = "bitsandbytes"
_TABLES = ("nf4", "fp4")


@register_format("bitsandbytes")
class BitsAndBytesFormat(ModelFormat):
    """NF4 or FP4, nested or not, or LLM.int8()."""

    method = "bitsandbytes"
    marks = ("SCB", "weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4")

    def __init__(self, name: str = _KIND) -> None:
        self.name = name

    def config(self, contents: Contents) -> dict[str, Any]:
        for name, layer in contents.layers.items():
            _check_layer(name, layer)
        check_head_untied(contents)
        check_not_held_in_float32(contents, _KIND)
        first, scheme = next((name, layer.weight_format.scheme) for name, layer in contents.layers.items())
        for name, layer in contents.layers.items():
            if layer.weight_format.scheme != scheme:
                raise ValueError(
                    f"layer {name!r} is in {layer.weight_format.scheme} and layer {first!r} in {scheme}, and a file of "
                    "bitsandbytes has one for all; quantize them alike"
                )
        four = scheme in _TABLES
        threshold = 0.0 if four else _threshold(contents.layers)
        formats = [layer.weight_format for layer in contents.layers.values()]
        facts: dict[str, Any] = {
            "quant_method": self.method,
            "load_in_4bit": four,
            "load_in_8bit": not four,
            "llm_int8_threshold": 6.0 if four else threshold,
            "llm_int8_skip_modules": list(contents.kept),
            "llm_int8_has_fp16_weight": False,
            "llm_int8_enable_fp32_cpu_offload": False,
        }
        if four:
            facts |= {
                "bnb_4bit_quant_type": scheme,
                "bnb_4bit_use_double_quant": formats[0].nested,
                "bnb_4bit_compute_dtype": str(contents.dtype).removeprefix("torch."),
                "bnb_4bit_quant_storage": "uint8",
            }
        return facts

    def write(self, layer: QuantizedLinear, config: dict[str, Any]) -> dict[str, Tensor]:
        start = "weight_scale"
        stored = {
            n.removeprefix(start): t.cpu() for n, t in layer._buffers.items() if t is not None and n.startswith(start)
        }
        fmt, shape = layer.weight_format, torch.Size(layer.weight_shape)
        held = QuantizedTensor(layer.weight_packed.cpu(), stored, None, fmt, shape, layer.weight_dtype)
        return to_bitsandbytes_format(held)

    def read(self, name: str, tensors: Mapping[str, Tensor], linear: nn.Linear, config: dict[str, Any]) -> HeldLayer:
        try:
            held = from_bitsandbytes_format(dict(tensors))
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}") from None
        if held.shape != (linear.out_features, linear.in_features):
            raise ValueError(
                f"layer {name!r} is {linear.out_features} x {linear.in_features} in the model and "
                f"{' x '.join(map(str, held.shape))} in the file; build the same model"
            )
        found: dict[str, Tensor | None] = {"weight_packed": held.packed, "weight_zero_point": None}
        found |= {f"weight_scale{end}": tensor for end, tensor in held.stored_scale.items()}
        if held.format.scheme in _TABLES:
            return HeldLayer(held.format, found)
        threshold = float(config.get("llm_int8_threshold", 6.0))
        inputs = TensorFormat("llm_int8", 8, True, dynamic=True, outlier_threshold=threshold)
        return HeldLayer(held.format, found | {"input_scale": None, "input_zero_point": None}, inputs)


def _check_layer(name: str, layer: QuantizedLinear) -> None:
    fmt = layer.weight_format
    if fmt.scheme in _TABLES:
        check_weight_only(name, layer, _KIND)
        if fmt.block_size not in BLOCK_SIZES:
            raise ValueError(
                f"layer {name!r} has blocks of {fmt.block_size}, and bitsandbytes has {BLOCK_SIZES}; use one of them"
            )
    elif fmt.scheme != "llm_int8":
        raise ValueError(
            f"layer {name!r} is in {fmt.scheme} with {fmt.bits} bits, and bitsandbytes has Linears in 'nf4', 'fp4' and "
            "'llm_int8' only; quantize it so, or use format='gptq' or 'compressed_tensors'"
        )
    elif layer.input_format is None or layer.input_format.scheme != "llm_int8":
        inputs = "float" if layer.input_format is None else layer.input_format.scheme
        raise ValueError(
            f"the input of layer {name!r} is in {inputs}, and bitsandbytes quantizes that of every LLM.int8() layer by "
            "LLM.int8(); use the plan 'llm_int8'"
        )


def _threshold(layers: Mapping[str, QuantizedLinear]) -> float:
    """Return the one magnitude from which on all layers take inputs for outliers."""
    found = {name: layer.input_format.outlier_threshold for name, layer in layers.items() if layer.input_format}
    first, threshold = next(iter(found.items()))
    for name, value in found.items():
        if 0 < value <= 1 or value != threshold:
            raise ValueError(
                f"layer {name!r} has outlier_threshold={value} and layer {first!r} {threshold}; bitsandbytes takes one "
                "magnitude above 1 for all, or 0 for none"
            )
    return threshold

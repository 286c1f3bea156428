"""AWQ checkpoints, version GEMM, as gptqmodel and transformers read them.

Of a Linear with ``K`` inputs and ``N`` outputs: ``qweight`` int32 ``[K, N / 8]`` and ``qzeros`` int32
``[groups, N / 8]`` in AWQ's order of nibbles (:mod:`lightning_qat.ops.word_packing`); ``scales`` float16
``[groups, N]``. Scales are rounded to float16, once; codes stay as they are. A symmetric weight is one whose zero
points are 8.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qat.formats.contents import Contents, check_head_in_float, check_last_in_float, check_not_held_in_float32
from lightning_qat.formats.integer_weight import (
    UnsignedWeight,
    check_choice_of_groups,
    common_setting,
    rounded_scale,
)
from lightning_qat.formats.model_format import (
    HeldLayer,
    ModelFormat,
    check_held,
    groups_of,
    integer_layer,
    register_format,
)
from lightning_qat.nn import QuantizedLinear
from lightning_qat.ops.word_packing import pack_awq_words, unpack_awq_words

_GROUPS = (-1, 16, 32, 64, 128)


@register_format("awq")
class AWQFormat(ModelFormat):
    """4 bits in groups or per channel."""

    method = "awq"
    marks = ("qweight",)

    def __init__(self, name: str = "awq") -> None:
        self.name = name

    def config(self, contents: Contents) -> dict[str, Any]:
        setting = common_setting(contents.layers, "awq")
        if setting.bits != 4:
            name = next(iter(contents.layers))
            raise ValueError(
                f"bits={setting.bits} (layer {name!r}) is not allowed: AWQ's files have 4; quantize with bits=4, or "
                "use format='gptq'"
            )
        check_choice_of_groups(contents, setting, "awq", _GROUPS)
        check_head_in_float(contents, "awq")
        check_last_in_float(contents, "awq")
        check_not_held_in_float32(contents, "awq")
        for name, layer in contents.layers.items():
            if layer.weight_shape[0] % 8:
                raise ValueError(
                    f"layer {name!r} has out_features={layer.weight_shape[0]}, and AWQ packs 8 outputs into a word; "
                    f"leave it in float with LayerRule({name!r}), or use format='compressed_tensors'"
                )
            rounded_scale(name, UnsignedWeight.of(layer), torch.float16, "awq")
        return {
            "quant_method": "awq",
            "version": "gemm",
            "bits": 4,
            "group_size": setting.group_size,
            "zero_point": True,
            "sym": setting.symmetric,
            "modules_to_not_convert": list(contents.kept) or None,
        }

    def write(self, layer: QuantizedLinear, config: dict[str, Any]) -> dict[str, Tensor]:
        weight = UnsignedWeight.of(layer)
        return {
            "qweight": pack_awq_words(weight.codes.t()),
            "qzeros": pack_awq_words(weight.zero_point.t()),
            "scales": rounded_scale("", weight, torch.float16, "awq").t().contiguous(),
        }

    def read(self, name: str, tensors: Mapping[str, Tensor], linear: nn.Linear, config: dict[str, Any]) -> HeldLayer:
        version, bits = str(config.get("version", config.get("format", "gemm"))).lower(), int(config.get("bits", 4))
        if version != "gemm" or bits != 4:
            raise ValueError(f"version={version!r} with bits={bits} cannot be read; AWQ's 'gemm' with 4 bits can")
        rows, columns, size = linear.out_features, linear.in_features, int(config["group_size"])
        groups = groups_of(name, columns, size)
        check_held(
            name,
            tensors,
            qweight=(torch.int32, (columns, rows // 8)),
            qzeros=(torch.int32, (groups, rows // 8)),
            scales=(None, (groups, rows)),
        )
        words, scales = tensors["qweight"], tensors["scales"]
        codes, zeros = unpack_awq_words(words).t(), unpack_awq_words(tensors["qzeros"]).t()
        return integer_layer(
            codes, scales.t().float(), zeros, 4, grouped=size != -1, symmetric=bool(config.get("sym", True))
        )

"""GPTQ checkpoints, versions 1 and 2, as gptqmodel and transformers read them.

Of a Linear with ``K`` inputs and ``N`` outputs: ``qweight`` int32 ``[K * bits / 32, N]``, lowest bits first along the
inputs; ``scales`` float16 ``[groups, N]``; ``qzeros`` int32 ``[groups, N * bits / 32]``, packed along the outputs; and
``g_idx`` int32 ``[K]``, the group of each input. Version 1 (``checkpoint_format: gptq``) stores zero points minus one.
Scales are rounded to float16, once; codes stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qat.formats.contents import Contents, check_head_in_float
from lightning_qat.formats.integer_weight import (
    Setting,
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
from lightning_qat.ops.word_packing import pack_words, unpack_words
from lightning_qat.quantizers.input_arrangement import INPUT_ORDER

_BITS = (2, 3, 4, 8)
_GROUPS = (-1, 16, 32, 64, 128, 256, 512, 1024)


@register_format("gptq", "gptq_v2")
class GPTQFormat(ModelFormat):
    """``"gptq"`` is version 1, which most engines read; ``"gptq_v2"`` also holds asymmetric zero points of 0."""

    method = "gptq"
    marks = ("qweight", "g_idx")
    holds_order = True

    def __init__(self, name: str = "gptq") -> None:
        self.name = name

    def config(self, contents: Contents) -> dict[str, Any]:
        setting = common_setting(contents.layers, self.name)
        if setting.bits not in _BITS:
            name = next(iter(contents.layers))
            raise ValueError(
                f"bits={setting.bits} (layer {name!r}) is not one of GPTQ's in transformers: {_BITS}; use one of them, "
                "or format='compressed_tensors'"
            )
        check_choice_of_groups(contents, setting, self.name, _GROUPS)
        check_head_in_float(contents, self.name)
        for name, layer in contents.layers.items():
            self._check_layer(name, layer, setting)
        facts: dict[str, Any] = {
            "quant_method": "gptq",
            "bits": setting.bits,
            "group_size": setting.group_size,
            "sym": setting.symmetric,
            "desc_act": any(layer.input_order is not None for layer in contents.layers.values()),
            "checkpoint_format": self.name,
            "pack_dtype": "int32",
        }
        if contents.is_pretrained:
            facts |= _which_layers(contents)
        return facts

    def _check_layer(self, name: str, layer: QuantizedLinear, setting: Setting) -> None:
        rows, columns = layer.weight_shape
        for what, count in (("in_features", columns), ("out_features", rows)):
            if count * setting.bits % 32:
                raise ValueError(
                    f"layer {name!r} has {what}={count}, and GPTQ packs {setting.bits}-bit codes into 32-bit words: it "
                    f"needs a multiple of {32 if setting.bits == 3 else 32 // setting.bits}; leave it in float with "
                    f"LayerRule({name!r})"
                )
        weight = UnsignedWeight.of(layer)
        rounded_scale(name, weight, torch.float16, self.name)
        if self.name == "gptq" and not layer.weight_format.symmetric and bool((weight.zero_point == 0).any()):
            raise ValueError(
                f"layer {name!r} has the zero point 0, and version 1 stores zero points minus one, which readers take "
                "for different numbers then; use format='gptq_v2', or a symmetric grid"
            )

    def write(self, layer: QuantizedLinear, config: dict[str, Any]) -> dict[str, Tensor]:
        weight, bits = UnsignedWeight.of(layer), config["bits"]
        columns = layer.weight_shape[1]
        minus = 1 if config["checkpoint_format"] == "gptq" else 0
        groups = torch.arange(columns) // (columns // weight.scale.shape[1])
        codes, order = weight.codes, layer.input_order
        if order is not None:  # codes lie by groups, and in the file as the inputs come
            codes = torch.empty_like(codes).index_copy_(1, order.cpu(), codes)
            groups = torch.empty_like(groups).index_copy_(0, order.cpu(), groups)
        return {
            "qweight": pack_words(codes, bits).t().contiguous(),
            "qzeros": pack_words(weight.zero_point.t() - minus & 2**bits - 1, bits),
            "scales": rounded_scale("", weight, torch.float16, self.name).t().contiguous(),
            "g_idx": groups.to(torch.int32),
        }

    def read(self, name: str, tensors: Mapping[str, Tensor], linear: nn.Linear, config: dict[str, Any]) -> HeldLayer:
        bits, size = int(config["bits"]), int(config["group_size"])
        rows, columns = linear.out_features, linear.in_features
        version = str(config.get("checkpoint_format") or "gptq")
        if bits not in _BITS or version not in ("gptq", "gptq_v2"):
            raise ValueError(f"checkpoint_format={version!r} with bits={bits} cannot be read; 'gptq' and 'gptq_v2' can")
        groups = groups_of(name, columns, size)
        group, packed = columns // groups, torch.int32
        check_held(
            name,
            tensors,
            qweight=(packed, (-(-columns * bits // 32), rows)),
            qzeros=(packed, (groups, -(-rows * bits // 32))),
            scales=(None, (groups, rows)),
        )
        words, scales = tensors["qweight"], tensors["scales"]
        order = _order_of(name, tensors.get("g_idx"), columns, group)
        plus = 1 if version == "gptq" else 0
        codes = unpack_words(words.t(), bits, columns)
        codes = codes if order is None else codes[:, order]
        zeros = unpack_words(tensors["qzeros"], bits, linear.out_features).to(torch.int32) + plus & 2**bits - 1
        held = integer_layer(
            codes, scales.t().float(), zeros.t(), bits, grouped=size != -1, symmetric=bool(config.get("sym", True))
        )
        return held if order is None else replace(held, tensors={**held.tensors, INPUT_ORDER: order})


def _order_of(name: str, index: Tensor | None, columns: int, group: int) -> Tensor | None:
    """Return the inputs group by group, int64 ``[columns]``; None where they lie so."""
    lying = torch.arange(columns) // group
    if index is None or torch.equal(index.long(), lying):
        return None
    order = index.long().argsort(stable=True)
    if index.shape != (columns,) or not torch.equal(index.long()[order], lying):
        raise ValueError(f"layer {name!r} has groups of other sizes than {group} in g_idx; the file is damaged")
    return order


def _which_layers(contents: Contents) -> dict[str, Any]:
    """Return what tells optimum, and gptqmodel itself, which Linears of the blocks are quantized.

    Raises:
        ValueError: if a layer lies outside the list of blocks that holds the first: optimum replaces inside one.
    """
    first, *_ = contents.layers
    lists = [n for n, m in contents.model.named_modules() if isinstance(m, nn.ModuleList) and first.startswith(f"{n}.")]
    blocks = lists[0] if lists else ""
    outside = [name for name in contents.layers if not blocks or not name.startswith(f"{blocks}.")]
    if outside:
        raise ValueError(
            f"layer {outside[0]!r} lies outside the blocks{f' {blocks!r}' if blocks else ''}, where loaders of GPTQ "
            f"replace Linears; leave it in float with LayerRule({outside[0]!r}), or use format='compressed_tensors'"
        )
    facts: dict[str, Any] = {"block_name_to_quantize": blocks}
    left = [name for name in contents.kept if name.startswith(f"{blocks}.")]
    if left:
        facts["modules_in_block_to_quantize"] = [list(contents.layers)]
        facts["dynamic"] = {"-:^" + name.replace(".", r"\.") + "$": {} for name in left}
    return facts

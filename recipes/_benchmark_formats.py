"""The formats of benchmark group ``convert``: their definition, our ways and those of other libraries."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_qat.config import BitsAndBytesConfig, QuantizationConfig
from lightning_qat.ops import codebook, vectorwise
from lightning_qat.ops.nested import NESTED_BLOCK_SIZE
from lightning_qat.quantizers.quantizer import quantize
from lightning_qat.schemes.quantized_tensor import QuantizedTensor

#: Names of the parts of nested scales in a QuantizedTensor -> in what the tables compare.
_PARTS = {"": "scale", "_absmax": "scale of scales", "_offset": "offset"}


@dataclass(frozen=True)
class Way:
    """One library's way to quantize a tensor and back.

    Args:
        quantize: of a float tensor.
        dequantize: of what ``quantize`` returned.
        stored: name -> tensor of that, flat, to be equal to the definition's; None for another grid.
        package: that has to be installed, besides PyTorch.
    """

    quantize: Callable[[Tensor], Any]
    dequantize: Callable[[Any], Tensor]
    stored: Callable[[Any], dict[str, Tensor]] | None = None
    package: str = "torch"

    @property
    def installed(self) -> bool:
        """Whether its package is there."""
        return importlib.util.find_spec(self.package) is not None


@dataclass(frozen=True)
class Format:
    """A number format: its definition in plain PyTorch, our ways and those of others.

    Args:
        name: in the tables.
        definition: with ``stored``; timed as "torch eager".
        ours: verified against the definition, to the last bit.
        peers: the first that is installed is the baseline.
    """

    name: str
    definition: Way
    ours: Mapping[str, Way]
    peers: Mapping[str, Way] = field(default_factory=dict)


def all_formats(x: Tensor) -> tuple[Format, ...]:
    """Return every format for tensors like ``x``; codes are decided as bitsandbytes does on its device."""
    rule = "cuda" if x.is_cuda else "cpu"
    return (
        _blockwise("nf4", 64, rule),
        _blockwise("fp4", 64, rule),
        _blockwise("dynamic_tree", 256, rule),
        _nested("nf4", 64, rule),
        _llm_int8(),
        _int8_per_channel(),
        _int4_in_groups(128),
    )


def _ours(config: QuantizationConfig) -> Way:
    """Return the public functions: with every check that they make."""
    return Way(lambda x: quantize(x, config), lambda held: held.dequantize(), _parts)


def _parts(held: QuantizedTensor) -> dict[str, Tensor]:
    scales = {_PARTS[end]: tensor.reshape(-1) for end, tensor in held.stored_scale.items()}
    return {"codes": held.packed.reshape(-1), **scales}


def _codes_and_scale(held: tuple[Any, ...]) -> dict[str, Tensor]:
    return {"codes": held[0].reshape(-1), "scale": held[1].reshape(-1)}


# --- codebooks ------------------------------------------------------------------------------------


def _config(name: str, block: int, rule: str, nested: bool = False) -> QuantizationConfig:
    if name == "dynamic_tree":
        return QuantizationConfig(name, bnb=BitsAndBytesConfig(dynamic_tree=True, block_size=block, rule=rule))
    four = BitsAndBytesConfig(bits=4, block_size=block, nested_quantization=nested, rule=rule, quant_type=name)
    return QuantizationConfig(name, bnb=four)


def _blockwise(name: str, block: int, rule: str) -> Format:
    def on(make: Callable[..., Any], back: Callable[..., Tensor]) -> Way:
        def dequantize(held: tuple[Tensor, Tensor, Tensor]) -> Tensor:
            codes, absmax, x = held
            return back(codes, absmax, x.numel(), name, block, x.dtype).view(x.shape)

        return Way(lambda x: (*make(x, None, name, block, rule), x), dequantize, _codes_and_scale)

    theirs = _bitsandbytes_8bit(block) if name == "dynamic_tree" else _bitsandbytes_4bit(name, block)
    return Format(
        f"{name}, block {block}",
        on(codebook.reference_quantize, codebook.reference_dequantize),
        {
            "lightning_qat": _ours(_config(name, block, rule)),
            "lightning_qat, the op alone": on(codebook.codebook_quantize_op, codebook.codebook_dequantize_op),
        },
        {"bitsandbytes": theirs},
    )


def _nested(name: str, block: int, rule: str) -> Format:
    tree = ("dynamic_tree", NESTED_BLOCK_SIZE)

    def define(x: Tensor) -> tuple[Tensor, ...]:
        codes, absmax = codebook.reference_quantize(x, None, name, block, rule)
        offset = absmax.mean()
        return codes, *codebook.reference_quantize(absmax - offset, None, *tree, rule), offset, x

    def values(held: tuple[Tensor, ...]) -> Tensor:
        codes, scale_codes, scale, offset, x = held
        absmax = codebook.reference_dequantize(scale_codes, scale, scale_codes.numel(), *tree, torch.float32) + offset
        return codebook.reference_dequantize(codes, absmax, x.numel(), name, block, x.dtype).view(x.shape)

    def stored(held: tuple[Tensor, ...]) -> dict[str, Tensor]:
        names = ("codes", "scale", "scale of scales", "offset")
        return {part: tensor.reshape(-1) for part, tensor in zip(names, held[:4], strict=True)}

    return Format(
        f"{name} nested, block {block}",
        Way(define, values, stored),
        {"lightning_qat": _ours(_config(name, block, rule, nested=True))},
        {"bitsandbytes": _bitsandbytes_4bit(name, block, nested=True), "torchao": _torchao_nf4(block)},
    )


def _bitsandbytes_4bit(name: str, block: int, nested: bool = False) -> Way:
    def make(x: Tensor) -> Any:
        from bitsandbytes import functional

        return functional.quantize_4bit(x, blocksize=block, compress_statistics=nested, quant_type=name)

    def back(held: Any) -> Tensor:
        from bitsandbytes import functional

        values: Tensor = functional.dequantize_4bit(*held)
        return values

    def stored(held: Any) -> dict[str, Tensor]:
        codes, state = held
        parts = {"codes": codes, "scale": state.absmax}
        if nested:
            parts |= {"scale of scales": state.state2.absmax, "offset": state.offset}
        return {part: tensor.reshape(-1) for part, tensor in parts.items()}

    return Way(make, back, stored, "bitsandbytes")


def _bitsandbytes_8bit(block: int) -> Way:
    def make(x: Tensor) -> Any:
        from bitsandbytes import functional

        return functional.quantize_blockwise(x, blocksize=block)

    def back(held: Any) -> Tensor:
        from bitsandbytes import functional

        values: Tensor = functional.dequantize_blockwise(*held)
        return values

    def stored(held: Any) -> dict[str, Tensor]:
        return {"codes": held[0].reshape(-1), "scale": held[1].absmax.reshape(-1)}

    return Way(make, back, stored, "bitsandbytes")


def _torchao_nf4(block: int) -> Way:
    def make(x: Tensor) -> Any:
        from torchao.quantization import NF4Tensor

        return NF4Tensor.from_tensor(x, block, NESTED_BLOCK_SIZE)

    return Way(make, lambda held: held.get_original_weight(), package="torchao")


# --- integers -------------------------------------------------------------------------------------


def _llm_int8() -> Format:
    def back(held: tuple[Tensor, ...]) -> Tensor:
        codes, absmax, x = held
        return (codes * absmax.view(-1, 1) * vectorwise.PER_CODE).to(x.dtype)

    def op_back(held: tuple[Tensor, ...]) -> Tensor:
        return vectorwise.dequantize_vectorwise(held[0], held[1], dtype=held[2].dtype)

    def on(make: Callable[..., Any], values: Callable[..., Tensor]) -> Way:
        return Way(lambda x: (*make(x, 0.0)[:2], x), values, _codes_and_scale)

    config = QuantizationConfig("llm_int8", bnb=BitsAndBytesConfig(outlier_threshold=0))
    return Format(
        "llm_int8 vector-wise",
        on(vectorwise.reference_quantize, back),
        {
            "lightning_qat": _ours(config),
            "lightning_qat, the op alone": on(vectorwise.vectorwise_quantize_op, op_back),
        },
        {"bitsandbytes": _bitsandbytes_vectorwise()},
    )


def _bitsandbytes_vectorwise() -> Way:
    def make(x: Tensor) -> Any:
        from bitsandbytes import functional

        # It takes float16, as its layers hold their weights.
        return *functional.int8_vectorwise_quant(x.to(torch.float16))[:2], x.dtype

    def back(held: Any) -> Tensor:
        from bitsandbytes import functional

        values: Tensor = functional.int8_vectorwise_dequant(held[0], held[1])
        return values.to(held[2])

    return Way(make, back, _codes_and_scale, "bitsandbytes")


def _grid(rows: Tensor, steps: float, low: int, high: int) -> tuple[Tensor, Tensor]:
    """Return codes of float32 rows and the step of each: its largest magnitude divided by ``steps``."""
    absmax = rows.abs().amax(1)
    scale = absmax / torch.full_like(absmax, steps)  # a GPU would multiply by a number's reciprocal
    return torch.round(rows / scale[:, None]).clamp(low, high), scale


def _int8_per_channel() -> Format:
    def make(x: Tensor) -> tuple[Tensor, ...]:
        codes, scale = _grid(x.float(), 127, -127, 127)
        return codes.to(torch.int8), scale, x

    def back(held: tuple[Tensor, ...]) -> Tensor:
        return (held[0].float() * held[1][:, None]).to(held[2].dtype)

    def torch_make(x: Tensor) -> tuple[Tensor, torch.dtype]:
        values = x.float()
        scale = values.abs().amax(1) / 127
        zero = torch.zeros_like(scale, dtype=torch.int64)
        return torch.quantize_per_channel(values, scale, zero, 0, torch.qint8), x.dtype

    def torchao_make(x: Tensor) -> Any:
        from torchao.quantization import Int8Tensor, PerRow

        return Int8Tensor.from_hp(x, granularity=PerRow())

    return Format(
        "int8 per channel",
        Way(make, back, _codes_and_scale),
        {"lightning_qat": _ours(QuantizationConfig("int8", per_channel=True))},
        {
            "torch.quantize_per_channel": Way(torch_make, lambda held: held[0].dequantize().to(held[1])),
            "torchao": Way(torchao_make, lambda held: held.dequantize(), package="torchao"),
        },
    )


def _int4_in_groups(group: int) -> Format:
    def make(x: Tensor) -> tuple[Tensor, ...]:
        codes, scale = _grid(x.float().view(-1, group), 7.5, -8, 7)
        unsigned = (codes + 8).to(torch.uint8).view(-1, 2)
        return unsigned[:, 0] | unsigned[:, 1] << 4, scale, x

    def back(held: tuple[Tensor, ...]) -> Tensor:
        packed, scale, x = held
        codes = torch.stack((packed & 15, packed >> 4), dim=1).view(-1, group).float() - 8
        return (codes * scale[:, None]).view(x.shape).to(x.dtype)

    return Format(
        f"int4, group {group}",
        Way(make, back, _codes_and_scale),
        {"lightning_qat": _ours(QuantizationConfig("int4", group_size=group))},
        {"torchao, a code a byte": _torchao_int4(group)},
    )


def _torchao_int4(group: int) -> Way:
    def make(x: Tensor) -> Any:
        from torchao.quantization import IntxUnpackedToInt8Tensor

        return IntxUnpackedToInt8Tensor.from_hp(x, (1, group), torch.int4)  # type: ignore[attr-defined]

    return Way(make, lambda held: held.dequantize(), package="torchao")

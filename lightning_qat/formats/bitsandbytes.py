"""Exchange with bitsandbytes: the tensors of its state dicts, byte for byte.

A parameter called ``weight`` has these entries (``Linear4bit``): ``weight`` (packed uint8, ``[bytes, 1]``),
``weight.absmax``, ``weight.quant_map``, with nested scales ``weight.nested_absmax`` and ``weight.nested_quant_map``,
and ``weight.quant_state.bitsandbytes__nf4`` (or ``__fp4``), UTF-8 JSON as uint8. ``Linear8bitLt`` has ``weight``
(int8), ``SCB`` and ``weight_format``. The block-wise 8-bit map, which bitsandbytes keeps in memory only, is written
like the 4-bit formats, as ``weight.quant_state.bitsandbytes__dynamic``.
"""

from __future__ import annotations

import json
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from lightning_qat.config import BLOCK_SIZES, BitsAndBytesConfig, QuantizationConfig
from lightning_qat.ops.codebook_tables import codebook
from lightning_qat.quantizers.quantizer import quantize
from lightning_qat.schemes import TensorFormat
from lightning_qat.schemes.quantized_tensor import QuantizedTensor

#: Ends of the names of quant states -> scheme.
_KINDS = {"nf4": "nf4", "fp4": "fp4", "dynamic": "dynamic_tree"}
_NAMES = {scheme: kind for kind, scheme in _KINDS.items()}
_STATE = "weight.quant_state.bitsandbytes__"
#: Elements of a block of nested scales.
_NESTED_BLOCK = 256


def quantize_int8(
    tensor: Tensor, bnb_config: BitsAndBytesConfig | None = None, *, generator: torch.Generator | None = None
) -> QuantizedTensor:
    """Return ``tensor`` in vector-wise int8 (LLM.int8()), or in the dynamic map where the config says so.

    Args:
        tensor: floating point; a row is everything of one index of dimension 0.
        bnb_config: with ``bits=8``; columns above ``outlier_threshold`` stay in 16 bit. None means its defaults.
        generator: of the random numbers where ``bnb_config.stochastic``.
    """
    bnb = BitsAndBytesConfig() if bnb_config is None else bnb_config
    if bnb.bits != 8:
        raise ValueError(f"bits={bnb.bits} is not allowed here; use quantize_4bit, or BitsAndBytesConfig(bits=8)")
    return quantize(tensor, config_of(bnb), generator=generator)


def quantize_4bit(
    tensor: Tensor, bnb_config: BitsAndBytesConfig | None = None, *, generator: torch.Generator | None = None
) -> QuantizedTensor:
    """Return ``tensor`` in NF4 or FP4, in blocks of the flattened tensor.

    Args:
        tensor: floating point, any shape.
        bnb_config: with ``bits=4``; None means NF4 in blocks of 64, bitsandbytes' default.
        generator: of the random numbers where ``bnb_config.stochastic``.
    """
    bnb = BitsAndBytesConfig(bits=4, block_size=64) if bnb_config is None else bnb_config
    if bnb.bits != 4:
        raise ValueError(f"bits={bnb.bits} is not allowed here; use quantize_int8, or BitsAndBytesConfig(bits=4)")
    return quantize(tensor, config_of(bnb), generator=generator)


def quantize_dynamic_tree(
    tensor: Tensor, bnb_config: BitsAndBytesConfig | None = None, *, generator: torch.Generator | None = None
) -> QuantizedTensor:
    """Return ``tensor`` in bitsandbytes' 8-bit dynamic map, in blocks of the flattened tensor.

    Args:
        tensor: floating point, any shape.
        bnb_config: its block size, rule, nesting and rounding are used; None means its defaults.
        generator: of the random numbers where ``bnb_config.stochastic``.
    """
    bnb = BitsAndBytesConfig() if bnb_config is None else bnb_config
    if bnb.bits != 8:
        raise ValueError(f"bits={bnb.bits} is not allowed here: the dynamic map has 8; use BitsAndBytesConfig(bits=8)")
    return quantize(tensor, QuantizationConfig("dynamic_tree", bnb=bnb), generator=generator)


def config_of(bnb: BitsAndBytesConfig) -> QuantizationConfig:
    """Return the config of one tensor that settings of bitsandbytes mean."""
    if bnb.bits == 4:
        return QuantizationConfig(bnb.quant_type, bnb=bnb)
    return QuantizationConfig("dynamic_tree" if bnb.dynamic_tree else "llm_int8", bnb=bnb)


def dequantize_bitsandbytes(
    quantized: QuantizedTensor | dict[str, Tensor], bnb_config: BitsAndBytesConfig | None = None
) -> Tensor:
    """Return the values of a quantized tensor, or of a state dict as bitsandbytes has it.

    Args:
        quantized: what the functions of this module return or take.
        bnb_config: of a state dict, see :func:`from_bitsandbytes_format`.
    """
    if isinstance(quantized, QuantizedTensor):
        return quantized.dequantize()
    return from_bitsandbytes_format(quantized, bnb_config).dequantize()


def to_bitsandbytes_format(
    tensor_or_quantized: Tensor | QuantizedTensor, bnb_config: BitsAndBytesConfig | None = None
) -> dict[str, Tensor]:
    """Return the state dict that bitsandbytes has for a parameter called ``weight``.

    Args:
        tensor_or_quantized: a float tensor, which is quantized first, or a quantized one.
        bnb_config: how to quantize; of a quantized tensor it is checked to be the same where it is given.

    Raises:
        ValueError: if bitsandbytes does not have the format, or it holds outliers, which ``Linear8bitLt`` finds in the
            input and never stores.
    """
    if isinstance(tensor_or_quantized, QuantizedTensor):
        held = tensor_or_quantized
        _check_same(held, bnb_config)
    else:
        bnb = BitsAndBytesConfig(bits=4, block_size=64) if bnb_config is None else bnb_config
        # bitsandbytes looks for outliers in inputs; its weights have none.
        held = quantize(tensor_or_quantized, config_of(replace(bnb, outlier_threshold=0.0)))
    if held.input_scale is not None:
        raise ValueError("bitsandbytes has no place for an input_scale (AWQ); quantize the float tensor without one")
    if held.order is not None:
        raise ValueError(
            "the columns of the tensor lie in another order (GPTQ), which bitsandbytes has no place for; use "
            "GPTQOptions(static_groups=True)"
        )
    if held.format.scheme == "llm_int8":
        return _write_int8(held)
    if held.format.scheme not in _NAMES:
        raise ValueError(
            f"scheme={held.format.scheme!r} is no format of bitsandbytes, which has 'nf4', 'fp4', 'dynamic_tree' and "
            "'llm_int8'; quantize the float tensor in one of these"
        )
    return _write_blocks(held)


def _check_same(held: QuantizedTensor, bnb: BitsAndBytesConfig | None) -> None:
    if bnb is None:
        return
    config, fmt = config_of(bnb), held.format
    blocks = fmt.block_size is not None
    same = fmt.scheme == config.scheme and (
        not blocks or (fmt.block_size, fmt.nested) == (bnb.block_size, bnb.nested_quantization)
    )
    if not same:
        raise ValueError(
            f"bnb_config={bnb!r} is not how the tensor is quantized: {fmt.scheme}, block_size={fmt.block_size}, "
            f"nested={fmt.nested}; leave bnb_config out, or quantize the float tensor with it"
        )


def _write_int8(held: QuantizedTensor) -> dict[str, Tensor]:
    if held.outliers is not None:
        raise ValueError(
            f"the tensor keeps {held.outliers.columns.numel()} columns in 16 bit, which a state dict of Linear8bitLt "
            "has no place for; quantize it with outlier_threshold=0"
        )
    rows = held.shape[0] if len(held.shape) else 1
    return {
        "weight": held.codes.reshape(rows, prod(held.shape[1:])).contiguous(),
        "SCB": held.scale.reshape(-1).contiguous(),
        "weight_format": torch.zeros((), dtype=torch.uint8),
    }


def _write_blocks(held: QuantizedTensor) -> dict[str, Tensor]:
    fmt, kind = held.format, _NAMES[held.format.scheme]
    if fmt.block_size not in BLOCK_SIZES:
        raise ValueError(
            f"block_size={fmt.block_size} is not one of bitsandbytes: {BLOCK_SIZES}; quantize with one of them"
        )
    packed = held.packed.reshape(-1, 1) if fmt.bits == 4 else held.codes
    facts: dict[str, Any] = {
        "quant_type": kind,
        "blocksize": fmt.block_size,
        "dtype": str(held.dtype).removeprefix("torch."),
        "shape": list(held.shape),
    }
    state = {
        "weight": packed,
        "weight.absmax": held.stored_scale[""],
        "weight.quant_map": codebook(fmt.scheme, held.device).clone(),
    }
    if fmt.nested:
        state["weight.nested_absmax"] = held.stored_scale["_absmax"]
        state["weight.nested_quant_map"] = codebook("dynamic_tree", held.device).clone()
        offset = held.stored_scale["_offset"].item()
        facts |= {"nested_blocksize": _NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": offset}
    text = bytearray(json.dumps(facts).encode())
    return {**state, _STATE + kind: torch.frombuffer(text, dtype=torch.uint8)}


def from_bitsandbytes_format(
    state_dict: dict[str, Tensor], bnb_config: BitsAndBytesConfig | None = None
) -> QuantizedTensor:
    """Return what a state dict of bitsandbytes holds for a parameter called ``weight``.

    Args:
        state_dict: of ``Linear4bit`` (with any ``quant_storage``) or ``Linear8bitLt``, or what
            :func:`to_bitsandbytes_format` made; a ``bias`` is ignored. Nothing in it is changed.
        bnb_config: checked to be what the state dict says, where it is given. Values of ``Linear8bitLt``, which does
            not say what they were, are float16.

    Raises:
        ValueError: if something is missing, does not fit or is of a map that is not bitsandbytes' own.
    """
    state = {name: value for name, value in state_dict.items() if name != "bias"}
    if "weight" not in state:
        raise ValueError(f"state_dict has no 'weight' but {sorted(state)}; strip the layer's name from the keys")
    kinds = [name.removeprefix(_STATE) for name in state if name.startswith(_STATE)]
    if "SCB" in state:
        held = _read_int8(state)
    elif len(kinds) == 1 and kinds[0] in _KINDS:
        held = _read_blocks(state, kinds[0])
    else:
        raise ValueError(
            f"state_dict has neither 'SCB' nor one '{_STATE}nf4' (or fp4, dynamic) but {sorted(state)}; take it from a "
            "quantized Linear4bit or Linear8bitLt"
        )
    _check_same(held, bnb_config)
    return held


def _read_int8(state: dict[str, Tensor]) -> QuantizedTensor:
    weight, scale = state["weight"], state["SCB"]
    form = state.get("weight_format")
    if form is not None and int(form) != 0:
        raise ValueError(f"weight_format={int(form)} is not row-major; save it with bitsandbytes 0.45 or newer")
    fits = weight.dtype == torch.int8 and weight.dim() == 2 and scale.numel() == weight.shape[0]
    if not fits or scale.dtype != torch.float32:
        raise ValueError(
            f"weight is {weight.dtype} of shape {tuple(weight.shape)} and SCB has {scale.numel()} elements of "
            f"{scale.dtype}; Linear8bitLt has int8 [rows, columns] and float32, one for each row"
        )
    _check_finite("SCB", scale)
    fmt = TensorFormat("llm_int8", 8, True, axis=0)
    return QuantizedTensor(weight, {"": scale.reshape(-1)}, None, fmt, weight.shape, torch.float16)


def _read_blocks(state: dict[str, Tensor], kind: str) -> QuantizedTensor:
    scheme = _KINDS[kind]
    try:
        facts = json.loads(bytes(state[_STATE + kind].cpu().tolist()).decode())
        block, shape, dtype = int(facts["blocksize"]), torch.Size(facts["shape"]), getattr(torch, facts["dtype"])
        absmax = state["weight.absmax"]
        nested = "weight.nested_absmax" in state
        offset = torch.tensor(float(facts["nested_offset"]), device=absmax.device) if nested else None
    except (KeyError, UnicodeDecodeError, json.JSONDecodeError, TypeError, AttributeError) as error:
        raise ValueError(f"the quant state {_STATE + kind!r} is damaged or incomplete: {error!r}") from None
    for name, table in (("weight.quant_map", scheme), ("weight.nested_quant_map", "dynamic_tree")):
        own = state.get(name)
        if own is not None and not torch.equal(own.float(), codebook(table, own.device)):
            raise ValueError(f"{name!r} is not bitsandbytes' own table of {table}; only that one can be read")
    fmt = TensorFormat(scheme, 4 if scheme != "dynamic_tree" else 8, True, block_size=block, nested=nested)
    stored = {"": absmax}
    if offset is not None:
        stored |= {"_absmax": state["weight.nested_absmax"], "_offset": offset}
    packed = state["weight"].reshape(-1)
    if fmt.bits == 4 and packed.dtype != torch.uint8:  # quant_storage=torch.bfloat16: the same bytes by another name
        packed = packed.contiguous().view(torch.uint8)
    count = prod(shape)
    expected, blocks = (count + 1) // 2 if fmt.bits == 4 else count, -(-count // block)
    if packed.dtype != torch.uint8 or packed.numel() != expected or absmax.numel() != blocks:
        raise ValueError(
            f"weight is {state['weight'].dtype} with {state['weight'].numel()} elements and absmax has "
            f"{absmax.numel()}; shape {tuple(shape)} in blocks of {block} takes uint8 with {expected} and {blocks}"
        )
    wanted = {"weight.absmax": torch.uint8 if nested else torch.float32, "weight.nested_absmax": torch.float32}
    for name, kind_of_scale in wanted.items():
        if name in state and state[name].dtype != kind_of_scale:
            raise ValueError(f"{name!r} is {state[name].dtype} instead of {kind_of_scale}: the state is damaged")
        if name in state and kind_of_scale == torch.float32:
            _check_finite(name, state[name])
    return QuantizedTensor(packed, stored, None, fmt, shape, dtype)


def _check_finite(name: str, scale: Tensor) -> None:
    if not bool(torch.isfinite(scale).all()):
        raise ValueError(f"{name!r} holds NaN or inf: the state is damaged")

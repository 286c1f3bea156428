"""Formats whose values come from a table, in blocks with one scale each: NF4, FP4 and the 8-bit dynamic tree.

``value = table[code] * absmax`` of the block. Tables, decision rules, nibble order and nested scales are those of
bitsandbytes, byte for byte. Sources: NF4 and nested scales, Dettmers et al. 2023 (QLoRA); the dynamic tree and
block-wise quantization, Dettmers et al. 2022 (8-bit optimizers).
"""

from __future__ import annotations

from math import prod
from typing import ClassVar

import torch
from torch import Tensor

from lightning_qat.ops.codebook import (
    block_absmax,
    codebook_dequantize_op,
    codebook_quantize_op,
    dequantize_codebook,
    fake_quantize_codebook,
    pack_nibbles,
    quantize_codebook,
    unpack_nibbles,
)
from lightning_qat.ops.nested import NestedScale, nest, unnest
from lightning_qat.schemes.base import Scheme, _register
from lightning_qat.schemes.format import TensorFormat


class CodebookScheme(Scheme):
    """Shared by the block-wise tables: the scale is the block's largest magnitude, there is no zero point."""

    codebook: ClassVar[str]

    def parameters(self, low: Tensor, high: Tensor, fmt: TensorFormat) -> tuple[Tensor, Tensor]:
        # What only float64 can hold is cut at the largest float32.
        absmax = torch.maximum(-low, high).to(torch.float32).clamp_max(torch.finfo(torch.float32).max)
        return absmax, torch.zeros_like(absmax, dtype=torch.int32)

    def parameters_of(self, x: Tensor, fmt: TensorFormat) -> tuple[Tensor, Tensor]:
        """Return what bitsandbytes finds, which for a short last block is not always its largest magnitude."""
        absmax = block_absmax(x, _block(fmt), codebook=self.codebook, rule=fmt.rule)
        return self.parameters(-absmax, absmax, fmt)

    def quantize(self, x: Tensor, scale: Tensor, zero_point: Tensor | None, fmt: TensorFormat) -> Tensor:
        return quantize_codebook(x, scale, codebook=self.codebook, block_size=_block(fmt), rule=fmt.rule)

    def quantize_stochastically(
        self,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        fmt: TensorFormat,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        options = {"codebook": self.codebook, "block_size": _block(fmt), "rule": fmt.rule}
        return quantize_codebook(x, scale, **options, generator=generator, stochastic=True)  # type: ignore[arg-type]

    def dequantize(
        self, codes: Tensor, scale: Tensor, zero_point: Tensor | None, fmt: TensorFormat, dtype: torch.dtype
    ) -> Tensor:
        return dequantize_codebook(codes, scale, codebook=self.codebook, block_size=_block(fmt), dtype=dtype)

    def fake_quantize(self, x: Tensor, scale: Tensor, zero_point: Tensor | None, fmt: TensorFormat) -> Tensor:
        stored = self.effective_scale(scale, fmt) if fmt.nested else None
        return fake_quantize_codebook(
            x, scale, codebook=self.codebook, block_size=_block(fmt), rule=fmt.rule, stored_absmax=stored
        )

    def pack(self, codes: Tensor, fmt: TensorFormat) -> Tensor:
        """Return two codes a byte, the first in the high nibble, or bytes as they are; flat."""
        return pack_nibbles(codes, self.codebook) if fmt.bits == 4 else codes.reshape(-1).clone()

    def unpack(self, packed: Tensor, shape: torch.Size, fmt: TensorFormat) -> Tensor:
        return unpack_nibbles(packed, shape) if fmt.bits == 4 else packed.reshape(shape)

    def quantize_packed(self, x: Tensor, scale: Tensor, zero_point: Tensor | None, fmt: TensorFormat) -> Tensor:
        return codebook_quantize_op(x, scale, self.codebook, _block(fmt), fmt.rule)[0]

    def quantize_by_own_range(self, x: Tensor, fmt: TensorFormat) -> tuple[Tensor, Tensor] | None:
        # Scales of float64 may have to be cut before codes are chosen; a scheme derived from this one may do otherwise.
        if x.dtype == torch.float64 or type(self) not in _OWN:
            return None
        return codebook_quantize_op(x, None, self.codebook, _block(fmt), fmt.rule)

    def dequantize_packed(
        self,
        packed: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        shape: torch.Size,
        fmt: TensorFormat,
        dtype: torch.dtype,
    ) -> Tensor:
        values = codebook_dequantize_op(packed, scale, prod(shape), self.codebook, _block(fmt), dtype)
        return values.view(shape)

    def store_scale(self, scale: Tensor, fmt: TensorFormat) -> dict[str, Tensor]:
        """Return the scale, or its codes in the dynamic tree, their block scales and the mean they are relative to."""
        if not fmt.nested:
            return {"": scale}
        nested = nest(scale, rule=fmt.rule)
        return {"": nested.codes, "_absmax": nested.absmax, "_offset": nested.offset}

    def read_scale(self, stored: dict[str, Tensor], fmt: TensorFormat) -> Tensor:
        if not fmt.nested:
            return stored[""]
        return unnest(NestedScale(stored[""], stored["_absmax"], stored["_offset"]))

    def effective_scale(self, scale: Tensor, fmt: TensorFormat) -> Tensor:
        return self.read_scale(self.store_scale(scale, fmt), fmt)


def _block(fmt: TensorFormat) -> int:
    if fmt.block_size is None:
        raise ValueError(f"scheme={fmt.scheme!r} needs a block size; this format has none")
    return fmt.block_size


@_register("nf4")
class NF4Scheme(CodebookScheme):
    """4-bit NormalFloat: quantiles of a normal distribution."""

    codebook = "nf4"
    block_size = 64


@_register("fp4")
class FP4Scheme(CodebookScheme):
    """4-bit floating point: sign, two exponent bits, one mantissa bit."""

    codebook = "fp4"
    block_size = 64


@_register("dynamic_tree")
class DynamicTreeScheme(CodebookScheme):
    """8 bits, some for the exponent and the rest for the fraction, as each value needs."""

    codebook = "dynamic_tree"
    block_size = 256


#: Those whose methods are all above.
_OWN = (NF4Scheme, FP4Scheme, DynamicTreeScheme)

"""Nested scales: the absmax of every block itself as an 8-bit code, with a scale for each 256 of them.

Source: Dettmers et al. 2023 (QLoRA, "double quantization"); bytes are those of bitsandbytes' ``compress_statistics``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_qat.ops.codebook import codebook_quantize_op, dequantize_codebook
from lightning_qat.ops.codebook_tables import check_codebook

_CODEBOOK = "dynamic_tree"
#: Scales that share a scale.
NESTED_BLOCK_SIZE = 256


class NestedScale(NamedTuple):
    """Scales as they are stored.

    Args:
        codes: in the 8-bit dynamic map, uint8 shaped as the scales.
        absmax: of each 256 scales less ``offset``, float32 ``[ceil(n / 256)]``.
        offset: the mean of the scales, float32 without dimensions.
    """

    codes: Tensor
    absmax: Tensor
    offset: Tensor


def nest(absmax: Tensor, rule: str = "cpu") -> NestedScale:
    """Return the scales quantized about their mean.

    Equal scales come back changed: the 8-bit CPU rule gives 0.0 no code of its own. Where the sum of all scales
    overflows float32 the mean is infinite, as in bitsandbytes, and the scales are lost.

    Args:
        absmax: float32, any shape.
        rule: "cpu" or "cuda", whose decisions of bitsandbytes the codes follow.

    Raises:
        ValueError: if ``absmax`` is not float32, or ``rule`` is not known.
    """
    check_codebook(_CODEBOOK, rule)
    if absmax.dtype != torch.float32:
        raise ValueError(f"absmax has dtype {absmax.dtype}; use torch.float32")
    return NestedScale(*nest_op(absmax, rule))


# An op, so that compiled graphs add the mean up in the same order: another one gives other codes.
@torch.library.custom_op("lightning_qat::nest", mutates_args=())
def nest_op(absmax: Tensor, rule: str) -> tuple[Tensor, Tensor, Tensor]:
    """The unchecked op behind :func:`nest`."""
    flat = absmax.reshape(-1)
    offset = flat.mean() if flat.numel() else flat.new_zeros(())
    codes, scale = codebook_quantize_op(flat - offset, None, _CODEBOOK, NESTED_BLOCK_SIZE, rule)
    return codes.view(absmax.shape), scale, offset


@nest_op.register_fake
def _(absmax: Tensor, rule: str) -> tuple[Tensor, Tensor, Tensor]:
    blocks = (absmax.numel() + NESTED_BLOCK_SIZE - 1) // NESTED_BLOCK_SIZE
    return absmax.new_empty(absmax.shape, dtype=torch.uint8), absmax.new_empty(blocks), absmax.new_empty(())


def unnest(nested: NestedScale) -> Tensor:
    """Return the scales that are stored, float32 shaped as ``nested.codes``.

    Raises:
        ValueError: if a dtype or size does not fit.
    """
    values = dequantize_codebook(nested.codes, nested.absmax, codebook=_CODEBOOK, block_size=NESTED_BLOCK_SIZE)
    return values + nested.offset

"""Two 4-bit codes of a table in a byte, as bitsandbytes stores them."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_qat.native import packing as native
from lightning_qat.ops.affine_cpu import takes_pieces
from lightning_qat.ops.codebook_tables import zero_code
from lightning_qat.ops.workspace import advise_huge_pages

if TYPE_CHECKING:
    from collections.abc import Sequence


def pack_nibbles(codes: Tensor, codebook: str = "nf4") -> Tensor:
    """Return two 4-bit codes a byte, the even element in the high nibble, uint8 ``[(numel + 1) // 2]``.

    Args:
        codes: uint8 of 0 to 15, any shape.
        codebook: an odd number of codes is filled up with the code of 0.0 in this format, as bitsandbytes does.
    """
    flat = codes.reshape(-1)
    if codes.dtype == torch.uint8 and takes_pieces(codes):
        packed = advise_huge_pages(torch.empty((len(flat) + 1) // 2, dtype=torch.uint8, device="cpu"))
        if native.pack_nibbles(flat.contiguous(), packed, zero_code(codebook)):
            return packed
    if flat.numel() % 2:
        flat = torch.cat((flat, flat.new_full((1,), zero_code(codebook))))
    return (flat[::2] << 4) | flat[1::2]


def unpack_nibbles(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the codes that :func:`pack_nibbles` packed, uint8 of ``shape``.

    Raises:
        ValueError: if ``packed`` has another size than ``shape`` takes.
    """
    count = prod(shape)
    if packed.dtype != torch.uint8 or packed.numel() != (count + 1) // 2:
        raise ValueError(
            f"packed is {packed.dtype} with {packed.numel()} elements; codes of shape {tuple(shape)} take "
            f"{(count + 1) // 2} of torch.uint8"
        )
    flat = packed.reshape(-1)
    if takes_pieces(packed):
        codes = advise_huge_pages(torch.empty(tuple(shape), dtype=torch.uint8, device="cpu"))
        if native.unpack_nibbles(flat.contiguous(), codes):
            return codes
    return torch.stack((flat >> 4, flat & 15), dim=1).view(-1)[:count].reshape(tuple(shape))

"""Integer codes of up to 8 bits and back on the CPU, in one pass over memory, for scales that neighbours share.

Tensors are contiguous and not empty. Each function is told by its result if it did nothing: there is no kernel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_qat.native.library import FloatFamily, threads_for

_FAMILY = FloatFamily("affine", {"quantize": "pppqpqffiii", "dequantize": "pippqfpqi"})


def _find(name: str, x: Tensor) -> Any:
    return _FAMILY.of(name, x.dtype) if x.numel() else None


def _address(zero: Tensor | None) -> int:
    return 0 if zero is None else zero.data_ptr()


def quantize(
    x: Tensor, scale: Tensor, zero: Tensor | None, run: int, out: Tensor, quant_min: int, quant_max: int, nibbles: bool
) -> bool:
    """Write the codes of ``x``; return whether it was done.

    Args:
        x: floating point.
        scale: float32, one for each run.
        zero: whole numbers from ``quant_min`` to ``quant_max``, float32 like ``scale``, or None for 0.
        run: consecutive elements that share a scale.
        out: int8 or uint8 like ``x``; or, with ``nibbles``, the bytes of ``pack_bits`` with 4 bits.
        quant_min: smallest code.
        quant_max: largest code, of 8 bits at most.
        nibbles: store two codes a byte, less ``quant_min`` where that is negative.
    """
    function = _find("quantize", x)
    if function is None:
        return False
    offset = 8 if nibbles and quant_min < 0 else 0
    addresses = x.data_ptr(), scale.data_ptr(), _address(zero), run, out.data_ptr()
    function(*addresses, x.numel(), quant_min, quant_max, offset, nibbles, threads_for(x.numel()))
    return True


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor | None, run: int, out: Tensor, factor: float = 1.0) -> bool:
    """Write ``(codes - zero) * scale * factor``, each step rounded to float32; return whether it was done.

    Args:
        codes: int8 or uint8; there is no kernel for others.
        scale: float32, one for each run.
        zero: likewise, or None for 0.
        run: consecutive elements that share a scale.
        out: floating point, of as many elements.
        factor: the last.
    """
    function = _find("dequantize", out)
    if function is None or codes.dtype not in (torch.int8, torch.uint8):
        return False
    addresses = scale.data_ptr(), _address(zero), run, factor, out.data_ptr()
    function(codes.data_ptr(), codes.dtype == torch.int8, *addresses, out.numel(), threads_for(out.numel()))
    return True

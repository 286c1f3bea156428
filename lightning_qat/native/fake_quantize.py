"""Fake quantization of contiguous float32 tensors."""

from __future__ import annotations

from torch import Tensor

from lightning_qat.native.library import Family, threads_for

_FAMILY = Family("fake_quantize", {"fake_quantize_tensor": "ppqffiffi"})


def fake_quantize_tensor(
    x: Tensor, out: Tensor, scale: float, zero: float | None, quant_min: int, quant_max: int
) -> bool:
    """Write ``x`` fake-quantized with one scale into ``out``; False where there is no kernel, and nothing is done.

    Args:
        x: contiguous float32.
        out: likewise, of the same size; may be ``x``.
        scale: positive.
        zero: the rounded code of 0.0, or None.
        quant_min: smallest code.
        quant_max: largest code.
    """
    functions = _FAMILY.functions()
    if functions is None:
        return False
    count = x.numel()
    functions.fake_quantize_tensor(
        x.data_ptr(), out.data_ptr(), count, scale, zero or 0.0, zero is not None, quant_min, quant_max,
        threads_for(count),
    )  # fmt: skip
    return True

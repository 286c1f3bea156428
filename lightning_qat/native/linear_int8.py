"""Inputs to unsigned 8-bit codes, and products of few rows of codes with int8 weights."""

from __future__ import annotations

from ctypes import Structure, addressof, byref, c_float, c_int32, c_int64, c_void_p
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lightning_qat.native.library import Family, threads_for

_FAMILY = Family(
    "linear_int8",
    {
        "linear_quantize": "pqfiffpi",
        "linear_quantize_tensor": "pqfffpppi",
        "linear_quantize_tokens": "pqqfffppi",
        "linear_multiply": "pqqpqppqppippi",
        "linear_of_tokens": "pqppppi",
        "linear_int8_vectors": "p",
    },
)


def has_linear_int8() -> bool:
    """Return whether these kernels can be used, on this thread and now."""
    return _FAMILY.functions() is not None


@lru_cache(maxsize=1)
def linear_int8_is_fast() -> bool:
    """Return whether this processor has instructions for the products; :func:`has_linear_int8` holds."""
    found = c_int32(0)
    _FAMILY.functions().linear_int8_vectors(byref(found))
    return bool(found.value)


def quantize_unsigned_native(x: Tensor, out: Tensor, scale: float, zero_point: int, low: int, high: int) -> bool:
    """Write the uint8 codes of ``x`` on one grid into ``out``; False where there is no kernel, and nothing is done.

    Args:
        x: dense float32.
        out: uint8 in the same layout.
        scale: of all.
        zero_point: the code of 0.0.
        low: smallest code.
        high: largest code.
    """
    functions = _FAMILY.functions()
    if functions is None:
        return False
    count = x.numel()
    functions.linear_quantize(
        x.data_ptr(), count, scale, zero_point, low - zero_point, high - zero_point, out.data_ptr(), threads_for(count)
    )
    return True


def quantize_by_range(
    x: Tensor, quant_min: int, quant_max: int, divisor: float, *, per_token: bool
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return codes, scale and zero point of ``x`` on the grids of its ranges, or None where there is no kernel.

    Args:
        x: contiguous float32, ``[tokens, columns]``, not empty.
        quant_min: smallest code; negative ones are those of symmetric grids, and are shifted by 128.
        quant_max: largest code.
        divisor: what a symmetric range is divided by for its scale.
        per_token: a symmetric grid for each row; else one for all, which may be asymmetric.

    Returns:
        Codes, uint8 shaped as ``x``; scale, float32 of one element or ``[tokens]``; zero point, int32 of one element.
    """
    functions = _FAMILY.functions()
    if functions is None:
        return None
    tokens, columns = x.shape
    codes, scale = torch.empty_like(x, dtype=torch.uint8), x.new_empty(tokens if per_token else 1)
    if per_token:
        zero = _MIDDLE
        functions.linear_quantize_tokens(
            x.data_ptr(), tokens, columns, quant_min, quant_max, divisor, scale.data_ptr(), codes.data_ptr(),
            threads_for(x.numel()),
        )  # fmt: skip
    else:
        zero = x.new_empty(1, dtype=torch.int32)
        functions.linear_quantize_tensor(
            x.data_ptr(), x.numel(), quant_min, quant_max, divisor, scale.data_ptr(), zero.data_ptr(),
            codes.data_ptr(), threads_for(x.numel()),
        )  # fmt: skip
    return codes, scale, zero


#: The zero point of symmetric codes that are shifted.
_MIDDLE = torch.full((1,), 128, dtype=torch.int32, device="cpu")


def multiply_codes_native(
    codes: Tensor,
    scale: Tensor | float,
    zero_point: Tensor | int,
    weight: Tensor,
    sums: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    *,
    per_token: bool = False,
) -> Tensor | None:
    """Return ``(codes - zero_point) @ weight.T`` scaled and shifted, float32, or None where there is no kernel.

    One rounding for each step: ``float(sum) * (scale * weight_scale) + bias``, and per token
    ``float(sum) * weight_scale * scale + bias``.

    Args:
        codes: contiguous uint8, ``[tokens, columns]``.
        scale: float32, one element, or per token contiguous ``[tokens]``.
        zero_point: int32, one element.
        weight: contiguous int8, ``[rows, columns]``.
        sums: of its rows, int32.
        weight_scale: float32, one element or ``[rows]``.
        bias: contiguous float32, ``[rows]``, or None.
        per_token: whether every token has a scale.
    """
    functions = _FAMILY.functions()
    if functions is None:
        return None
    (tokens, columns), rows = codes.shape, weight.shape[0]
    out = weight_scale.new_empty((tokens, rows))
    scale_address: Any = scale.data_ptr() if isinstance(scale, Tensor) else byref(c_float(scale))
    zero_address: Any = zero_point.data_ptr() if isinstance(zero_point, Tensor) else byref(c_int32(zero_point))
    functions.linear_multiply(
        codes.data_ptr(), tokens, columns, weight.data_ptr(), rows, sums.data_ptr(), weight_scale.data_ptr(),
        weight_scale.numel(), scale_address, zero_address, per_token,
        None if bias is None else bias.data_ptr(), out.data_ptr(), threads_for(weight.numel()),
    )  # fmt: skip
    return out


#: What :class:`TokenProduct` takes the grid of its input from: a calibrated one, the range of all, of each token.
GIVEN, OF_TENSOR, OF_TOKENS = range(3)

#: Bytes up to which codes and scales of the tokens lie on the stack, as in the source.
_MOST_ON_STACK = 48 * 1024


class _Prepared(Structure):
    """As in the source."""

    _fields_ = (
        *((name, c_int64) for name in ("columns", "rows")),
        *((name, c_void_p) for name in ("weight", "sums", "weight_scale")),
        ("weight_scales", c_int64),
        *((name, c_float) for name in ("quant_min", "quant_max", "divisor", "scale")),
        *((name, c_int32) for name in ("zero", "grid")),
    )


class TokenProduct:
    """What :func:`multiply_codes_native` makes of the codes of a few tokens, quantized in the same call.

    What does not change is looked up once: beside a weight that fills the cache, Python runs three times as long as it
    does alone. A layer of 4096 x 4096, one token, two cores: 0.49 ms with everything looked up in each call, 0.44 so.

    Args:
        weight: contiguous int8, ``[rows, columns]``; not to be changed, nor are the tensors below.
        sums: of its rows, int32.
        weight_scale: contiguous float32, one element or ``[rows]``.
        grid: ``GIVEN``, ``OF_TENSOR`` or ``OF_TOKENS``.
        quant_min: smallest code of the input; negative ones are those of symmetric grids, and are shifted by 128.
            For a given grid less the zero point.
        quant_max: largest code, likewise.
        divisor: what a symmetric range is divided by for its scale.
        scale: of a given grid.
        zero_point: of a given grid.
    """

    def __init__(
        self,
        weight: Tensor,
        sums: Tensor,
        weight_scale: Tensor,
        grid: int,
        quant_min: int,
        quant_max: int,
        *,
        divisor: float = 1.0,
        scale: float = 1.0,
        zero_point: int = 128,
    ) -> None:
        self.rows, self.columns = weight.shape
        self._elements = weight.numel()
        self._held = (weight, sums, weight_scale)
        self._prepared = _Prepared(
            self.columns, self.rows, *(tensor.data_ptr() for tensor in self._held), weight_scale.numel(),
            quant_min, quant_max, divisor, scale, zero_point, grid,
        )  # fmt: skip
        self._address = addressof(self._prepared)
        #: What results are made like, by the number of tokens.
        self._outputs: dict[int, Tensor] = {}

    def __call__(self, x: Tensor, tokens: int, bias: Tensor | None) -> Tensor | None:
        """Return float32 ``[tokens, rows]``, or None where there is no kernel.

        Args:
            x: contiguous float32, ``tokens * columns`` elements, not empty.
            tokens: how many.
            bias: contiguous float32, ``[rows]``, or None.
        """
        functions = _FAMILY.functions()
        if functions is None:
            return None
        like = self._outputs.get(tokens)
        if like is None:
            # Not torch.empty, whose memory is on the default device; and empty_like takes half the time of new_empty.
            like = self._outputs[tokens] = x.new_empty((tokens, self.rows))
        out, scratch = torch.empty_like(like), None
        if tokens * (self.columns + 4) > _MOST_ON_STACK:
            scratch = x.new_empty(tokens * (self.columns + 4) + 4, dtype=torch.uint8)
        functions.linear_of_tokens(
            x.data_ptr(), tokens, self._address, None if bias is None else bias.data_ptr(),
            None if scratch is None else scratch.data_ptr(), out.data_ptr(), threads_for(self._elements),
        )  # fmt: skip
        return out

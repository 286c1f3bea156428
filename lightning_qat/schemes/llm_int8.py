"""LLM.int8(): weights in int8 row by row, inputs in int8 token by token but for the columns that hold outliers.

``code = round(half(value) * (127 / absmax))`` and ``value = code * absmax / 127``, as bitsandbytes computes them. A
row is everything of one index of the channel dimension. Source: Dettmers et al. 2022.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_qat.ops.stochastic import round_stochastically
from lightning_qat.ops.vectorwise import (
    dequantize_vectorwise,
    fake_quantize_beside,
    fake_quantize_vectorwise,
    quantize_vectorwise,
)
from lightning_qat.ops.vectorwise_codes import (
    columns_above_quantile,
    round_to_half,
    vectorwise_codes_op,
    vectorwise_steps,
    whole_codes,
)
from lightning_qat.schemes.base import Scheme, _register
from lightning_qat.schemes.finite import check_finite
from lightning_qat.schemes.format import TensorFormat, rows_of, rows_to
from lightning_qat.schemes.quantized_tensor import Outliers, QuantizedTensor


@_register("llm_int8")
class LLMInt8Scheme(Scheme):
    """Vector-wise int8; the scale is the largest magnitude of a row, in float16 precision."""

    takes_inputs = True
    finds_ranges = True

    def parameters(self, low: Tensor, high: Tensor, fmt: TensorFormat) -> tuple[Tensor, Tensor]:
        absmax = round_to_half(torch.maximum(-low, high))
        return absmax, torch.zeros_like(absmax, dtype=torch.int32)

    def quantize(self, x: Tensor, scale: Tensor, zero_point: Tensor | None, fmt: TensorFormat) -> Tensor:
        return rows_to(vectorwise_codes_op(rows_of(x, fmt), scale.reshape(-1)), x, fmt)

    def quantize_stochastically(
        self,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        fmt: TensorFormat,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        return rows_to(_drawn_codes(rows_of(x, fmt), scale, generator), x, fmt)

    def dequantize(
        self, codes: Tensor, scale: Tensor, zero_point: Tensor | None, fmt: TensorFormat, dtype: torch.dtype
    ) -> Tensor:
        rows = rows_of(codes, fmt)
        return rows_to(dequantize_vectorwise(rows, scale.reshape(-1), dtype=dtype), codes, fmt)

    def fake_quantize(self, x: Tensor, scale: Tensor, zero_point: Tensor | None, fmt: TensorFormat) -> Tensor:
        if fmt.dynamic:  # a layer's input, which has no scale from outside
            return _fake_quantize_input(x, fmt.outlier_threshold)
        return super().fake_quantize(x, scale, zero_point, fmt)

    def quantize_with_outliers(
        self,
        tensor: Tensor,
        fmt: TensorFormat,
        threshold: float,
        *,
        stochastic: bool = False,
        generator: torch.Generator | None = None,
    ) -> QuantizedTensor:
        """Return ``tensor`` quantized but for the columns that stay in 16 bit.

        Args:
            tensor: any shape; a row is everything of one index of dimension 0.
            fmt: one scale for each row.
            threshold: up to 1 a quantile: columns whose largest magnitude lies above that of this share of all columns;
                above 1 a magnitude: columns with an element of that or more; 0 is none.
            stochastic: round stochastically.
            generator: of the random numbers.
        """
        if threshold > 0:  # an infinity would be kept as an outlier
            check_finite(tensor)
        rows = rows_of(tensor, fmt)
        columns = None
        if threshold > 1:
            codes, absmax, columns = quantize_vectorwise(rows, threshold)
        else:
            columns = columns_above_quantile(rows, threshold).nonzero().reshape(-1)
            codes, absmax, _ = quantize_vectorwise(rows.index_fill(1, columns, 0.0) if columns.numel() else rows)
        if stochastic:
            kept = rows if columns is None else rows.index_fill(1, columns, 0.0)
            codes = _drawn_codes(kept, absmax, generator)
        if not bool(torch.isfinite(absmax).all()):
            check_finite(tensor)
            raise ValueError(
                "tensor holds a magnitude above 65504, which float16 does not: LLM.int8() computes in it; scale the "
                "tensor, or use scheme='int8'"
            )
        outliers = None
        if columns is not None and columns.numel():
            kept = rows[:, columns]
            wide = tensor.dtype == torch.bfloat16 or bool((kept.abs() > torch.finfo(torch.float16).max).any())
            dtype = torch.bfloat16 if wide else torch.float16
            largest = torch.finfo(dtype).max  # rounding would make what is beyond it infinite
            outliers = Outliers(columns, kept.clamp(-largest, largest).to(dtype))
        codes = self.pack(rows_to(codes, tensor, fmt), fmt)
        scale = absmax.reshape(() if fmt.axis is None else -1)
        return QuantizedTensor(codes, {"": scale}, None, fmt, tensor.shape, tensor.dtype, outliers)


def _drawn_codes(rows: Tensor, absmax: Tensor, generator: torch.Generator | None) -> Tensor:
    return whole_codes(round_stochastically(vectorwise_steps(rows, absmax.reshape(-1)), generator))


def _fake_quantize_input(x: Tensor, threshold: float) -> Tensor:
    if threshold > 1 or not x.numel():
        return fake_quantize_vectorwise(x, threshold)
    kept = columns_above_quantile(x.detach().reshape(-1, x.shape[-1]), threshold)
    return fake_quantize_beside(x, kept)

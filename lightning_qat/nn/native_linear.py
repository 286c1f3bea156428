"""What a converted weight-only Linear computes with for few tokens on a CPU: the weight is read as it is stored.

Integers of up to eight bits and the codebooks of four. More tokens take the ways there were before, whose copies of the
weight are then made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from lightning_qat.nn.execution import IntegerKernel, state_reason, weight_values
from lightning_qat.nn.triton_linear import four_bit_groups
from lightning_qat.ops.float_linear import (
    FloatWeight,
    eight_bits_fit,
    float_linear,
    four_bits_fit,
    most_tokens,
    of_eight_bits,
    of_four_bits,
)
from lightning_qat.ops.int4_dequantize import int4_run
from lightning_qat.ops.vectorwise import PER_CODE
from lightning_qat.schemes import CodebookScheme, IntegerScheme, LLMInt8Scheme, get_scheme

if TYPE_CHECKING:
    from lightning_qat.nn.layer import QuantizedLayer


class FewTokens:
    """A kernel for few tokens, and for more what is made when it is first needed."""

    def __init__(self, weight: FloatWeight, most: int) -> None:
        self.most = most
        self._weight = weight
        self._more: list[IntegerKernel | None] = []

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return float_linear(x, self._weight, bias)

    def for_more(self, build: Callable[[], IntegerKernel | None]) -> IntegerKernel | None:
        """Return what ``build`` made, once."""
        if not self._more:
            self._more.append(build())
        return self._more[0]


def native_weight_only(layer: QuantizedLayer) -> str | None:
    """Return what a weight-only Linear, as it stands, has a kernel for: "int4", "nf4", "fp4", "int8"; None if none."""
    fmt, (rows, columns) = layer.weight_format, layer.weight_shape
    scheme = get_scheme(fmt.scheme)
    if layer.input_format is not None or state_reason(layer) is not None:
        return None
    if isinstance(scheme, CodebookScheme):
        return fmt.scheme if fmt.bits == 4 and _four_bits(layer) else None
    if type(scheme) is LLMInt8Scheme:
        return "int8" if eight_bits_fit(rows, columns, columns) else None
    if type(scheme) is not IntegerScheme or fmt.axis not in (None, 0) or fmt.bits > 8:
        return None
    if fmt.bits == 4 and _four_bits(layer):
        return "int4"
    whole = fmt.bits < 8 or fmt.symmetric  # code - zero point fits eight bits
    size = fmt.group_size or columns
    return "int8" if whole and eight_bits_fit(rows, columns, size) else None


def _four_bits(layer: QuantizedLayer) -> bool:
    fmt, (rows, columns) = layer.weight_format, layer.weight_shape
    size = fmt.block_size or int4_run(layer.weight_shape, fmt.axis, fmt.group_size) or 0
    if fmt.block_size is None:
        size = min(size, columns)  # one scale for the tensor is one for each row
    return size > 0 and four_bits_fit(rows, columns, size)


def native_kernel(layer: QuantizedLayer) -> FewTokens | None:
    """Return what computes a weight-only Linear, as it is now; None where there are no kernels for it."""
    word = native_weight_only(layer)
    if word is None:
        return None
    (rows, columns), dtype = layer.weight_shape, layer.weight_dtype
    if word != "int8":
        scale, zero, size, name = four_bit_groups(layer)
        held = (layer.weight_packed.reshape(-1), scale, zero)
        return FewTokens(of_four_bits(*held, rows, size, name), most_tokens(4, rows, columns, size, dtype))
    most = most_tokens(8, rows, columns, layer.weight_format.group_size or columns, dtype)
    if layer.weight_format.scheme == "llm_int8":
        return FewTokens(of_eight_bits(layer.codes, layer.held_scale() * PER_CODE), most)
    return FewTokens(of_eight_bits(weight_values(layer), layer.weight_scale), most)

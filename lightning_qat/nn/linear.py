"""Linear layers: fake-quantized while training, packed integers when converted."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_qat.config import PlanLike
from lightning_qat.nn.execution import IntegerKernel, static_input, takes_integers, weight_values
from lightning_qat.nn.layer import QATLayer, QuantizedLayer, register_layer
from lightning_qat.nn.region import RegionTensor, settled
from lightning_qat.nn.single import init_from
from lightning_qat.ops.digit_linear import digit_linear, digits_are_exact, digits_pay, pack_digits
from lightning_qat.ops.integer_conv import CodeGrid
from lightning_qat.ops.integer_linear import (
    integer_linear,
    integer_linear_per_tensor,
    integer_linear_per_token,
    linear_is_exact,
    multiply_codes,
    pack_linear,
)


class QATLinear(QATLayer, nn.Linear):
    """An ``nn.Linear`` with fake-quantized weight and input; it shares the parameters of the one it is made from.

    Args:
        linear: the float layer, ``[out_features, in_features]``.
        config: a config or a preset's name.
    """

    float_class = nn.Linear

    def __init__(self, linear: nn.Linear, config: PlanLike = "int8", quantize_activations: bool = True) -> None:
        init_from(self, linear, config, quantize_activations)

    def forward(self, input: Tensor) -> Tensor:
        return self.compute(input, lambda x, weight: F.linear(x, weight, self.bias))


class QuantizedLinear(QuantizedLayer, nn.Linear):
    """A converted ``nn.Linear``; on a CPU it computes with integers, weight-only too.

    The kernels read a copy of the codes in int8, made on the first forward pass; no float copy is kept.
    """

    float_class = nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        input = settled(input)
        kernel = self._kernel(input)
        if kernel is not None:
            return kernel(input, self.bias)
        return F.linear(self.quantized_input(input), self.weight, self.bias)

    def _integer_execution(self) -> str:
        if not linear_is_exact():
            return "reference: no exact integer kernel on this CPU"
        fmt = self.input_format
        if fmt is None:
            return self._weight_only_execution()
        if not fmt.dynamic:
            return "onednn int8"
        if fmt.dynamic_range == "tensor":
            return "onednn int8 per tensor, dynamic"
        return "onednn int8 per token" if fmt.symmetric else "reference: asymmetric ranges per token"

    def _weight_only_execution(self) -> str:
        if not digits_are_exact():
            return "reference: weight-only on a big-endian CPU"
        rows, columns = self.weight_shape
        pays = digits_pay(1, (rows, columns), self.weight_format.group_size)
        return "onednn int8, weight-only" if pays else "reference: weight-only, too small to gain"

    def _kernel(self, x: Tensor) -> IntegerKernel | None:
        """Return what computes the output of ``x`` from integers, or None for the reference."""
        if not takes_integers(self, x) or x.shape[-1] != self.weight_shape[1] or self.execution.startswith("reference"):
            return None
        if self.input_format is None and not self._takes_digits(x):
            return None
        return self.kernel_cache.get(self, (self.weight_format, self.input_format), self._build_kernel)

    def _takes_digits(self, x: Tensor) -> bool:
        """Return whether a float input goes to integers: where that is faster, and no NaN or infinity is in it."""
        tokens, (rows, columns) = x.numel() // x.shape[-1], self.weight_shape
        if not digits_pay(tokens, (rows, columns), self.weight_format.group_size):
            return False
        return math.isfinite(torch.linalg.vector_norm(x, math.inf, dtype=torch.float32).item())

    def _build_kernel(self) -> IntegerKernel:
        fmt = self.input_format
        if fmt is None:
            digits = pack_digits(weight_values(self), self.weight_scale, self.weight_format.group_size)
            return lambda x, bias: digit_linear(x, digits, bias)
        weight = pack_linear(weight_values(self), self.weight_scale)
        if fmt.dynamic and fmt.dynamic_range == "tensor":
            return lambda x, bias: integer_linear_per_tensor(x, fmt.bits, fmt.symmetric, weight, bias)
        if fmt.dynamic:
            return lambda x, bias: integer_linear_per_token(x, fmt.bits, weight, bias)
        scale, value, codes = static_input(self)
        grid = CodeGrid(value, codes)

        def kernel(x: Tensor, bias: Tensor | None) -> Tensor:
            straight = x.codes_on(grid) if type(x) is RegionTensor and len(x.seen_shape) == 2 else None
            if straight is None:
                return integer_linear(x, scale, codes, weight, bias, value)
            return multiply_codes(straight, value, codes.zero_point, weight, None if bias is None else bias.float())

        return kernel


register_layer(QATLinear, QuantizedLinear)

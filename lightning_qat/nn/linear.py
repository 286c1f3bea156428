"""Linear layers: fake-quantized while training, packed integers when converted."""

from __future__ import annotations

import math
import weakref
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_qat.config import PlanLike
from lightning_qat.native.linear_int8 import has_linear_int8
from lightning_qat.nn.execution import IntegerKernel, reference_reason, static_input, takes_integers, weight_values
from lightning_qat.nn.layer import QATLayer, QuantizedLayer, register_layer
from lightning_qat.nn.linear_step import linear_in_one_step
from lightning_qat.nn.native_linear import FewTokens, native_kernel, native_weight_only
from lightning_qat.nn.packed_weight import multiplied_by_weight
from lightning_qat.nn.region import RegionTensor, settled
from lightning_qat.nn.single import init_from
from lightning_qat.nn.triton_linear import linear_by_ops, takes_ops, takes_triton, triton_execution, triton_kernel
from lightning_qat.ops.bag_linear import BAG_TOKENS, bag_linear, bags_are_exact, bags_fit, pack_bags
from lightning_qat.ops.digit_linear import DigitWeight, digit_linear, digits_are_exact, digits_pay, pack_digits
from lightning_qat.ops.int4_linear import INT4_TOKENS, int4_fits, int4_is_exact, int4_linear, pack_int4
from lightning_qat.ops.integer_conv import CodeGrid
from lightning_qat.ops.integer_linear import (
    few_rows,
    integer_linear,
    integer_linear_per_tensor,
    integer_linear_per_token,
    linear_is_exact,
    multiply_codes,
    pack_linear,
)
from lightning_qat.ops.outlier_linear import outlier_linear, pack_with_outliers
from lightning_qat.ops.vectorwise import PER_CODE
from lightning_qat.schemes import Scheme, get_scheme

_BAGS = "fbgemm int4, weight-only"


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
        weight, of_weight = self._parameters.get("weight"), self.weight_quantizer
        if weight is not None:  # one that is computed is computed once
            x = of_weight.arranged(input)
            made = linear_in_one_step(x, weight, self.bias, self.input_quantizer, of_weight)
            if made is not None:
                return made
        return self.compute(input, lambda x, weight: F.linear(x, weight, self.bias))


class QuantizedLinear(QuantizedLayer, nn.Linear):
    """A converted ``nn.Linear``; on a CPU it computes with integers, or in float from packed weights.

    For few tokens the codes are read as they are stored; for more some kernels read a copy of them, in int8 or packed
    int4, made when it is first needed. No float copy is kept.
    """

    float_class = nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        # After a large weight has passed through the cache, each function that is called here costs microseconds.
        input = self.arranged_input(input if type(input) is Tensor else settled(input))
        kernel = self._on_gpu() if input.is_cuda and takes_triton(self, input) else self._kernel(input)
        if kernel is not None:
            bias = self._parameters.get("bias")
            bias = self.bias if bias is None else bias
            if bias is None or bias.shape == self.weight_shape[:1]:  # what is wrong with another, PyTorch says
                return kernel(input, bias)
        if takes_ops(self, input):
            return linear_by_ops(self, input, self.bias)
        input, fmt = self.on_grid(input), self.weight_format
        scheme = get_scheme(fmt.scheme)
        if type(scheme).linear is Scheme.linear or input.dtype != self.weight_dtype:
            return multiplied_by_weight(self, input, lambda weight: F.linear(input, weight, self.bias))
        held = (self.weight_packed, self.held_scale(), self.weight_zero_point, self.weight_shape, fmt)
        return scheme.linear(input, *held, self.bias)

    def _on_gpu(self) -> IntegerKernel | None:
        return self.kernel_cache.get(self, ("triton",), lambda: triton_kernel(self))

    @property
    def execution(self) -> str:
        on_gpu = triton_execution(self) if self.weight_packed.device.type == "cuda" else None
        if on_gpu is not None:
            return on_gpu
        word = native_weight_only(self)
        return super().execution if word is None else f"native {word}, weight-only"

    def _integer_execution(self) -> str:
        fmt = self.input_format
        if fmt is None and self._takes_packed_int4():
            return "packed int4, weight-only"
        own = fmt is not None and has_linear_int8()
        if not own and not linear_is_exact():
            return "reference: no exact integer kernel on this CPU"
        if fmt is None:
            return self._weight_only_execution()
        kernel = "native" if own else "onednn"
        if fmt.scheme == "llm_int8":
            return f"{kernel} int8 per token, outliers in float"
        if not fmt.dynamic:
            return f"{kernel} int8"
        if fmt.dynamic_range == "tensor":
            return f"{kernel} int8 per tensor, dynamic"
        return f"{kernel} int8 per token" if fmt.symmetric else "reference: asymmetric ranges per token"

    def _takes_packed_int4(self) -> bool:
        fmt, (rows, columns) = self.weight_format, self.weight_shape
        fits = self.input_format is None and self.weight_dtype == torch.bfloat16
        return fits and int4_fits(rows, columns, fmt.bits, fmt.group_size) and int4_is_exact()

    def _takes_bags(self) -> bool:
        fmt, (rows, columns) = self.weight_format, self.weight_shape
        return bags_fit(rows, columns, fmt.bits, fmt.group_size) and bags_are_exact()

    def _weight_only_execution(self) -> str:
        if not digits_are_exact():
            return "reference: weight-only on a big-endian CPU"
        rows, columns = self.weight_shape
        if self._takes_bags():
            return _BAGS
        pays = digits_pay(1, (rows, columns), self.weight_format.group_size)
        return "onednn int8, weight-only" if pays else "reference: weight-only, too small to gain"

    def _kernel(self, x: Tensor) -> IntegerKernel | None:
        """Return what computes the output of ``x`` from integers, or None for the reference."""
        if not takes_integers(self, x) or x.shape[-1] != self.weight_shape[1]:
            return None
        # Whatever says so in ``execution`` is known when the kernel is built; the input's own reasons are not.
        kernel: Any = self.kernel_cache.get(self, (has_linear_int8(),), self._build_kernel)
        if kernel is None:
            return None
        if self.input_format is not None and linear_is_exact():
            return kernel
        tokens = x.numel() // x.shape[-1]
        if self.input_format is not None:
            return kernel if tokens <= few_rows(self.weight_shape.numel()) else None
        if type(kernel) is not FewTokens:
            return kernel if self._takes_more(x, tokens) else None
        if tokens <= kernel.most:
            return kernel
        takes = reference_reason(self) is None and self._takes_more(x, tokens)
        return kernel.for_more(self._build_for_more) if takes else None

    def _takes_more(self, x: Tensor, tokens: int) -> bool:
        """Return whether the kernels that are not our own take a float input."""
        return tokens <= INT4_TOKENS if self._takes_packed_int4() else self._takes_digits(x)

    def _takes_digits(self, x: Tensor) -> bool:
        """Return whether a float input goes to integers: where that is faster, and no NaN or infinity is in it."""
        tokens, (rows, columns) = x.numel() // x.shape[-1], self.weight_shape
        if not digits_pay(tokens, (rows, columns), self.weight_format.group_size):
            return False
        return math.isfinite(torch.linalg.vector_norm(x, math.inf, dtype=torch.float32).item())

    def _build_kernel(self) -> IntegerKernel | None:
        native = native_kernel(self)
        if native is not None:
            return native
        return self._few_tokens() if self.execution == _BAGS else self._build_for_more()

    def _build_for_more(self) -> IntegerKernel | None:
        if super().execution.startswith("reference"):
            return None
        fmt = self.input_format
        if fmt is None and self._takes_packed_int4():
            size: Any = self.weight_format.group_size
            packed = pack_int4(self.codes, self.weight_scale, self.weight_zero_point, size)
            return lambda x, bias: int4_linear(x, packed, bias)
        if fmt is None:
            whole = self.weight_format.scheme == "llm_int8"
            values, steps = (
                (self.codes, self.held_scale() * PER_CODE) if whole else (weight_values(self), self.weight_scale)
            )
            digits = pack_digits(values, steps, self.weight_format.group_size)
            return lambda x, bias: digit_linear(x, digits, bias)
        if fmt.scheme == "llm_int8":
            parts = pack_with_outliers(self.codes, self.held_scale())
            return lambda x, bias: outlier_linear(x, fmt.outlier_threshold, parts, bias)
        weight = pack_linear(weight_values(self), self.weight_scale)
        if fmt.dynamic and fmt.dynamic_range == "tensor":
            return lambda x, bias: integer_linear_per_tensor(x, fmt.bits, fmt.symmetric, weight, bias)
        if fmt.dynamic:
            return lambda x, bias: integer_linear_per_token(x, fmt.bits, weight, bias)
        scale, value, codes = static_input(self)
        grid = CodeGrid(value, codes)

        def kernel(x: Any, bias: Tensor | None) -> Tensor:
            straight = x.codes_on(grid) if type(x) is RegionTensor and len(x.seen_shape) == 2 else None
            if straight is None:
                x = x.plain() if type(x) is RegionTensor else x
                return integer_linear(x, scale, codes, weight, bias, value)
            return multiply_codes(straight, value, codes.zero_point, weight, None if bias is None else bias.float())

        return kernel

    def _few_tokens(self) -> IntegerKernel:
        """Return what reads packed 4-bit weights for one or two tokens, and int8 copies, made when needed, for more."""
        bags, whose = pack_bags(self.codes, self.weight_scale, self.weight_zero_point), weakref.ref(self)

        @lru_cache(maxsize=1)
        def digits() -> DigitWeight:
            layer: Any = whose()  # whoever calls holds it; the kernel is built anew when its codes change
            return pack_digits(weight_values(layer), layer.weight_scale, layer.weight_format.group_size)

        def kernel(x: Tensor, bias: Tensor | None) -> Tensor:
            few = x.numel() <= BAG_TOKENS * x.shape[-1]
            return bag_linear(x, bags, bias) if few else digit_linear(x, digits(), bias)

        return kernel


register_layer(QATLinear, QuantizedLinear)

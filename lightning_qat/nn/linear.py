"""Linear layers: fake-quantized while training, packed integers when converted."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from lightning_qat.config import PlanLike
from lightning_qat.nn.execution import IntegerKernel, static_input, takes_integers, weight_values
from lightning_qat.nn.layer import QATLayer, QuantizedLayer, register_layer
from lightning_qat.nn.single import init_from
from lightning_qat.ops.integer_linear import integer_linear, integer_linear_per_token, linear_is_exact, pack_linear


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
    """A converted ``nn.Linear``; with 8-bit inputs it computes with integers on a CPU."""

    float_class = nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        kernel = self._kernel(input)
        if kernel is not None:
            return kernel(input, self.bias)
        return F.linear(self.quantized_input(input), self.weight, self.bias)

    def _integer_execution(self) -> str:
        if not linear_is_exact():
            return "reference: no exact integer kernel on this CPU"
        fmt: Any = self.input_format
        if not fmt.dynamic:
            return "onednn int8"
        return "onednn int8 per token" if fmt.symmetric else "reference: dynamic asymmetric inputs"

    def _kernel(self, x: Tensor) -> IntegerKernel | None:
        """Return what computes the output of ``x`` from integers, or None for the reference."""
        if not takes_integers(self, x) or x.shape[-1] != self.weight_shape[1] or self.execution.startswith("reference"):
            return None
        return self.kernel_cache.get(self, (self.weight_format, self.input_format), self._build_kernel)

    def _build_kernel(self) -> IntegerKernel:
        weight = pack_linear(weight_values(self), self.weight_scale)
        fmt: Any = self.input_format
        if fmt.dynamic:
            return lambda x, bias: integer_linear_per_token(x, fmt.bits, weight, bias)
        scale, value, codes = static_input(self)
        return lambda x, bias: integer_linear(x, scale, codes, weight, bias, value)


register_layer(QATLinear, QuantizedLinear)

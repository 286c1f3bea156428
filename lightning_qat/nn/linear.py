"""Linear layers: fake-quantized while training, packed integers when converted."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from lightning_qat.config import PlanLike
from lightning_qat.nn.layer import QATLayer, QuantizedLayer, register_layer
from lightning_qat.nn.single import init_from


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
    """A converted ``nn.Linear``."""

    float_class = nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(self.quantized_input(input), self.weight, self.bias)


register_layer(QATLinear, QuantizedLinear)

"""A fake-quantized weight, kept while the weight stands still: between optimizer steps and in evaluation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_qat.schemes import TensorFormat

if TYPE_CHECKING:
    from lightning_qat.quantizers.weight_quantizer import WeightQuantizer

#: Scale, zero point, format.
Parameters = tuple[Tensor, Tensor, TensorFormat]


class _Kept(torch.autograd.Function):
    """A value made earlier, with the gradient that making it now would have."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, value: Tensor, quantizer: WeightQuantizer, parameters: Parameters) -> Tensor:
        scale, zero_point, ctx.format = parameters
        ctx.scheme = quantizer.scheme
        ctx.save_for_backward(weight, scale, zero_point)
        return value.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale, zero_point = ctx.saved_tensors
        return ctx.scheme.fake_quantize_gradient(grad, weight, scale, zero_point, ctx.format), None, None, None


class KeptWeight:
    """Holds what one quantizer made of one parameter; never copied or pickled.

    It is made anew when the parameter is another one, was changed in place, or is to be quantized otherwise.
    Changes through ``parameter.data`` are not counted by PyTorch and not seen here: whoever lets weights be kept
    knows that nobody changes them meanwhile.
    """

    def __init__(self) -> None:
        self._key: tuple[Any, ...] | None = None
        self._source: Tensor | None = None  # held, so that no other tensor takes its address
        self._made: tuple[Tensor, Parameters] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> KeptWeight:
        return KeptWeight()

    def __reduce__(self) -> tuple[type[KeptWeight], tuple[()]]:
        return KeptWeight, ()

    def get(self, quantizer: WeightQuantizer, weight: Tensor) -> tuple[Tensor, Tensor, Parameters] | None:
        """Return the fake-quantized ``weight`` with its gradient, the same without, and the parameters.

        None where the weight stays in float, or is no parameter but computed anew each time.
        """
        if not isinstance(weight, nn.Parameter) or not quantizer.quantizing:
            return None
        moved = quantizer.scale._version if quantizer.frozen else None
        key = (weight.data_ptr(), weight._version, weight.shape, weight.stride(), quantizer.format, moved)
        if self._made is None or self._source is not weight or self._key != key:
            # Ordinary tensors, in inference mode too: the next forward may need gradients.
            with torch.inference_mode(False), torch.no_grad():
                scale, zero_point = quantizer.parameters_for(weight)
                if quantizer.frozen:  # the buffers may be written before a backward pass that needs them
                    scale, zero_point = scale.clone(), zero_point.clone()
                parameters = (scale, zero_point, quantizer.format)
                self._made = (quantizer.scheme.fake_quantize(weight, *parameters), parameters)
            self._key, self._source = key, weight
        value, parameters = self._made
        if torch.is_grad_enabled() and weight.requires_grad:
            return _Kept.apply(weight, value, quantizer, parameters), value, parameters
        return value.detach(), value, parameters

"""Convolutions: fake-quantized while training, packed integers when converted."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from lightning_qat.config import PlanLike
from lightning_qat.nn.conv_kernel import ConvKernel, conv_geometry
from lightning_qat.nn.execution import takes_integers
from lightning_qat.nn.layer import QATLayer, QuantizedLayer, register_layer
from lightning_qat.nn.packed_weight import multiplied_by_weight
from lightning_qat.nn.region import RegionTensor, inside_region, settled
from lightning_qat.nn.single import init_from
from lightning_qat.ops.integer_conv import conv_is_exact


class _QATConv(QATLayer):
    """Shared by the convolutions of one to three dimensions.

    Args:
        conv: the float layer, weight ``[out_channels, in_channels / groups, *kernel]``.
        config: a config or a preset's name.
        quantize_activations: quantize the input too, where the config says how.
    """

    def __init__(self, conv: nn.Module, config: PlanLike = "int8", quantize_activations: bool = True) -> None:
        init_from(self, conv, config, quantize_activations)

    def forward(self, input: Tensor) -> Tensor:
        return self.compute(input, lambda x, weight: self._conv_forward(x, weight, self.bias))  # type: ignore[operator]


class _QuantizedConv(QuantizedLayer):
    """With calibrated 8-bit inputs and up to two spatial dimensions it computes with integers on a CPU."""

    def forward(self, input: Tensor) -> Tensor:
        input = settled(input)
        kernel = self._kernel(input)
        if kernel is None:
            x, convolve = self.quantized_input(input), self._conv_forward
            return multiplied_by_weight(self, x, lambda weight: convolve(x, weight, self.bias))  # type: ignore[operator]
        bias: Any = self.bias
        if inside_region() and kernel.answers_region(input):
            return kernel.pending(input, bias, one_reader=self.feeds_one_layer)
        return kernel(input.plain() if type(input) is RegionTensor else input, bias)

    def _integer_execution(self) -> str:
        fmt: Any = self.input_format
        if self.spatial_dims == 3:
            return "reference: three spatial dimensions"
        if fmt.dynamic:
            covered = "sample" if fmt.dynamic_range == "token" else "call"
            return f"reference: ranges per {covered}"
        if type(self)._conv_forward is not self.float_class._conv_forward:  # type: ignore[attr-defined]
            return "reference: a convolution of its own"
        if not conv_geometry(self).has_exact_kernel(self.weight_shape):
            return "reference: groups of several channels"
        if not conv_is_exact():
            return "reference: no exact integer kernel on this CPU"
        return "onednn int8, codes out" if self.feeds_one_layer and self.spatial_dims == 2 else "onednn int8"

    def _kernel(self, x: Tensor) -> ConvKernel | None:
        """Return what computes the output of ``x`` from integers, or None for the reference."""
        # Whatever says so in ``execution`` is known when the kernel is built; shapes and states of a call are not.
        if not takes_integers(self, x):
            return None
        layer: Any = self
        settings = (layer.stride, layer.padding, layer.dilation, layer.groups, layer.padding_mode)
        kernel: Any = self.kernel_cache.get(self, settings, self._build_kernel)
        if kernel is None:
            return None
        shape = x.seen_shape if type(x) is RegionTensor else tuple(x.shape)
        return None if kernel.output_shape(shape) is None else kernel

    def _build_kernel(self) -> ConvKernel | None:
        return None if self.execution.startswith("reference") else ConvKernel(self)


class QATConv1d(_QATConv, nn.Conv1d):
    """An ``nn.Conv1d`` with fake-quantized weight and input."""

    float_class = nn.Conv1d
    spatial_dims = 1


class QATConv2d(_QATConv, nn.Conv2d):
    """An ``nn.Conv2d`` with fake-quantized weight and input."""

    float_class = nn.Conv2d
    spatial_dims = 2


class QATConv3d(_QATConv, nn.Conv3d):
    """An ``nn.Conv3d`` with fake-quantized weight and input."""

    float_class = nn.Conv3d
    spatial_dims = 3


class QuantizedConv1d(_QuantizedConv, nn.Conv1d):
    """A converted ``nn.Conv1d``."""

    float_class = nn.Conv1d
    spatial_dims = 1


class QuantizedConv2d(_QuantizedConv, nn.Conv2d):
    """A converted ``nn.Conv2d``."""

    float_class = nn.Conv2d
    spatial_dims = 2


class QuantizedConv3d(_QuantizedConv, nn.Conv3d):
    """A converted ``nn.Conv3d``."""

    float_class = nn.Conv3d
    spatial_dims = 3


def _transposed(layer: Any, x: Tensor, weight: Tensor, output_size: list[int] | None) -> Tensor:
    """What ``nn.ConvTranspose2d.forward`` does, with another weight."""
    padding = layer._output_padding(x, output_size, layer.stride, layer.padding, layer.kernel_size, 2, layer.dilation)
    return F.conv_transpose2d(x, weight, layer.bias, layer.stride, layer.padding, padding, layer.groups, layer.dilation)


class QATConvTranspose2d(QATLayer, nn.ConvTranspose2d):
    """An ``nn.ConvTranspose2d`` with fake-quantized weight and input.

    The weight is ``[in_channels, out_channels / groups, *kernel]``: a channel is an index of dimension
    1, shared by all groups.
    """

    float_class = nn.ConvTranspose2d
    channel_axis = 1
    spatial_dims = 2

    def __init__(self, conv: nn.ConvTranspose2d, config: PlanLike = "int8", quantize_activations: bool = True) -> None:
        init_from(self, conv, config, quantize_activations)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        return self.compute(input, lambda x, weight: _transposed(self, x, weight, output_size))


class QuantizedConvTranspose2d(QuantizedLayer, nn.ConvTranspose2d):
    """A converted ``nn.ConvTranspose2d``."""

    float_class = nn.ConvTranspose2d
    channel_axis = 1
    spatial_dims = 2

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        x = self.quantized_input(input)
        return multiplied_by_weight(self, x, lambda weight: _transposed(self, x, weight, output_size))


register_layer(QATConv1d, QuantizedConv1d)
register_layer(QATConv2d, QuantizedConv2d)
register_layer(QATConv3d, QuantizedConv3d)
register_layer(QATConvTranspose2d, QuantizedConvTranspose2d)

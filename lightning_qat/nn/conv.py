"""Convolutions: fake-quantized while training, packed integers when converted."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from lightning_qat.config import PlanLike
from lightning_qat.nn.execution import IntegerKernel, static_input, takes_integers, weight_values
from lightning_qat.nn.layer import QATLayer, QuantizedLayer, register_layer
from lightning_qat.nn.single import init_from
from lightning_qat.ops.integer_conv import ConvGeometry, conv_is_exact, integer_conv, pack_conv


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
        kernel = self._kernel(input)
        if kernel is not None:
            return kernel(input, self.bias)  # type: ignore[arg-type]
        return self._conv_forward(self.quantized_input(input), self.weight, self.bias)  # type: ignore[operator]

    def _integer_execution(self) -> str:
        fmt: Any = self.input_format
        if self.spatial_dims == 3:
            return "reference: three spatial dimensions"
        if fmt.dynamic:
            return "reference: ranges per sample"
        if type(self)._conv_forward is not self.float_class._conv_forward:  # type: ignore[attr-defined]
            return "reference: a convolution of its own"
        if not self._geometry().has_exact_kernel(self.weight_shape):
            return "reference: groups of several channels"
        return "onednn int8" if conv_is_exact() else "reference: no exact integer kernel on this CPU"

    def _kernel(self, x: Tensor) -> IntegerKernel | None:
        """Return what computes the output of ``x`` from integers, or None for the reference."""
        if not takes_integers(self, x) or not self._fits(x) or self.execution.startswith("reference"):
            return None
        layer: Any = self
        settings = (layer.stride, layer.padding, layer.dilation, layer.groups, layer.padding_mode)
        return self.kernel_cache.get(self, (self.weight_format, self.input_format, *settings), self._build_kernel)

    def _fits(self, x: Tensor) -> bool:
        """Return whether the kernel takes the shape of ``x``; what is wrong with one, the reference says."""
        layer: Any = self
        dims = len(layer.kernel_size)
        if x.dim() not in (dims + 1, dims + 2) or x.shape[-dims - 1] != layer.in_channels:
            return False
        pads = layer._reversed_padding_repeated_twice[::-1]
        size = [n + pads[2 * i] + pads[2 * i + 1] for i, n in enumerate(x.shape[-dims:])]
        reach = ((k - 1) * d + 1 for k, d in zip(layer.kernel_size, layer.dilation, strict=True))
        return all(n >= r for n, r in zip(size, reach, strict=True)) and self._geometry().is_exact_for(size)

    def _geometry(self, padding: tuple[int, ...] = ()) -> ConvGeometry:
        layer: Any = self
        return ConvGeometry(tuple(layer.kernel_size), tuple(layer.stride), padding, tuple(layer.dilation), layer.groups)

    def _build_kernel(self) -> IntegerKernel:
        layer: Any = self
        dims, mode = len(layer.kernel_size), layer.padding_mode
        pads = layer._reversed_padding_repeated_twice
        # Last dimension first, before and after. What the kernel cannot pad is padded before it, in float: the
        # codes of copied values, and of 0.0, are the same either way.
        simple = mode == "zeros" and pads[::2] == pads[1::2]
        padding = tuple(pads[::2][::-1]) if simple else (0,) * dims
        geometry = self._geometry(padding)
        scale, value, codes = static_input(self)
        weight = pack_conv(weight_values(self), self.weight_scale, geometry, value, codes)
        pad_mode = "constant" if mode == "zeros" else mode

        def kernel(x: Tensor, bias: Tensor | None) -> Tensor:
            batch = x if x.dim() == dims + 2 else x.unsqueeze(0)
            if not simple:
                batch = F.pad(batch, pads, mode=pad_mode)
            result = integer_conv(batch, scale, codes, weight, bias, value, geometry)
            return result if x.dim() == dims + 2 else result.squeeze(0)

        return kernel


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
        return _transposed(self, self.quantized_input(input), self.weight, output_size)


register_layer(QATConv1d, QuantizedConv1d)
register_layer(QATConv2d, QuantizedConv2d)
register_layer(QATConv3d, QuantizedConv3d)
register_layer(QATConvTranspose2d, QuantizedConvTranspose2d)

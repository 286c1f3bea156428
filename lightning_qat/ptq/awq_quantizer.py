"""AWQ of single tensors."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from lightning_qat.config import QuantizationConfig
from lightning_qat.ptq.awq import AWQOptions, AWQScales, search_scales
from lightning_qat.ptq.column_grid import check_target
from lightning_qat.ptq.scale_search import search_scales as search_ranges
from lightning_qat.quantizers.quantizer import tensor_config
from lightning_qat.schemes import get_scheme, weight_format
from lightning_qat.schemes.finite import check_finite
from lightning_qat.schemes.quantized_tensor import QuantizedTensor


class AWQQuantizer:
    """Quantizes weights after multiplying their columns by what their inputs call for (Lin et al. 2023, AWQ).

    With magnitudes alone inputs are taken to be uncorrelated. Calibrated models, whose Gram matrices are known and
    whose scales are folded into the layers before, are made by ``quantize_model(model, config, calibration, "awq")``.

    Args:
        config: a :class:`QuantizationConfig` or a scheme's name: ``"awq"`` (4 bits unless said otherwise), other
            integers of 2 to 8 bits, or ``"nf4"`` and ``"fp4"``.
        options: how scales are searched; None is ``AWQOptions()``.

    Raises:
        TypeError: if the config or the options are another thing.
        ValueError: if the config names no grid that codes can be chosen for.

    Example:
        >>> quantizer = AWQQuantizer(QuantizationConfig("awq", group_size=64))
        >>> quantizer.set_activation_scales(torch.rand(128) + 0.1)
        >>> quantizer.quantize(torch.randn(32, 128)).dequantize().shape
        torch.Size([32, 128])
    """

    def __init__(self, config: QuantizationConfig | str = "awq", options: AWQOptions | None = None) -> None:
        config = tensor_config(config)
        if options is not None and not isinstance(options, AWQOptions):
            raise TypeError(f"options={options!r} is not allowed; use AWQOptions or None")
        if config.dynamic:
            raise ValueError("scheme='dynamic' describes activations; use scheme='awq'")
        if (config.observer or "min_max") != "min_max":
            raise ValueError(f"observer={config.observer!r} is not allowed: AWQ searches for ranges; use 'min_max'")
        if config.bnb is not None and (config.bnb.stochastic or config.bnb.nested_quantization):
            raise ValueError("bnb.stochastic and bnb.nested_quantization are not allowed with AWQ; leave them False")
        self.config, self.options = config, options or AWQOptions()
        check_target(weight_format(config, torch.Size((1, config.group_size or 1))))
        self._magnitude: Tensor | None = None
        #: What was found for the last weight.
        self.last: AWQScales | None = None

    def set_activation_scales(self, scales: Tensor) -> AWQQuantizer:
        """Tell how large the inputs are.

        Args:
            scales: mean ``|x|`` of each input channel, ``[in_features]``; of a convolution ``[in_channels / groups]``,
                or one for each element of a kernel.

        Returns:
            The quantizer itself.

        Raises:
            TypeError: if it is no floating-point tensor.
            ValueError: if it is no vector, or holds a number that is negative or not finite.
        """
        if not isinstance(scales, Tensor) or not scales.is_floating_point():
            raise TypeError(f"scales={scales!r} are not allowed; use a floating-point torch.Tensor")
        if scales.dim() != 1 or not scales.numel():
            raise ValueError(f"scales have shape {tuple(scales.shape)}; use one for each input channel, [in_features]")
        check_finite(scales)
        if bool((scales < 0).any()):
            raise ValueError("scales hold negative numbers; give the mean magnitude of each input, x.abs().mean(0)")
        self._magnitude = scales.detach().float()
        return self

    @torch.no_grad()
    def quantize(self, weight: Tensor) -> QuantizedTensor:
        """Return ``weight`` quantized; dequantizing it gives an approximation of ``weight`` itself.

        The result has an ``input_scale`` that it divides by, which an engine may rather take out of the inputs.

        Args:
            weight: floating point ``[out_features, ...]``.

        Raises:
            RuntimeError: if :meth:`set_activation_scales` was not called.
            TypeError: if ``weight`` is no floating-point tensor.
            ValueError: if a shape does not fit, or ``weight`` holds NaN or inf.
        """
        if self._magnitude is None:
            raise RuntimeError(
                "AWQ has to know how large inputs are; call set_activation_scales(x.abs().mean(0)) first, "
                "or use Quantizer, which does not look at them"
            )
        _check_weight(weight)
        weight = weight.detach()
        magnitude, tied = self._of_row(weight)
        fmt, matrix = weight_format(self.config, weight.shape), weight.reshape(len(weight), -1).float()
        power = magnitude.square()
        found = self.last = search_scales([matrix], power, magnitude, [fmt], self.options, tied)
        scheme, scaled = get_scheme(fmt.scheme), matrix * found.scales
        scale, zero_point = scheme.parameters_of(scaled, fmt)
        if self.options.clip:
            left = power / found.scales.square()
            clipped = search_ranges(scaled, fmt, left)
            losses = [
                float((scheme.fake_quantize(scaled, *grid, fmt) - scaled).square().mul_(left).sum(dtype=torch.float64))
                for grid in ((scale, zero_point), clipped)
            ]
            if losses[1] < losses[0]:
                scale, zero_point = clipped
                self.last = replace(found, loss=losses[1])
        packed = scheme.quantize_packed(scaled.reshape(weight.shape), scale, zero_point, fmt)
        stored = scheme.store_scale(scale, fmt)
        kept = None if fmt.symmetric else zero_point
        return QuantizedTensor(
            packed, stored, kept, fmt, weight.shape, weight.dtype, input_scale=found.scales.contiguous()
        )  # fmt: skip

    def _of_row(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the magnitude of each element of a row, and which of them belong to one channel."""
        magnitude: Any = self._magnitude
        magnitude = magnitude.to(weight.device)
        size, area = prod(weight.shape[1:]), prod(weight.shape[2:])
        if len(magnitude) == weight.shape[1]:
            channel = torch.arange(len(magnitude), device=weight.device).repeat_interleave(area)
            return magnitude.repeat_interleave(area), channel if area > 1 else None
        if len(magnitude) == size:
            return magnitude, None
        allowed = f"{weight.shape[1]}" + (f" or {size}" if area > 1 else "")
        raise ValueError(
            f"set_activation_scales got {len(magnitude)} scales and weight has shape {tuple(weight.shape)}; "
            f"give {allowed} of them"
        )


def _check_weight(weight: Any) -> None:
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        what = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"weight is {what}; use a floating-point torch.Tensor")
    if weight.dim() < 2 or not weight.numel():
        raise ValueError(f"weight has shape {tuple(weight.shape)}; use [out_features, ...] with at least one element")
    check_finite(weight)

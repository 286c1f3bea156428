"""Quantizing single tensors."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_qat.config import QuantizationConfig, QuantizationScheme
from lightning_qat.ops.affine import finite_scale
from lightning_qat.quantizers.dynamic_range import dynamic_parameters
from lightning_qat.quantizers.observers import Observer, make_observer
from lightning_qat.schemes import (
    TensorFormat,
    get_scheme,
    input_format,
    rows_of,
    scale_shape,
    weight_format,
)
from lightning_qat.schemes.finite import check_finite
from lightning_qat.schemes.integer import IntegerScheme
from lightning_qat.schemes.quantized_tensor import QuantizedTensor


def tensor_config(config: Any) -> QuantizationConfig:
    """Return ``config``, or the one that a scheme's name stands for; raise ``TypeError`` for anything else."""
    if isinstance(config, str):
        return QuantizationConfig(config)
    if not isinstance(config, QuantizationConfig):
        raise TypeError(f"config={config!r} is not allowed; use a QuantizationConfig or a scheme's name")
    return config


class Quantizer:
    """Quantizes tensors as a config says, with ranges of their own or of samples seen before.

    Args:
        config: a :class:`QuantizationConfig` or a scheme's name.

    Example:
        >>> quantizer = Quantizer(QuantizationConfig("int8")).calibrate(torch.randn(100, 16))
        >>> quantizer.quantize(torch.randn(4, 16)).codes.dtype
        torch.int8
    """

    def __init__(self, config: QuantizationConfig | str = "int8") -> None:
        self.config = config = tensor_config(config)
        self.scheme: Any = get_scheme(config.scheme)
        self._observer: Observer | None = None
        self._samples = 0
        #: Shape of the scales that were calibrated.
        self._shape: tuple[int, ...] | None = None

    @torch.no_grad()
    def calibrate(self, samples: Tensor | Iterable[Tensor]) -> Quantizer:
        """Learn the range from samples, as the config's observer does (that of their extremes if it names none).

        Args:
            samples: tensors, each a sample. One tensor alone holds a sample at each index of dimension 0, but for
                scales that belong to channels, groups or blocks, where it is one sample. At most
                ``config.calibration_samples`` are looked at, calls before this one counted.

        Returns:
            The quantizer itself.

        Raises:
            TypeError: if a sample is no floating-point tensor.
            ValueError: if there is no sample, one holds NaN or inf, shapes part where scales belong to channels, groups
                or blocks, or the scheme finds its ranges at run time.
        """
        if self.config.dynamic:
            raise ValueError("scheme='dynamic' finds its ranges at run time; leave calibrate out, or use scheme='int8'")
        left = None if self.config.calibration_samples is None else self.config.calibration_samples - self._samples
        if isinstance(samples, Tensor) and samples.dim() and self._is_per_tensor:
            whole = (self.config.observer or "min_max") == "min_max"  # in any order, so all at once
            samples = samples[:left] if left is not None else samples
            self._samples += samples.shape[0]
            for sample in [samples] if whole else samples:
                self._observe(sample)
        else:
            for sample in itertools.islice([samples] if isinstance(samples, Tensor) else samples, left):
                self._observe(sample)
                self._samples += 1
        if self._observer is None:
            raise ValueError("samples holds no value, so there is no range to learn; give at least one sample")
        return self

    @property
    def _is_per_tensor(self) -> bool:
        grouped = self.config.per_channel or self.config.group_size is not None or self.scheme.block_size is not None
        return not grouped and self.config.scheme != QuantizationScheme.LLM_INT8

    def _observe(self, sample: Tensor) -> None:
        _check_floating(sample, "a sample")
        if not sample.numel():
            return
        check_finite(sample)
        fmt = weight_format(self.config, sample.shape)
        shape = scale_shape(sample.shape, fmt)
        if self._observer is None:
            self._shape = shape
            name = self.config.observer or "min_max"
            count = rows_of(sample, fmt).shape[0]
            self._observer = make_observer(
                name, momentum=self.config.observer_momentum, num_channels=count if shape else None
            ).to(sample.device)
        if shape != self._shape:
            raise ValueError(
                f"a sample of shape {tuple(sample.shape)} has scales of shape {shape}, one before it {self._shape}; "
                "samples have to agree, or use a per-tensor config"
            )
        self._observer.update(rows_of(sample, fmt) if shape else sample)

    @torch.no_grad()
    def quantize(self, tensor: Tensor, *, generator: torch.Generator | None = None) -> QuantizedTensor:
        """Return ``tensor`` quantized, with the calibrated range or, without calibration, its own.

        Args:
            tensor: floating point, any shape and strides.
            generator: of the random numbers where ``config.bnb.stochastic``; None is PyTorch's own.

        Raises:
            TypeError: if it is no floating-point tensor.
            ValueError: if it holds NaN or inf (the first position is named), or does not fit the config.
        """
        _check_floating(tensor, "tensor")
        tensor = tensor.detach()
        bnb, scheme = self.config.bnb, self.scheme
        stochastic = bnb is not None and bnb.stochastic
        if generator is not None and not stochastic:
            raise ValueError("generator is given and nothing is random; use bnb=BitsAndBytesConfig(stochastic=True)")
        if self.config.scheme == QuantizationScheme.LLM_INT8 and self._observer is None:
            fmt = weight_format(self.config, tensor.shape)
            threshold = 0.0 if bnb is None else float(bnb.outlier_threshold)
            return scheme.quantize_with_outliers(tensor, fmt, threshold, stochastic=stochastic, generator=generator)
        by_blocks = scheme.block_size is not None and self._observer is None
        if not by_blocks:
            check_finite(tensor)
        found = self._by_own_range(tensor) if by_blocks and not stochastic else None
        packed, (scale, zero_point, fmt) = (None, self._parameters(tensor)) if found is None else found
        if not by_blocks:
            scale = self._within(scale, zero_point, tensor.dtype, fmt)
        # Largest magnitudes show what is not finite without a pass of its own; infinity is cut to the largest float32.
        if by_blocks and not bool((scale < torch.finfo(torch.float32).max).all()):
            check_finite(tensor)
        if stochastic:
            codes = scheme.quantize_stochastically(tensor, scale, zero_point, fmt, generator)
            packed = scheme.pack(codes.contiguous(), fmt)
        elif packed is None:
            packed = scheme.quantize_packed(tensor, scale, zero_point, fmt)
        # Asymmetric integers alone have a zero point to keep.
        kept = None if fmt.symmetric else zero_point
        stored = scheme.store_scale(scale, fmt)
        if fmt.nested and not bool(torch.isfinite(scheme.read_scale(stored, fmt)).all()):
            raise ValueError(
                "tensor has blocks whose magnitudes are too large to be nested: their sum is beyond float32; use "
                "nested_quantization=False"
            )
        return QuantizedTensor(packed, stored, kept, fmt, tensor.shape, tensor.dtype)

    def _within(self, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype, fmt: TensorFormat) -> Tensor:
        """Return ``scale``, where no code stands for infinity."""
        most = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
        if bool((scale <= most / 2**fmt.bits).all()):
            return scale
        if not bool(torch.isfinite(scale).all()):
            raise ValueError(f"tensor, or the samples, hold magnitudes beyond {fmt.scheme}; scale it, or use 'int8'")
        if not isinstance(self.scheme, IntegerScheme):
            return scale
        return finite_scale(scale, zero_point, dtype, bits=fmt.bits, symmetric=fmt.symmetric)

    def _by_own_range(self, tensor: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor | None, TensorFormat]] | None:
        """Return packed codes with what :meth:`_parameters` returns, where a scheme finds both at once."""
        if (self.config.observer or "min_max") != "min_max":
            return None
        fmt = weight_format(self.config, tensor.shape)
        found = self.scheme.quantize_by_own_range(tensor, fmt)
        return None if found is None else (found[0], (found[1].reshape(scale_shape(tensor.shape, fmt)), None, fmt))

    def _parameters(self, tensor: Tensor) -> tuple[Tensor, Tensor | None, TensorFormat]:
        if self.config.dynamic:
            return self._dynamic_parameters(tensor)
        fmt = weight_format(self.config, tensor.shape)
        shape = scale_shape(tensor.shape, fmt)
        observer = self._observer
        if observer is None and (self.config.observer or "min_max") != "min_max" and tensor.numel():
            observer = make_observer(str(self.config.observer), num_channels=rows_of(tensor, fmt).shape[0])
            observer.to(tensor.device).update(rows_of(tensor, fmt))
        elif observer is not None and shape != self._shape:
            raise ValueError(
                f"tensor of shape {tuple(tensor.shape)} has scales of shape {shape} and the samples had {self._shape}; "
                "calibrate with samples of its shape, or use a per-tensor config"
            )
        if observer is None:
            return *self.scheme.parameters_of(tensor, fmt), fmt
        if self.scheme.searches_ranges:
            observer = observer.to(tensor.device)
            scale, zero = observer.get_quantization_params(fmt.symmetric, fmt.bits)
            return scale.reshape(shape), zero.reshape(shape), fmt
        low, high = (bound.to(tensor.device).reshape(shape) for bound in (observer.min_val, observer.max_val))
        return *self.scheme.parameters_of_range(low, high, fmt), fmt

    def _dynamic_parameters(self, tensor: Tensor) -> tuple[Tensor, Tensor | None, TensorFormat]:
        fmt = input_format(self.config)
        if tensor.numel() and tensor.dim():
            return dynamic_parameters(tensor, fmt, None)
        shape = (*tensor.shape[:-1], 1) if tensor.dim() and fmt.dynamic_range == "token" else ()
        low = high = tensor.new_zeros(shape, dtype=torch.float32)
        if tensor.numel():  # without dimensions: a tensor of one token
            low = high = tensor.float()
        return *self.scheme.parameters(low, high, fmt), replace(fmt, dynamic_range="tensor") if not shape else fmt


def _check_floating(tensor: Any, what: str) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{what} is a {type(tensor).__name__}; use a floating-point torch.Tensor")
    if not tensor.is_floating_point():
        raise TypeError(f"{what} has dtype {tensor.dtype}; use a floating-point dtype, as by tensor.float()")


def quantize(
    tensor: Tensor, config: QuantizationConfig | str = "int8", *, generator: torch.Generator | None = None
) -> QuantizedTensor:
    """Return ``tensor`` quantized with the range that it has; see :meth:`Quantizer.quantize`.

    Args:
        tensor: floating point, any shape and strides.
        config: a :class:`QuantizationConfig` or a scheme's name.
        generator: of the random numbers where ``config.bnb.stochastic``.
    """
    return Quantizer(config).quantize(tensor, generator=generator)

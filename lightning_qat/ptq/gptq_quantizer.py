"""GPTQ of single tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_qat.config import QuantizationConfig
from lightning_qat.ptq.chosen import ChosenCodes
from lightning_qat.ptq.column_grid import check_target
from lightning_qat.ptq.gptq import GPTQOptions, check_gram, choose_ordered
from lightning_qat.quantizers.quantizer import quantize, tensor_config
from lightning_qat.schemes import get_scheme, weight_format
from lightning_qat.schemes.quantized_tensor import QuantizedTensor


class GPTQQuantizer:
    """Quantizes weights so that the outputs of their layers are off by little.

    Args:
        config: a :class:`QuantizationConfig` or a scheme's name: ``"gptq"`` (4 bits unless said otherwise), other
            integers of 2 to 8 bits, ``"nf4"``, ``"fp4"`` or ``"dynamic_tree"``. With an ``observer`` its range is the
            grid; otherwise ``options`` say how scales are found.
        options: how codes are chosen; None is ``GPTQOptions()``, and ``GPTQOptions.published()`` the paper's algorithm.

    Raises:
        TypeError: if the config is another thing.
        ValueError: if the config names no grid that codes can be chosen for.

    Example:
        >>> quantizer = GPTQQuantizer(QuantizationConfig("gptq", group_size=64))
        >>> inputs = torch.randn(1000, 128)
        >>> quantized = quantizer.quantize(torch.randn(32, 128), inputs.t() @ inputs)
        >>> quantized.dequantize().shape
        torch.Size([32, 128])
    """

    def __init__(self, config: QuantizationConfig | str = "gptq", options: GPTQOptions | None = None) -> None:
        config = tensor_config(config)
        if options is not None and not isinstance(options, GPTQOptions):
            raise TypeError(f"options={options!r} is not allowed; use GPTQOptions or None")
        if config.dynamic:
            raise ValueError("scheme='dynamic' describes activations; use scheme='gptq'")
        if config.bnb is not None and config.bnb.stochastic:
            raise ValueError("bnb.stochastic=True is not allowed: GPTQ chooses every code; use stochastic=False")
        self.config, self.options = config, options or GPTQOptions()
        # Neither the bits nor the scheme depend on the shape of a weight.
        check_target(weight_format(config, torch.Size((1, config.group_size or 1))))
        #: What the last weight's codes lose, and notes of what was done.
        self.last: ChosenCodes | None = None

    @torch.no_grad()
    def quantize(self, weight: Tensor, hessian: Tensor | None = None) -> QuantizedTensor:
        """Return ``weight`` quantized; :attr:`last` then has the loss.

        Args:
            weight: floating point ``[out_features, ...]``; of a convolution a row is ``weight[out].flatten()``.
            hessian: ``[in_features, in_features]``: any positive multiple of the sum of ``x x^T`` over the inputs that
                a row is multiplied by. None is the identity, with which every code is the nearest one.

        Raises:
            TypeError: if ``weight`` is no floating-point tensor.
            ValueError: if a shape does not fit, or ``weight`` holds NaN or inf.
        """
        _check_weight(weight)
        weight = weight.detach()
        matrix = weight.reshape(len(weight), -1)
        if hessian is None:
            hessian = torch.eye(matrix.shape[1], device=weight.device)
        check_gram(hessian, matrix.shape[1])
        fmt, given = weight_format(self.config, weight.shape), {}
        if (self.config.observer or "min_max") != "min_max":
            observed = quantize(matrix, self.config)
            given = {"scale": observed.scale, "zero_point": observed.zero_point}
        chosen = self.last = choose_ordered(matrix, hessian.to(weight.device), fmt, self.options, **given)
        scheme: Any = get_scheme(fmt.scheme)
        packed = scheme.pack(chosen.codes.reshape(weight.shape), fmt)
        stored = scheme.store_scale(chosen.scale, fmt)
        return QuantizedTensor(packed, stored, chosen.zero_point, fmt, weight.shape, weight.dtype, order=chosen.order)


def _check_weight(weight: Any) -> None:
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        what = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"weight is {what}; use a floating-point torch.Tensor")
    if weight.dim() < 2 or not weight.numel():
        raise ValueError(f"weight has shape {tuple(weight.shape)}; use [out_features, ...] with at least one element")

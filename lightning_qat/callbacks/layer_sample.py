"""What fake quantization does to the weights and inputs of a model's layers, measured on one training step."""

from __future__ import annotations

import contextlib
import functools
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_qat.nn import QATLayer
from lightning_qat.ops.fake_quantize import quant_range
from lightning_qat.quantizers.fake_quantizer import ActivationQuantizer, dynamic_parameters
from lightning_qat.schemes import IntegerScheme, TensorFormat, get_scheme

#: Of an input so many numbers are looked at, evenly spread: what is measured are shares and ratios.
_MOST_NUMBERS = 2**16
#: Measured of a tensor, in this order.
MEASURED = ("clip_rate", "zero_fraction", "sqnr_db", "scale")


@dataclass
class _Kept:
    """Numbers of an input, and what they are quantized with."""

    values: Tensor
    scale: Tensor
    zero_point: Tensor
    fmt: TensorFormat


class LayerSample:
    """Takes some numbers of every layer's input in the forward passes that run between :meth:`start` and :meth:`stop`.

    Hooks are there in between only. Nothing is read back from the device before :meth:`measure`.

    Args:
        layers: name -> prepared layer.
    """

    def __init__(self, layers: dict[str, QATLayer]) -> None:
        self.layers = layers
        self.inputs: dict[str, _Kept] = {}
        #: Seconds that it took so far.
        self.seconds = 0.0
        self._handles: list[Any] = []

    def start(self) -> None:
        """Begin to look at inputs."""
        for name, layer in self.layers.items():
            if layer.input_quantizer is not None:
                # After the layer, when an observing quantizer has the range that this input was quantized with.
                hook = functools.partial(self._seen, name)
                self._handles.append(layer.register_forward_hook(hook, with_kwargs=True))

    def stop(self) -> None:
        """Look no more; a second call does nothing."""
        while self._handles:
            self._handles.pop().remove()

    @torch.no_grad()
    def _seen(self, name: str, layer: nn.Module, args: Any, kwargs: Any, _: Any) -> None:
        if name in self.inputs:  # the first use of a layer; activation checkpointing repeats forwards
            return
        started = time.perf_counter()
        leaves = (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        x = next((leaf for leaf in leaves if leaf.is_floating_point()), None)
        quantizer: Any = layer.input_quantizer
        whole: Any = layer.weight_quantizer
        if x is not None and x.numel() and quantizer.calibrated:
            self.inputs[name] = _some_of(quantizer, whole.arranged(x.detach()))
        self.seconds += time.perf_counter() - started

    @torch.no_grad()
    def measure(self) -> dict[str, dict[str, float | None]]:
        """Return layer -> ``weight_...`` and ``input_...`` of each of ``MEASURED``; None where it was not seen."""
        found: list[tuple[str, str]] = []
        numbers: list[Tensor] = []
        for name, layer in self.layers.items():
            quantizer, weight = layer.weight_quantizer, layer.weight.detach()
            kept = _Kept(weight, *quantizer.parameters_for(weight), quantizer.format)
            for kind, tensor in (("weight", kept), ("input", self.inputs.get(name))):
                if tensor is not None and tensor.values.numel():
                    found.append((name, kind))
                    numbers.append(_measured(tensor))
        self.inputs.clear()
        rows = torch.stack([n.to(numbers[0].device) for n in numbers]).tolist() if numbers else []
        columns = [f"{kind}_{what}" for kind in ("weight", "input") for what in MEASURED]
        table: dict[str, dict[str, float | None]] = {name: dict.fromkeys(columns) for name in self.layers}
        for (name, kind), row in zip(found, rows, strict=True):
            for what, value in zip(MEASURED, row, strict=True):
                table[name][f"{kind}_{what}"] = value
        return table


def _some_of(quantizer: ActivationQuantizer, x: Tensor) -> _Kept:
    """Return copies: the input and the quantizer's buffers may be written again."""
    scale, zero_point, fmt = quantizer.scale, quantizer.zero_point, quantizer.format
    if fmt.dynamic:
        if fmt.dynamic_range != "tensor":  # rows that have their range for themselves
            sample = quantizer.spatial_dims is not None
            rows = (x if x.dim() == (quantizer.spatial_dims or 0) + 2 else x[None]) if sample else x.flatten(0, -2)
            x = _every(rows, max(_MOST_NUMBERS * rows.shape[0] // rows.numel(), 1))
        scale, zero_point, fmt = dynamic_parameters(x, fmt, quantizer.spatial_dims)
        if fmt.dynamic_range != "tensor":
            return _Kept(x.clone(), scale, zero_point, fmt)
    return _Kept(_every(x.flatten(), _MOST_NUMBERS).clone(), scale.clone(), zero_point.clone(), fmt)


def _every(x: Tensor, most: int) -> Tensor:
    """Return at most ``most`` of the entries of ``x`` along dimension 0, evenly spread."""
    return x[:: -(-x.shape[0] // most)]


def _measured(kept: _Kept) -> Tensor:
    """Return the numbers of ``MEASURED``, float32 on the tensor's device."""
    fmt, scheme, x = kept.fmt, get_scheme(kept.fmt.scheme), kept.values
    given = (kept.scale, kept.zero_point, fmt)
    wide, codes = x.float(), None
    if isinstance(scheme, IntegerScheme):
        codes = scheme.quantize(x, *given)
        values = scheme.dequantize(codes, *given, torch.float32)
    else:
        values = scheme.fake_quantize(x, *given).float()
    noise, signal = (wide - values).square().sum(), wide.square().sum()
    clipped = torch.full_like(signal, torch.nan)
    zeros = values.eq(0).float().mean()
    if codes is not None:
        clipped = _clipped(wide, values, codes, kept)
    # 0 / 0, nothing there and nothing lost, is no loss.
    ratio = 10 * torch.log10(torch.where(noise == 0, torch.full_like(signal, torch.inf), signal / noise))
    return torch.stack([clipped, zeros, ratio, kept.scale.float().abs().mean()])


def _clipped(x: Tensor, values: Tensor, codes: Tensor, kept: _Kept) -> Tensor:
    """Return the share of ``x`` that lies further out than half a step beyond the grid."""
    ends = quant_range(kept.fmt.bits, kept.fmt.symmetric)
    at_end = (codes == ends[0]) | (codes == ends[1])
    # The scale of each element, in whatever layout scales have.
    steps = get_scheme(kept.fmt.scheme).dequantize(
        torch.ones_like(codes), kept.scale, None, replace(kept.fmt, symmetric=True), torch.float32
    )
    # float32 rounds the borders themselves; they are no clipping.
    return (at_end & ((x - values).abs() > steps.abs() * (0.5 + 1e-4))).float().mean()


@contextlib.contextmanager
def sampling(sample: LayerSample) -> Any:
    """Let ``sample`` look at the forward passes inside."""
    sample.start()
    try:
        yield sample
    finally:
        sample.stop()

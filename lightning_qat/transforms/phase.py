"""What the quantizers of a prepared model do now: plain attributes, set from outside."""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_qat.config import nearest_first
from lightning_qat.transforms.prepare import qat_layers


@dataclass(frozen=True, kw_only=True)
class Phase:
    """What the quantizers do.

    Args:
        observing: learn activation ranges from training batches.
        quantizing: fake-quantize; False is float.
        frozen: scales stand still.
        frozen_norm: BatchNorm statistics stand still.
        weight_bits: of the weights; None leaves the plan's.
        activation_bits: of the activations; None leaves the plan's.
        bits_match: glob on the names of the layers whose bits are set.
    """

    observing: bool = True
    quantizing: bool = True
    frozen: bool = False
    frozen_norm: bool = False
    weight_bits: int | None = None
    activation_bits: int | None = None
    bits_match: str = "*"


def apply_phase(model: nn.Module, phase: Phase) -> list[nn.Module]:
    """Set ``phase`` on every quantizer of ``model``. Doing it again changes nothing.

    Returns the BatchNorm modules that were put into evaluation mode, which is how their statistics
    stand still.
    """
    for name, layer in qat_layers(model):
        weight, activation = layer.weight_quantizer, layer.input_quantizer
        sets_bits = fnmatch.fnmatchcase(name, phase.bits_match)
        if phase.weight_bits is not None and sets_bits:
            weight.set_bits(phase.weight_bits, layer.weight)
        weight.quantizing = phase.quantizing
        weight.set_frozen(phase.frozen, layer.weight)
        if activation is not None:
            if phase.activation_bits is not None and sets_bits:
                activation.set_bits(phase.activation_bits)
            activation.quantizing = phase.quantizing
            activation.observing = phase.observing
            activation.frozen = phase.frozen
    if not phase.frozen_norm:
        return []
    norms: list[nn.Module] = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training]
    for norm in norms:
        norm.eval()
    return norms


@contextlib.contextmanager
def float_forward(model: nn.Module) -> Iterator[None]:
    """Let ``model`` compute in float inside; nothing else of its phase changes."""
    layers = [layer for _, layer in qat_layers(model)]
    quantizers = [q for layer in layers for q in (layer.weight_quantizer, layer.input_quantizer) if q is not None]
    flags = [quantizer.quantizing for quantizer in quantizers]
    for quantizer in quantizers:
        quantizer.quantizing = False
    try:
        yield
    finally:
        for quantizer, flag in zip(quantizers, flags, strict=True):
            quantizer.quantizing = flag


def set_bits(model: nn.Module, bits: int, match: str = "*", *, activations: bool = False) -> None:
    """Change the bits of a prepared model's layers; scales are derived again.

    Args:
        model: a prepared model.
        bits: 2 to 16.
        match: glob on layer names.
        activations: change the activations instead of the weights.

    Raises:
        ValueError: if no prepared layer matches or ``bits`` is out of range.
    """
    layers = dict(qat_layers(model))
    hits = [name for name in layers if fnmatch.fnmatchcase(name, match)]
    if not hits:
        names = ", ".join(repr(n) for n in nearest_first(match, layers)[:5])
        raise ValueError(
            f"match={match!r} matches no prepared layer; nearest names: {names or 'none, call prepare first'}"
        )
    for name in hits:
        layer = layers[name]
        if not activations:
            layer.weight_quantizer.set_bits(bits, layer.weight)
        elif layer.input_quantizer is not None:
            layer.input_quantizer.set_bits(bits)

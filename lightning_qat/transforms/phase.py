"""What the quantizers of a prepared model do now: plain attributes, set from outside."""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_qat.config import nearest_first
from lightning_qat.nn import QATLayer
from lightning_qat.nn.computed_weight import weight_now
from lightning_qat.quantizers.kept_weight import KeptWeight
from lightning_qat.quantizers.sharded import is_sharded
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
        weight_bits_of, activation_bits_of: those of single layers, by name; they come before the others.
    """

    observing: bool = True
    quantizing: bool = True
    frozen: bool = False
    frozen_norm: bool = False
    weight_bits: int | None = None
    activation_bits: int | None = None
    bits_match: str = "*"
    weight_bits_of: Mapping[str, int] = field(default_factory=dict)
    activation_bits_of: Mapping[str, int] = field(default_factory=dict)


def apply_phase(model: nn.Module, phase: Phase) -> list[nn.Module]:
    """Set ``phase`` on every quantizer of ``model``. Doing it again changes nothing.

    Returns the BatchNorm modules that were put into evaluation mode, which is how their statistics
    stand still.
    """
    # This is done twice for each batch: what a module holds already is not set again, which takes longer than to look.
    bits = (phase.weight_bits, phase.activation_bits, phase.weight_bits_of or None, phase.activation_bits_of or None)
    any_bits = any(each is not None for each in bits)
    for name, layer in qat_layers(model):
        weight, activation = layer.weight_quantizer, layer.input_quantizer
        if any_bits:
            _set_bits(name, layer, phase)
        if weight.quantizing != phase.quantizing:
            weight.quantizing = phase.quantizing
        if phase.frozen != weight.frozen:
            weight.set_frozen(phase.frozen, weight_now(layer))
        if activation is not None:
            if activation.quantizing != phase.quantizing:
                activation.quantizing = phase.quantizing
            if activation.observing != phase.observing:
                activation.observing = phase.observing
            if activation.frozen != phase.frozen:
                activation.frozen = phase.frozen
    if not phase.frozen_norm:
        return []
    norms: list[nn.Module] = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training]
    for norm in norms:
        norm.eval()
    return norms


def _set_bits(name: str, layer: QATLayer, phase: Phase) -> None:
    sets_bits = fnmatch.fnmatchcase(name, phase.bits_match)
    weight, activation = layer.weight_quantizer, layer.input_quantizer
    weight_bits = phase.weight_bits_of.get(name, phase.weight_bits if sets_bits else None)
    # A weight may be computed when it is read: only where something changes.
    if weight_bits is not None and weight_bits != weight.bits:
        weight.set_bits(weight_bits, weight_now(layer))
    activation_bits = phase.activation_bits_of.get(name, phase.activation_bits if sets_bits else None)
    if activation is not None and activation_bits is not None:
        activation.set_bits(activation_bits)


def restore_bits(model: nn.Module, match: str = "*", *, weights: bool = True, activations: bool = True) -> None:
    """Give the layers whose names ``match`` the bits of their plan back; scales are derived again."""
    for name, layer in qat_layers(model):
        weight, activation = layer.weight_quantizer, layer.input_quantizer
        if weights and fnmatch.fnmatchcase(name, match):
            weight.set_bits(int(weight.config.bits or 8), weight_now(layer))
        if activations and activation is not None and fnmatch.fnmatchcase(name, match):
            activation.set_bits(int(activation.config.bits or 8))


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


@torch.no_grad()
def follow_weights(model: nn.Module) -> None:
    """Derive weight scales that stand still from the weights as they are now: other weights were put in."""
    for _, layer in qat_layers(model):
        if layer.weight_quantizer.frozen:
            weight = weight_now(layer)
            layer.weight_quantizer.set_frozen(False, weight)
            layer.weight_quantizer.set_frozen(True, weight)


def keep_quantized_weights(model: nn.Module, keep: bool) -> None:
    """Let the layers of a prepared ``model`` keep their fake-quantized weights from now on, or drop them.

    Numbers stay the same, and each weight is fake-quantized once instead of in every forward. It costs the memory
    of the weights. Keep them only while nobody changes weights through ``parameter.data``, which is not counted:
    between two optimizer steps, or during an evaluation.
    """
    for _, layer in qat_layers(model):
        if not keep or is_sharded(layer._parameters.get("weight")):  # kept, the parts of all ranks would be on each
            layer.weight_quantizer.kept = None
        elif layer.weight_quantizer.kept is None:
            layer.weight_quantizer.kept = KeptWeight()


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
            layer.weight_quantizer.set_bits(bits, weight_now(layer))
        elif layer.input_quantizer is not None:
            layer.input_quantizer.set_bits(bits)

"""Mixed precision by search: how much each layer loses at each number of bits, and the best bits within a budget.

The loss of a layer is what its quantization alone, all others in float, does to the model's output. Losses are taken
to add up, as in Dong et al. 2020 (HAWQ-V2); which bits make their sum smallest is then solved exactly.
"""

from __future__ import annotations

import glob
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qat.config import LayerRule, PlanLike, QuantizationConfig, QuantizationPlan
from lightning_qat.nn import QATLayer
from lightning_qat.ptq.knapsack import choose_one_each
from lightning_qat.quantizers.fake_quantizer import FakeQuantizer
from lightning_qat.transforms.calibrate import _call, calibrate
from lightning_qat.transforms.padding import Padding
from lightning_qat.transforms.prepare import copy_model, prepare, qat_layers


@dataclass(frozen=True)
class LayerSensitivity:
    """What one layer loses.

    Args:
        name: of the layer.
        weights: how many it has.
        loss: bits -> power of the change of the model's output, as a share of the output's own power.
        weight: how the weight is quantized, whatever the bits.
        activation: how the input is; None for weight-only.
    """

    name: str
    weights: int
    loss: Mapping[int, float]
    weight: QuantizationConfig
    activation: QuantizationConfig | None = None


@torch.no_grad()
def measure_sensitivity(
    model: nn.Module,
    batches: Iterable[Any],
    plan: PlanLike = "int8_weight_only",
    bits: Sequence[int] = (2, 3, 4, 6, 8),
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> list[LayerSensitivity]:
    """Return what each layer of ``model`` loses at each of ``bits``, from one pass over ``batches``.

    Every batch runs once in float and once for each layer and number of bits. Weights alone are quantized: the inputs
    of layers, which have the plan's bits whatever is chosen, stay in float.

    Args:
        model: float; stays as it is. No second copy of its weights is made.
        batches: as :func:`calibrate` takes them; kept while this runs.
        plan: which layers, and how: schemes whose bits can change.
        bits: candidates, each 2 to 16.
        forward: called as ``forward(model, batch)`` to run a batch otherwise.

    Raises:
        ValueError: if there is no batch or no candidate, or a scheme has fixed bits.
    """
    candidates = sorted(set(bits))
    if not candidates:
        raise ValueError("bits is empty; give the numbers of bits to choose from, such as (2, 3, 4, 6, 8)")
    original = getattr(model, "_orig_mod", model)
    # Weights are shared; buffers, which a forward may write, are not.
    replica = prepare(copy_model(original, {id(t): t for t in original.parameters()}), plan).eval()
    layers, kept, padding = dict(qat_layers(replica)), list(batches), Padding(replica, forward or _call)
    calibrate(replica, kept, forward)
    for module in replica.modules():
        if isinstance(module, FakeQuantizer):
            module.quantizing = module.observing = False
    padding.look_at(kept)

    def outputs_of(batch: Any) -> list[Tensor]:
        return padding.counted_outputs(padding.run(batch))

    noise = {name: dict.fromkeys(candidates, 0.0) for name in layers}
    power = 0.0
    for batch in kept:
        expected = outputs_of(batch)
        power += sum(float(t.double().square().sum()) for t in expected)
        for name, layer in layers.items():
            for value in candidates:
                noise[name][value] += _noise(layer, value, expected, partial(outputs_of, batch))
    return [
        LayerSensitivity(
            name,
            layer.weight.numel(),
            {value: noise[name][value] / max(power, 1e-300) for value in candidates},
            layer.weight_quantizer.config,
            None if layer.input_quantizer is None else layer.input_quantizer.config,
        )
        for name, layer in layers.items()
    ]


def _noise(layer: QATLayer, bits: int, expected: list[Tensor], run: Callable[[], list[Tensor]]) -> float:
    """Return the power of what quantizing one weight does to the outputs."""
    layer.weight_quantizer.set_bits(bits, layer.weight)
    layer.weight_quantizer.quantizing = True
    try:
        actual = run()
    finally:
        layer.weight_quantizer.quantizing = False
    return sum(float((a.double() - e.double()).square().sum()) for a, e in zip(actual, expected, strict=True))


def allocate_bits(sensitivities: Sequence[LayerSensitivity], bits_per_weight: float) -> dict[str, int]:
    """Return the bits of each layer that lose least within the budget; no other choice loses less.

    Args:
        sensitivities: of :func:`measure_sensitivity`.
        bits_per_weight: most bits that a weight may take on the average of all layers; scales are not counted.

    Bits at which a layer's loss is NaN or infinite are not chosen.

    Raises:
        ValueError: if even the fewest bits are too many, or a layer has a finite loss at none.
    """
    losses = [_finite_losses(layer) for layer in sensitivities]
    weights = sum(layer.weights for layer in sensitivities)
    least = sum(layer.weights * min(loss) for layer, loss in zip(sensitivities, losses, strict=True))
    budget = math.floor(bits_per_weight * weights + 1e-6)
    if least > budget:
        raise ValueError(
            f"bits_per_weight={bits_per_weight} is too few: the fewest that were measured take "
            f"{least / max(weights, 1):.3f}; measure fewer bits, or raise the budget"
        )
    options = [
        [(layer.weights * b, loss, b) for b, loss in found.items()]
        for layer, found in zip(sensitivities, losses, strict=True)
    ]
    chosen = choose_one_each([[(size, loss) for size, loss, _ in row] for row in options], budget)
    return {layer.name: row[i][2] for layer, row, i in zip(sensitivities, options, chosen, strict=True)}


def _finite_losses(layer: LayerSensitivity) -> dict[int, float]:
    found = {bits: loss for bits, loss in layer.loss.items() if math.isfinite(loss)}
    if not found:
        raise ValueError(
            f"the loss of layer {layer.name!r} is not finite at any of {sorted(layer.loss)} bits; look for NaN in the "
            "model or the batches, or leave the layer out of the plan"
        )
    return found


def mixed_plan(sensitivities: Sequence[LayerSensitivity], bits_per_weight: float) -> QuantizationPlan:
    """Return the plan that gives each layer the bits of :func:`allocate_bits`."""
    bits = allocate_bits(sensitivities, bits_per_weight)
    rules = [
        LayerRule(glob.escape(layer.name) or "*", replace(layer.weight, bits=bits[layer.name]), layer.activation)
        for layer in sensitivities
    ]
    return QuantizationPlan(rules)


def write_plan(plan: QuantizationPlan, path: str | os.PathLike[str]) -> Path:
    """Write ``plan`` as the YAML that recipes take: ``quantization=NAME`` for ``FOLDER/quantization/NAME.yaml``.

    Recipes find it with ``'hydra.searchpath=[file://FOLDER]'``. The file appears whole or not at all.

    Raises:
        ValueError: if the plan has a base or matches types, which such a file does not hold.
    """
    if plan.base is not None or not all(isinstance(rule.match, str) for rule in plan.rules):
        raise ValueError("a plan with a base or with rules for types cannot be written; give each layer a rule by name")
    lines = ["_target_: lightning_qat.QuantizationPlan", "base: null", "rules:"]
    for rule in plan.rules:
        lines += ["- _target_: lightning_qat.LayerRule", f"  match: {json.dumps(rule.match)}"]
        lines += [*_config_lines("weight", rule.weight), *_config_lines("activation", rule.activation)]
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part")
    part.write_text("\n".join(lines) + "\n", encoding="utf-8")
    os.replace(part, target)
    return target


def _config_lines(name: str, config: Any, indent: str = "  ") -> list[str]:
    """Return YAML of a config that is a dataclass; JSON is YAML for every value."""
    if config is None:
        return [f"{indent}{name}: null"]
    lines = [f"{indent}{name}:", f"{indent}  _target_: lightning_qat.{type(config).__name__}"]
    for field in fields(config):
        value = getattr(config, field.name)
        if hasattr(value, "__dataclass_fields__"):
            lines += _config_lines(field.name, value, indent + "  ")
        else:
            lines.append(f"{indent}  {field.name}: {json.dumps(str(value) if isinstance(value, str) else value)}")
    return lines

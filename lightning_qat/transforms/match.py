"""Which layers of a model get which config."""

from __future__ import annotations

import fnmatch
import logging
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qat.config import LayerRule, QuantizationConfig, QuantizationPlan, nearest_first
from lightning_qat.nn import QATLayer, QuantizedLayer
from lightning_qat.nn.computed_weight import weight_now
from lightning_qat.nn.layer import supported_class

logger = logging.getLogger(__name__)

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

#: Weight and activation config of one layer.
LayerConfigs = tuple[QuantizationConfig, "QuantizationConfig | None"]


def _inside_attention(model: nn.Module) -> set[int]:
    """Layers that ``nn.MultiheadAttention`` owns: it reads their weights and never calls them."""
    owned: set[int] = set()
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            owned.update(id(child) for child in module.modules())
    return owned


def candidate_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers of ``model`` that can be quantized, by name, each once."""
    skipped = _inside_attention(model)
    layers = {}
    for name, module in model.named_modules():
        if supported_class(type(module)) is None or isinstance(module, (QATLayer, QuantizedLayer)):
            continue
        weight: Any = weight_now(module)
        if not isinstance(weight, Tensor) or weight.dtype not in _FLOATS:
            continue  # already quantized by another library
        if id(module) in skipped:
            logger.info("layer %r stays in float: nn.MultiheadAttention reads its weight without calling it", name)
            continue
        layers[name] = module
    return layers


def _rule_matches(rule: LayerRule, names: list[str], module: nn.Module) -> bool:
    if isinstance(rule.match, str):
        pattern = rule.match
        return any(fnmatch.fnmatchcase(name, pattern) for name in names)
    return isinstance(module, rule.match)


def _unmatched(rule: LayerRule, layers: dict[str, nn.Module]) -> ValueError:
    if isinstance(rule.match, str):
        names = ", ".join(repr(n) for n in nearest_first(rule.match, layers)[:5])
        return ValueError(
            f"match={rule.match!r} matches no layer that can be quantized; nearest names: {names or 'none'}"
        )
    types = ", ".join(sorted({type(m).__name__ for m in layers.values()}))
    return ValueError(
        f"match={rule.match.__name__} matches no layer that can be quantized; the model has: {types or 'none'}"
    )


def match_layers(model: nn.Module, plan: QuantizationPlan) -> dict[str, LayerConfigs]:
    """Return name -> ``(weight config, activation config)`` of every layer that ``plan`` quantizes.

    The base covers Linear and convolutions; embeddings are reached by rules. Later rules win.

    Raises:
        ValueError: if a rule matches nothing, or nothing is to be quantized at all.
    """
    layers = candidate_layers(model)
    matched: dict[str, LayerConfigs | None] = {}
    if plan.base is not None:
        configs = plan.base.weight_config(), plan.base.activation_config()  # type: ignore[union-attr]
        matched = {name: configs for name, module in layers.items() if not isinstance(module, nn.Embedding)}
    names: dict[int, list[str]] = {}  # a layer of two parents goes by two names
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    for rule in plan.rules:
        hits = [name for name, module in layers.items() if _rule_matches(rule, names[id(module)], module)]
        if not hits:
            raise _unmatched(rule, layers)
        for name in hits:
            matched[name] = None if rule.weight is None else (rule.weight, rule.activation)  # type: ignore[assignment]
    chosen = {name: configs for name, configs in matched.items() if configs is not None}
    if not chosen:
        found = ", ".join(sorted({type(m).__name__ for m in model.modules()}))
        raise ValueError(f"the plan quantizes no layer of {type(model).__name__}, which has: {found}")
    return chosen

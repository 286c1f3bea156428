"""Which layers of a model get which config."""

from __future__ import annotations

import fnmatch
import logging
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qat.config import LayerRule, QuantizationConfig, QuantizationPlan, nearest_first
from lightning_qat.nn import QATLayer, QATMultiheadAttention, QuantizedLayer, recurrent
from lightning_qat.nn import attention as attentions
from lightning_qat.nn.attention import PROJECTIONS
from lightning_qat.nn.computed_weight import weight_now
from lightning_qat.nn.layer import supported_class

logger = logging.getLogger(__name__)

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

#: What the base of a plan leaves in float: look-ups, and weights whose error comes back in every time step.
_BY_RULE = (nn.Embedding, recurrent.RecurrentWeight)

#: Weight and activation config of one layer.
LayerConfigs = tuple[QuantizationConfig, "QuantizationConfig | None"]


def _inside_attention(model: nn.Module) -> set[int]:
    """Layers that an ``nn.MultiheadAttention`` owns, reads the weights of and never calls: it was not split."""
    owned: set[int] = set()
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention) and not isinstance(module, QATMultiheadAttention):
            owned.update(id(child) for child in module.modules())
    return owned


def split_layers(model: nn.Module) -> list[nn.Module]:
    """Let layers that only read their weights call them, in place, so that these can be matched; return the layers.

    That is every attention and every recurrent layer.
    """
    found = [m for m in model.modules() if _room_of(m).can_be_split(m)]
    for module in found:
        _room_of(module).split(module)
    return found


def settle_layers(split: list[nn.Module]) -> None:
    """Turn those that :func:`split_layers` returned, and that hold nothing prepared, back into what they were."""
    for module in split:
        prepared = any(isinstance(child, QATLayer) for child in module.children())
        (_room_of(module).settle if prepared else _room_of(module).merge)(module)


def merge_layers(split: list[nn.Module]) -> None:
    """Turn those that :func:`split_layers` returned back into what they were."""
    for module in split:
        _room_of(module).merge(module)


def _room_of(module: nn.Module) -> Any:
    return attentions if isinstance(module, nn.MultiheadAttention) else recurrent


def _parts_of(module: nn.Module) -> list[nn.Module]:
    """Return the layers that rules for ``module`` mean, where it is split."""
    if isinstance(module, QATMultiheadAttention):
        return [getattr(module, part) for part in PROJECTIONS]
    return list(module.children()) if isinstance(module, recurrent.RecurrentLayer) else []


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
            logger.info("layer %r stays in float: its attention reads its weight without calling it", name)
            continue
        layers[name] = module
    return layers


def _rule_matches(rule: LayerRule, names: list[str], modules: list[nn.Module]) -> bool:
    if isinstance(rule.match, str):
        pattern = rule.match
        return any(fnmatch.fnmatchcase(name, pattern) for name in names)
    return any(isinstance(module, rule.match) for module in modules)


def _all_names(model: nn.Module) -> dict[int, list[str]]:
    """Return the names of every module; those of an attention stand for its projections too, and so on."""
    names: dict[int, list[str]] = {}  # a layer of two parents goes by two names
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    for module in model.modules():
        for part in _parts_of(module):
            names[id(part)] += names[id(module)]
    return names


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

    The base covers Linear and convolutions; embeddings and recurrent layers are reached by rules. Later rules win.

    Raises:
        ValueError: if a rule matches nothing, or nothing is to be quantized at all.
    """
    layers = candidate_layers(model)
    matched: dict[str, LayerConfigs | None] = {}
    if plan.base is not None:
        configs = plan.base.weight_config(), plan.base.activation_config()  # type: ignore[union-attr]
        matched = {name: configs for name, module in layers.items() if not isinstance(module, _BY_RULE)}
    names = _all_names(model)
    owners = {id(part): module for module in model.modules() for part in _parts_of(module)}
    for rule in plan.rules:
        hits = [
            name
            for name, module in layers.items()
            if _rule_matches(rule, names[id(module)], [module, owners.get(id(module), module)])
        ]
        if not hits:
            raise _unmatched(rule, layers)
        for name in hits:
            matched[name] = None if rule.weight is None else (rule.weight, rule.activation)  # type: ignore[assignment]
    chosen = {name: configs for name, configs in matched.items() if configs is not None}
    if not chosen:
        found = ", ".join(sorted({type(m).__name__ for m in model.modules()}))
        raise ValueError(f"the plan quantizes no layer of {type(model).__name__}, which has: {found}")
    return chosen

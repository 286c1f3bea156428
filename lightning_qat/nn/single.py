"""Construction of one QAT layer from one float layer, without a model or a plan."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_qat.config import PlanLike, QuantizationConfig, QuantizationPlan, resolve_plan
from lightning_qat.nn.layer import QATLayer, make_qat, shallow_copy_into


def single_layer_configs(config: PlanLike) -> tuple[QuantizationConfig, QuantizationConfig | None]:
    """Return the weight and activation configs that ``config`` means for one layer."""
    if isinstance(config, QuantizationPlan):
        raise ValueError(
            "a QuantizationPlan describes a model; give a layer a QATConfig, a QuantizationConfig or a preset's name"
        )
    base: Any = resolve_plan(config).base
    return base.weight_config(), base.activation_config()


def init_from(target: QATLayer, layer: nn.Module, config: PlanLike, quantize_activations: bool) -> None:
    """Make ``target`` the fake-quantized counterpart of ``layer``, sharing its parameters."""
    expected = target.float_class
    if not isinstance(layer, expected) or isinstance(layer, QATLayer):
        raise ValueError(
            f"{type(target).__name__} is made from an nn.{expected.__name__}, not a {type(layer).__name__}"
        )
    weight, activation = single_layer_configs(config)
    nn.Module.__init__(target)
    shallow_copy_into(target, layer)
    qat_class = type(target)
    target.__class__ = type(layer)  # type: ignore[assignment]  # make_qat decides by the float class, also for subclasses
    make_qat(target, weight, activation if quantize_activations else None, qat_class.__name__)

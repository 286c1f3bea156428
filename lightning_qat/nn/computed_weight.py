"""The weight of a layer that computes it: pruned, normed or parametrized."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm


def weight_now(layer: nn.Module) -> Tensor:
    """Return the weight that an evaluation of ``layer`` would compute with now; nothing in the layer changes.

    Pruning and the hooks of the older norms set ``layer.weight`` before each forward, so that after an optimizer
    step it is that of the step before; and reading a spectrally normed weight in training mode moves its vectors on.
    """
    if parametrize.is_parametrized(layer, "weight"):
        return _parametrized(layer)
    weight: Any = getattr(layer, "weight", None)  # another library may have taken it
    for hook in layer._forward_pre_hooks.values():
        if isinstance(hook, BasePruningMethod) and hook._tensor_name == "weight":
            weight = hook.apply_mask(layer)
        elif isinstance(hook, WeightNorm) and hook.name == "weight":
            weight = hook.compute_weight(layer)
        elif isinstance(hook, SpectralNorm) and hook.name == "weight":
            weight = hook.compute_weight(layer, do_power_iteration=False)
    return weight


def _parametrized(layer: Any) -> Tensor:
    parts = list(layer.parametrizations.weight.modules())
    modes = [part.training for part in parts]
    try:
        for part in parts:
            part.training = False
        return layer.weight
    finally:
        for part, training in zip(parts, modes, strict=True):
            part.training = training

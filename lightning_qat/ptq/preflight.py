"""Before any work: what will be done to each layer, or why it will not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from lightning_qat.config import PlanLike, resolve_plan
from lightning_qat.nn import QATLayer
from lightning_qat.nn.computed_weight import weight_now
from lightning_qat.nn.layer import LAYER_CLASSES, float_type, supported_class
from lightning_qat.ptq.methods import METHODS, method_of, reason_for_nearest
from lightning_qat.schemes import TensorFormat, weight_format
from lightning_qat.transforms.match import candidate_layers, match_layers, split_layers
from lightning_qat.transforms.prepare import copy_model, prepared_plan, qat_layers
from lightning_qat.validation import check_choice

#: Share of a model's weights in unknown modules from which on it is told.
_MUCH = 0.1


@dataclass(frozen=True)
class LayerTask:
    """What will be done to one layer.

    Args:
        name: of the layer.
        kind: its class.
        shape: of its weight.
        method: what chooses its codes; ``"float"``: it stays as it is; ``"error"``: the run will not begin.
        bits: of a code; None in float.
        scales: what shares a scale, such as ``"group of 64"``.
        reason: why it stays in float, cannot be quantized, or is rounded to nearest instead.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    method: str
    bits: int | None = None
    scales: str = ""
    reason: str = ""

    def row(self) -> dict[str, Any]:
        """Return the task as builtins."""
        return {**asdict(self), "shape": list(self.shape)}


def preflight(model: nn.Module, config: PlanLike = "int8", method: str | None = None) -> list[LayerTask]:
    """Return what :func:`quantize_model` would do to each layer of ``model``; nothing is changed or computed.

    Args:
        model: a float model, or a prepared one, whose own plan then holds.
        config: as :func:`quantize_model` takes it.
        method: likewise.

    Raises:
        ValueError: the method is unknown, or a rule matches nothing.
    """
    method = method or method_of(resolve_plan(config))
    check_choice("method", method, tuple(METHODS))
    original: nn.Module = getattr(model, "_orig_mod", model)
    if prepared_plan(original) is not None:
        return [_task(name, layer, layer.weight_quantizer.format, method) for name, layer in qat_layers(original)]
    replica = copy_model(original, {id(t): t for t in (*original.parameters(), *original.buffers())})
    split_layers(replica)
    matched = match_layers(replica, resolve_plan(config))
    tasks = []
    for name, layer in candidate_layers(replica).items():
        if name not in matched:
            reason = "an embedding that no rule names" if isinstance(layer, nn.Embedding) else "no rule quantizes it"
            tasks.append(LayerTask(name, _kind(layer), tuple(weight_now(layer).shape), "float", reason=reason))
            continue
        axis = LAYER_CLASSES[supported_class(type(layer))][0].channel_axis  # type: ignore[index]
        try:
            fmt = weight_format(matched[name][0], weight_now(layer).shape, axis, name)
        except ValueError as error:
            tasks.append(LayerTask(name, _kind(layer), tuple(weight_now(layer).shape), "error", reason=str(error)))
            continue
        tasks.append(_task(name, layer, fmt, method))
    return tasks


def unknown_weights(model: nn.Module) -> tuple[str, ...]:
    """Return a note if much of a prepared model is in matrices that no layer of this package's kinds holds.

    Such are the ``Conv1D`` of GPT-2 in transformers and experts that are one three-dimensional parameter.
    """
    known = (QATLayer, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase, nn.EmbeddingBag, ParametrizationList)
    sizes: dict[int, int] = {}
    other: dict[int, tuple[str, nn.Module, int]] = {}
    for name, module in model.named_modules():
        own = isinstance(module, known) or supported_class(type(module)) is not None
        for end, parameter in module._parameters.items():
            if parameter is None or parameter.dim() < 2:
                continue
            sizes[id(parameter)] = parameter.numel()
            if not own:
                other[id(parameter)] = (f"{name}.{end}".removeprefix("."), module, parameter.numel())
    share = sum(size for _, _, size in other.values()) / max(sum(sizes.values()), 1)
    if share < _MUCH:
        return ()
    name, module, _ = max(other.values(), key=lambda found: found[2])
    return (
        f"{share:.0%} of the weights stay in float: they are in modules that hold parameters of their own, such as "
        f"{name!r} of a {type(module).__name__}; put layers that can be quantized, such as nn.Linear, in their place",
    )


def check_tasks(tasks: Sequence[LayerTask]) -> None:
    """Raise ``ValueError`` that names every layer which cannot be quantized as asked."""
    wrong = [task for task in tasks if task.method == "error"]
    if wrong:
        told = "\n".join(f"- {task.reason}" for task in wrong[:8])
        more = f"\n- and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise ValueError(f"{len(wrong)} of {len(tasks)} layers cannot be quantized so:\n{told}{more}")


def _task(name: str, layer: nn.Module, fmt: TensorFormat, method: str) -> LayerTask:
    reason = reason_for_nearest(layer, fmt, method)
    chosen = "rtn" if reason else method
    return LayerTask(name, _kind(layer), tuple(weight_now(layer).shape), chosen, fmt.bits, _scales(fmt), reason)


def _kind(layer: nn.Module) -> str:
    return float_type(layer).__name__


def _scales(fmt: TensorFormat) -> str:
    if fmt.block_size is not None:
        return f"block of {fmt.block_size}"
    if fmt.group_size is not None:
        return f"group of {fmt.group_size}"
    return "tensor" if fmt.axis is None else "channel"

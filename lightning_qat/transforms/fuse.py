"""Finding the BatchNorm that directly follows a layer, by watching one forward.

Module order only suggests which BatchNorm follows which layer; a ReLU between them, or a second
reader of the layer's output, makes folding wrong. So one real forward is watched: a layer is folded if
every output it makes *is* the input of one BatchNorm, which gets nothing else, and no other function
reads that output.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from lightning_qat.nn import QATLayer, QATMultiheadAttention, RecurrentLayer
from lightning_qat.nn.layer import float_type
from lightning_qat.transforms.prepare import copy_model, qat_layers

logger = logging.getLogger(__name__)

#: ``WeightQuantizer.folded_norm`` of a layer that no BatchNorm follows.
NO_NORM = ""


def undecided_layers(model: nn.Module) -> list[QATLayer]:
    """Return the prepared layers for which it is not known yet whether a BatchNorm follows."""
    return [layer for _, layer in qat_layers(model) if layer.weight_quantizer.folded_norm is None]


def decide_no_folding(model: nn.Module) -> None:
    """Leave every BatchNorm of ``model`` where it is."""
    for layer in undecided_layers(model):
        layer.weight_quantizer.folded_norm = NO_NORM


def _can_take_in(layer: QATLayer, norm: nn.Module, output_dims: int | None) -> bool:
    if not isinstance(norm, _BatchNorm) or norm.running_var is None or not layer.weight_quantizer.scheme.folds_norms:
        return False
    if type(norm).forward not in (_BatchNorm.forward, nn.SyncBatchNorm.forward):
        return False  # one with an activation of its own, say
    if issubclass(float_type(layer), nn.Linear):
        # BatchNorm1d of [N, C, L] normalizes dimension 1, a Linear's channels are the last one.
        return output_dims == 2
    if issubclass(float_type(layer), nn.ConvTranspose2d):
        return bool(layer.groups == 1)
    return not issubclass(float_type(layer), nn.Embedding)


class _Watch(TorchFunctionMode):
    """Counts who reads the outputs of the watched layers."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: dict[int, tuple[Tensor, QATLayer]] = {}  # holds the tensors, so that an id stays theirs
        self.other_readers: set[int] = set()
        self.norm_of: dict[int, nn.Module] = {}
        self.fed_otherwise: set[nn.Module] = set()
        self._inside_norm = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self._inside_norm and self.outputs and any(isinstance(t, Tensor) for t in tree_leaves(result)):
            self.read(tree_leaves((args, kwargs)))
        return result

    def read(self, leaves: list[Any]) -> None:
        self.other_readers.update(id(leaf) for leaf in leaves if id(leaf) in self.outputs)

    def layer_done(self, layer: nn.Module, _: Any, output: Any) -> None:
        if isinstance(output, Tensor) and isinstance(layer, QATLayer):
            self.outputs[id(output)] = (output, layer)

    def norm_starts(self, norm: nn.Module, args: tuple[Any, ...]) -> None:
        self._inside_norm += 1
        key = id(args[0]) if args else 0
        if key in self.outputs and key not in self.norm_of:
            self.norm_of[key] = norm
        else:
            self.fed_otherwise.add(norm)
            self.other_readers.add(key)

    def norm_done(self, *_: Any) -> None:
        self._inside_norm -= 1

    def pairs(self) -> dict[QATLayer, nn.Module | None]:
        """Return the layers that ran, each with the BatchNorm that it can take in."""
        found: dict[QATLayer, nn.Module | None] = {}
        feeders: dict[nn.Module, set[QATLayer]] = {}
        for key, (output, layer) in self.outputs.items():
            norm = self.norm_of.get(key)
            sole = norm is not None and key not in self.other_readers and norm not in self.fed_otherwise
            fits = sole and _can_take_in(layer, norm, output.dim())  # type: ignore[arg-type]
            if norm is not None:
                feeders.setdefault(norm, set()).add(layer)
            found[layer] = norm if fits and found.get(layer, norm) is norm else None
        return {layer: norm if norm is not None and len(feeders[norm]) == 1 else None for layer, norm in found.items()}


def _record(model: nn.Module, pairs: dict[QATLayer, nn.Module | None]) -> None:
    names = {module: name for name, module in model.named_modules()}
    for layer, norm in pairs.items():
        if layer.weight_quantizer.folded_norm is None:
            layer.weight_quantizer.folded_norm = NO_NORM if norm is None else names.get(norm, NO_NORM)


@contextlib.contextmanager
def watch_folds(model: nn.Module) -> Iterator[None]:
    """Decide from the forward run inside which BatchNorm each undecided layer of ``model`` takes in.

    The decision is kept in the layers and saved with them. Nothing is done if all is decided.
    """
    layers = undecided_layers(model)
    if not layers:
        yield
        return
    watch = _Watch()
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    handles = [layer.register_forward_hook(watch.layer_done, prepend=True) for layer in layers]
    handles += [norm.register_forward_pre_hook(watch.norm_starts) for norm in norms]
    handles += [norm.register_forward_hook(watch.norm_done, always_call=True) for norm in norms]
    handles.append(model.register_forward_hook(lambda _m, _a, output: watch.read(tree_leaves(output))))
    try:
        with watch:
            yield
    finally:
        for handle in handles:
            handle.remove()
    _record(model, watch.pairs())


class _LeafTracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (QATLayer, QATMultiheadAttention, RecurrentLayer, _BatchNorm)) or super().is_leaf_module(
            m, module_qualified_name
        )


def trace_folds(model: nn.Module) -> None:
    """Decide the undecided layers of ``model`` from a symbolic trace, where the model can be traced.

    For models that never ran a batch under :func:`watch_folds`. Where tracing fails, BatchNorm stays.
    """
    undecided = undecided_layers(model)
    has_norm = any(isinstance(module, _BatchNorm) for module in model.modules())
    if not undecided or not has_norm:
        return decide_no_folding(model)
    replica = copy_model(model)  # tracing runs the user's forward, which may keep a proxy in the module
    try:
        graph = _LeafTracer().trace(replica)
    except Exception as error:  # noqa: BLE001 - the user's forward runs on proxies: anything may come out of it
        layers = dict(qat_layers(model))
        names = [name for name, layer in layers.items() if layer in undecided]
        where = f" into layers that no batch reached, such as {names[0]!r}" if len(names) < len(layers) else ""
        logger.warning(
            "BatchNorm is not folded%s: %s cannot be traced (%s); calibrate it first",
            where,
            type(model).__name__,
            error,
        )
        return decide_no_folding(model)
    modules = dict(model.named_modules())
    watch = _Watch()
    for node in graph.nodes:
        if node.op != "call_module" or not isinstance(modules.get(node.target), QATLayer):
            continue
        readers = list(node.users)
        layer: Any = modules[node.target]
        proxy = torch.empty(0)  # a trace knows no shapes, so a Linear is not folded here
        watch.outputs[id(proxy)] = (proxy, layer)
        norm = modules.get(readers[0].target) if len(readers) == 1 and readers[0].op == "call_module" else None
        # A trace does not run hooks, so it cannot know what they do to the output.
        if isinstance(norm, _BatchNorm) and not layer._forward_hooks and not norm._forward_pre_hooks:
            watch.norm_of[id(proxy)] = norm
    for node in graph.nodes:
        norm = modules.get(node.target) if node.op == "call_module" else None
        source = node.args[0] if isinstance(norm, _BatchNorm) and node.args else None
        if isinstance(norm, _BatchNorm) and not (
            isinstance(source, fx.Node) and isinstance(modules.get(source.target), QATLayer)
        ):
            watch.fed_otherwise.add(norm)
    _record(model, watch.pairs())
    return decide_no_folding(model)

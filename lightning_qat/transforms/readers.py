"""Who reads what a layer computes: one other prepared layer alone, or anybody else.

Learned from the same forward that :mod:`lightning_qat.transforms.fuse` watches. Where one quantized layer is the
only reader, a converted layer can compute straight to that one's codes (:mod:`lightning_qat.nn.region`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from lightning_qat.nn import QATLayer, codes_pass
from lightning_qat.transforms.prepare import qat_layers


class _Readers(TorchFunctionMode):
    """Follows the outputs of prepared layers through what codes can pass, to whoever reads them."""

    def __init__(self) -> None:
        super().__init__()
        # Tensor -> the layers it comes from, and through which BatchNorms. The tensors are held: an id stays theirs.
        self._followed: dict[int, tuple[Tensor, QATLayer]] = {}
        self.readers: dict[QATLayer, set[QATLayer | None]] = {}
        self.norms: dict[QATLayer, set[nn.Module]] = {}
        self._inside = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self._inside or not self._followed:
            return result
        source = next((self._layer_of(value) for value in (*args[:1], kwargs.get("input"))), None)
        if source is not None and codes_pass(func, args, kwargs, result):
            self._follow(result, source)
        elif any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
            self.read_by_others((args, kwargs))
        return result

    def _layer_of(self, value: Any) -> QATLayer | None:
        found = self._followed.get(id(value))
        return None if found is None else found[1]

    def _follow(self, tensor: Any, layer: QATLayer) -> None:
        if isinstance(tensor, Tensor):
            self._followed[id(tensor)] = (tensor, layer)

    def read_by_others(self, tree: Any) -> None:
        for leaf in tree_leaves(tree):
            layer = self._layer_of(leaf)
            if layer is not None:
                self.readers[layer].add(None)

    def layer_starts(self, reader: nn.Module, args: Any, kwargs: Any) -> None:
        if self._inside == 0:
            for leaf in tree_leaves((args, kwargs)):
                layer = self._layer_of(leaf)
                if layer is not None and isinstance(reader, QATLayer):
                    self.readers[layer].add(reader)
        self._inside += 1

    def layer_done(self, layer: nn.Module, _: Any, output: Any) -> None:
        self._inside -= 1
        if isinstance(layer, QATLayer):
            self.readers.setdefault(layer, set())
            self.norms.setdefault(layer, set())
            self._follow(output, layer)

    def norm_starts(self, *_: Any) -> None:
        self._inside += 1

    def norm_done(self, norm: nn.Module, args: Any, output: Any) -> None:
        self._inside -= 1
        layer = self._layer_of(args[0]) if args else None
        if layer is not None:
            self.norms[layer].add(norm)
            self._follow(output, layer)


@contextlib.contextmanager
def watch_readers(model: nn.Module) -> Iterator[None]:
    """Decide from the forward run inside which prepared layers feed one other prepared layer alone.

    Decides after BatchNorm is folded or left: one that stays reads floats. Nothing is done if all is decided.
    """
    layers = [layer for _, layer in qat_layers(model)]
    if all(layer.weight_quantizer.feeds_one_layer is not None for layer in layers):
        yield
        return
    watch = _Readers()
    handles = []
    for module in model.modules():
        if isinstance(module, QATLayer):
            handles.append(module.register_forward_pre_hook(watch.layer_starts, prepend=True, with_kwargs=True))
            handles.append(module.register_forward_hook(watch.layer_done, prepend=True, always_call=True))
        elif isinstance(module, _BatchNorm):
            handles.append(module.register_forward_pre_hook(watch.norm_starts))
            handles.append(module.register_forward_hook(watch.norm_done, always_call=True))
    handles.append(model.register_forward_hook(lambda _module, _args, output: watch.read_by_others(output)))
    try:
        with watch:
            yield
    finally:
        for handle in handles:
            handle.remove()
    _decide(model, watch)


def _decide(model: nn.Module, watch: _Readers) -> None:
    names = {module: name for name, module in model.named_modules()}
    for layer, readers in watch.readers.items():
        folded = layer.weight_quantizer.folded_norm
        expected = {folded} if folded else set()
        passed = {names.get(norm, "?") for norm in watch.norms[layer]}
        if layer.weight_quantizer.feeds_one_layer is None:
            layer.weight_quantizer.feeds_one_layer = None not in readers and len(readers) == 1 and passed == expected

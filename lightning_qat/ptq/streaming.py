"""A prepared model that has the weights of one block at a time; the others stay in files."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from lightning_qat.nn import QATLayer, QuantizedLayer
from lightning_qat.nn.computed_weight import weight_now
from lightning_qat.ptq.freed_memory import return_freed_memory
from lightning_qat.ptq.weight_files import MatchedWeights
from lightning_qat.quantizers.state import QuantizationState
from lightning_qat.schemes import TensorFormat
from lightning_qat.transforms.prepare import qat_layers


class WeightStream:
    """Gives modules of a prepared model their weights, for good or while they run.

    What is outside of blocks and is not quantized is read at once, buffers too: the result holds it anyway.

    Args:
        model: prepared, with parameters on the meta device.
        weights: of the model that it was copied from, whose parameters it shares.
    """

    def __init__(self, model: nn.Module, weights: MatchedWeights) -> None:
        self.model, self._weights = model, weights
        self._owners: dict[int, list[tuple[nn.Module, str]]] = {}
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and id(parameter) in weights.parameters:
                    self._owners.setdefault(id(parameter), []).append((module, name))
        #: Parameters with memory -> ids of those on the meta device that they took the place of.
        self._stands_for: Any = WeakIdKeyDictionary()
        #: Is told of each parameter that was read.
        self.on_read: Callable[[nn.Parameter], None] = lambda parameter: None
        self._held: list[tuple[QuantizedLayer, TensorFormat | None]] = []
        self._fill_buffers()
        for _, layer in qat_layers(model):
            self._renew_input_quantizer(layer)

    def take(self, modules: Iterable[nn.Module]) -> None:
        """Let ``modules`` and what is in them have their weights from now on."""
        self._read(modules)

    @contextlib.contextmanager
    def lending(self, blocks: Sequence[nn.Module]) -> Iterator[None]:
        """Let each of ``blocks``, and each quantized layer outside, have its weights inside for as long as it runs."""
        within = {module for block in blocks for module in block.modules()}
        layers = [layer for _, layer in qat_layers(self.model) if layer not in within and _owns_weight(layer)]
        within.update(module for layer in layers for module in layer.modules())
        self._read_own(module for module in self.model.modules() if module not in within)
        lent: dict[nn.Module, list[nn.Parameter]] = {}

        def lend(module: nn.Module, _args: Any) -> None:
            lent[module] = self._read([module])

        def give_back(module: nn.Module, _args: Any, _output: Any) -> None:
            self._drop(lent.pop(module, []), [module])

        handles = []
        for module in (*blocks, *layers):
            # Before whatever looks at the weights, and whatever ends the forward.
            handles.append(module.register_forward_pre_hook(lend, prepend=True))
            handles.append(module.register_forward_hook(give_back, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for layer, fmt in self._held:
                layer.input_format, layer.training = fmt, False
            self._held = []

    def hold_inputs(self, layers: Iterable[nn.Module]) -> None:
        """Let packed ``layers`` take their inputs in float, as while nothing is packed, until :meth:`lending` ends."""
        for layer in layers:
            if isinstance(layer, QuantizedLayer):
                self._held.append((layer, layer.input_format))
                layer.input_format, layer.training = None, True  # in training no integer kernel is built

    def also(self, parameters: frozenset[int]) -> frozenset[int]:
        """Return ids of parameters with those of the ones that were read in their place."""
        return parameters | {id(read) for read, placed in self._stands_for.items() if placed in parameters}

    def _fill_buffers(self) -> None:
        device = self._weights.files.device
        for module_name, module in self.model.named_modules():
            if isinstance(module, QuantizationState):
                continue
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    whole = f"{module_name}.{name}" if module_name else name
                    module._buffers[name] = self._weights.value(whole, buffer).to(device)

    def _renew_input_quantizer(self, layer: QATLayer) -> None:
        """Make the quantizer of an input, which was made on the meta device, where there is memory."""
        old = layer.input_quantizer
        if old is not None and old.scale.is_meta:
            new = type(old)(old.config, old.name, old.spatial_dims).to(self._weights.files.device)
            layer.input_quantizer = new.train(old.training)

    def _read(self, modules: Iterable[nn.Module]) -> list[nn.Parameter]:
        return self._read_own(dict.fromkeys(part for module in modules for part in module.modules()))

    def _read_own(self, modules: Iterable[nn.Module]) -> list[nn.Parameter]:
        """Read the parameters that ``modules`` own themselves and do not have; return them."""
        modules = list(modules)
        held = (parameter for module in modules for parameter in list(module._parameters.values()))
        read = [self._read_one(p) for p in held if p is not None and id(p) in self._owners]
        for module in modules:
            if isinstance(module, QATLayer):
                weight = weight_now(module)
                if not weight.is_meta:
                    module.weight_quantizer.leave_meta(weight)
        return read

    @torch.no_grad()
    def _read_one(self, placed: nn.Parameter) -> nn.Parameter:
        values = self._weights.value("", placed)
        parameter = nn.Parameter(values, placed.requires_grad)
        for owner, name in self._owners[id(placed)]:
            if owner._parameters.get(name) is placed:  # else it has another one by now, or codes
                setattr(owner, name, parameter)  # recurrent layers keep a list besides
        self._stands_for[parameter] = id(placed)
        self.on_read(parameter)
        return parameter

    def _drop(self, read: Iterable[nn.Parameter], modules: Iterable[nn.Module]) -> None:
        """Let go of parameters that were read."""
        for parameter in read:
            placed = self._stands_for[parameter]
            for owner, name in self._owners[placed]:
                if owner._parameters.get(name) is parameter:
                    setattr(owner, name, self._weights.parameters[placed][0])
        for module in modules:
            for _, layer in qat_layers(module):
                if weight_now(layer).is_meta:
                    layer.weight_quantizer.to("meta")
        return_freed_memory()


def _owns_weight(layer: QATLayer) -> bool:
    """Return whether ``layer`` alone reads its weight: the parts of an attention read that of the attention."""
    return layer._parameters.get("weight") is not None

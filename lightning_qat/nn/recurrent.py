"""Recurrent layers: the weights of LSTM, GRU, RNN and their cells as layers that are called and quantized.

``nn.LSTM`` and its kin read their weights and call no layer. Here each weight is a child that is called for it:
``ih_l0`` for ``weight_ih_l0``, ``hh_l1_reverse`` for ``weight_hh_l1_reverse``, so that whatever works on prepared
layers works on it. A child owns no parameter; they stay with the recurrent layer under their names. PyTorch's own
``forward`` then computes with what the children return: weight-only quantization, inputs and states are in float.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_qat.config import PlanLike
from lightning_qat.nn.layer import QATLayer, QuantizedLayer, make_qat, register_layer, shallow_copy_into, unmake_qat
from lightning_qat.nn.recompute import fake_quantize_again
from lightning_qat.nn.single import single_layer_configs

_PREFIX = "weight_"


class RecurrentWeight(nn.Module):
    """One weight of a recurrent layer, which owns the parameter; called without arguments, it returns the weight.

    Args:
        owner: whose weight it is.
        parameter: its name there.
    """

    owner: nn.Module
    parameter: str

    def __init__(self, owner: nn.Module, parameter: str) -> None:
        super().__init__()
        self.__dict__["owner"] = owner  # no child: it is the parent
        self.parameter = parameter

    @property
    def weight(self) -> Tensor:
        """``[gates * hidden, in_features]``: the parameter of the owner, or its own while it is converted."""
        own: Tensor | None = self._parameters.get("weight")
        return getattr(self.owner, self.parameter) if own is None else own

    def forward(self) -> Tensor:
        """Return the weight to compute with."""
        return self.weight

    def extra_repr(self) -> str:
        return self.parameter


class QATRecurrentWeight(QATLayer, RecurrentWeight):
    """A :class:`RecurrentWeight` that is fake-quantized."""

    float_class = RecurrentWeight
    quantizes_input = False

    def forward(self) -> Tensor:
        return fake_quantize_again(self.weight_quantizer, self.weight)[0]

    def weight_parameters(self) -> list[nn.Parameter]:
        held = self._parameters.get("weight") or self.owner._parameters.get(self.parameter)
        return [] if held is None else [held]


class QuantizedRecurrentWeight(QuantizedLayer, RecurrentWeight):
    """A converted :class:`RecurrentWeight`: it stores codes, and dequantizes them in each call of its owner."""

    float_class = RecurrentWeight
    quantizes_input = False

    def forward(self) -> Tensor:
        return self.weight_in(self.weight_dtype)


register_layer(QATRecurrentWeight, QuantizedRecurrentWeight)


class RecurrentLayer(nn.Module):
    """What prepared and converted recurrent layers share: they call their weights."""

    def weights_now(self) -> dict[str, Tensor]:
        """Return what each weight is computed with, by the name of its parameter."""
        return {child.parameter: child() for child in self.children() if isinstance(child, RecurrentWeight)}


class _Layers(RecurrentLayer):
    """Of ``nn.RNNBase``, whose forward reads a flat list of weights."""

    def forward(self, input: Any, hx: Any = None) -> Any:
        facts: Any = self
        facts._update_flat_weights()
        names, held, weights = facts._flat_weights_names, facts._flat_weights, self.weights_now()
        self.__dict__["_flat_weights"] = [weights.get(n, w) for n, w in zip(names, held, strict=True)]
        try:
            return super().forward(input, hx)
        finally:
            self.__dict__["_flat_weights"] = held


class _Cell(RecurrentLayer):
    """Of ``nn.RNNCellBase``, whose forward reads attributes: those of an instance come before parameters."""

    def forward(self, input: Any, hx: Any = None) -> Any:
        weights = self.weights_now()
        self.__dict__.update(weights)
        try:
            return super().forward(input, hx)
        finally:
            for name in weights:
                del self.__dict__[name]


class _FakeQuantized(RecurrentLayer):
    """A recurrent layer with fake-quantized weights, made from a float one whose parameters it shares.

    Args:
        layer: the float layer, of any arguments.
        config: a config or a preset's name; a channel is one row of one gate. Inputs stay in float.
    """

    def __init__(self, layer: nn.Module, config: PlanLike = "int8") -> None:
        made: Any = self
        if not can_be_split(layer) or not isinstance(self, type(layer)):
            raise ValueError(
                f"{type(self).__name__} is made from an nn.{type(self).__name__.removeprefix('QAT')} that holds its "
                f"weights as parameters, not from a {type(layer).__name__}"
            )
        weight, _ = single_layer_configs(config)
        nn.Module.__init__(self)
        shallow_copy_into(self, layer)
        for name in ("_flat_weights", "_flat_weight_refs"):  # lists that are changed in place
            if name in self.__dict__:
                self.__dict__[name] = list(self.__dict__[name])
        made.__class__ = type(layer)
        split(self)
        for name, child in self.named_children():
            make_qat(child, weight, None, name)
        settle(self)


class QATLSTM(_FakeQuantized, _Layers, nn.LSTM):
    """An ``nn.LSTM`` with fake-quantized weights."""


class QATGRU(_FakeQuantized, _Layers, nn.GRU):
    """An ``nn.GRU`` with fake-quantized weights."""


class QATRNN(_FakeQuantized, _Layers, nn.RNN):
    """An ``nn.RNN`` with fake-quantized weights."""


class QATLSTMCell(_FakeQuantized, _Cell, nn.LSTMCell):
    """An ``nn.LSTMCell`` with fake-quantized weights."""


class QATGRUCell(_FakeQuantized, _Cell, nn.GRUCell):
    """An ``nn.GRUCell`` with fake-quantized weights."""


class QATRNNCell(_FakeQuantized, _Cell, nn.RNNCell):
    """An ``nn.RNNCell`` with fake-quantized weights."""


class QuantizedLSTM(_Layers, nn.LSTM):
    """A converted ``nn.LSTM``: its weights are packed integers."""


class QuantizedGRU(_Layers, nn.GRU):
    """A converted ``nn.GRU``: its weights are packed integers."""


class QuantizedRNN(_Layers, nn.RNN):
    """A converted ``nn.RNN``: its weights are packed integers."""


class QuantizedLSTMCell(_Cell, nn.LSTMCell):
    """A converted ``nn.LSTMCell``: its weights are packed integers."""


class QuantizedGRUCell(_Cell, nn.GRUCell):
    """A converted ``nn.GRUCell``: its weights are packed integers."""


class QuantizedRNNCell(_Cell, nn.RNNCell):
    """A converted ``nn.RNNCell``: its weights are packed integers."""


#: Float class -> prepared and converted class.
RECURRENT_CLASSES: dict[type[nn.Module], tuple[type[nn.Module], type[nn.Module]]] = {
    nn.LSTM: (QATLSTM, QuantizedLSTM),
    nn.GRU: (QATGRU, QuantizedGRU),
    nn.RNN: (QATRNN, QuantizedRNN),
    nn.LSTMCell: (QATLSTMCell, QuantizedLSTMCell),
    nn.GRUCell: (QATGRUCell, QuantizedGRUCell),
    nn.RNNCell: (QATRNNCell, QuantizedRNNCell),
}


def float_recurrent(module: nn.Module) -> type[nn.Module]:
    """Return the class that a split or converted recurrent layer had."""
    return next(base for base, classes in RECURRENT_CLASSES.items() if type(module) in classes)


def _weight_names(module: nn.Module) -> list[str]:
    return [name for name in module._parameters if name.startswith(_PREFIX)]


def can_be_split(module: nn.Module) -> bool:
    """Return whether ``module`` is a recurrent layer whose weights can be called as layers.

    A subclass may have a ``forward`` of its own, and pruning and parametrizations compute the weights it reads.
    """
    if type(module) not in RECURRENT_CLASSES:
        return False
    wanted = {name for name in getattr(module, "_flat_weights_names", ("weight_ih", "weight_hh")) if _PREFIX in name}
    return wanted <= set(_weight_names(module))


def split(module: nn.Module) -> None:
    """Let a recurrent layer call its weights, in place; they are in float. Undone by :func:`merge`."""
    module.__class__ = RECURRENT_CLASSES[type(module)][0]
    for name in _weight_names(module):
        module.register_module(name.removeprefix(_PREFIX), RecurrentWeight(module, name))


def weights_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return the weights of every recurrent layer of ``model`` that is not split, by the names they would have."""
    return {
        f"{name}.{parameter.removeprefix(_PREFIX)}".lstrip("."): RecurrentWeight(module, parameter)
        for name, module in model.named_modules()
        if can_be_split(module)
        for parameter in _weight_names(module)
    }


def merge(module: nn.Module) -> None:
    """Turn a split recurrent layer back into the one it was, in place."""
    for name, child in list(module.named_children()):
        if isinstance(child, QATLayer):
            unmake_qat(child)
        if isinstance(child, RecurrentWeight):
            del module._modules[name]
    module.__class__ = float_recurrent(module)


def settle(module: nn.Module) -> None:
    """Decide what is known of the prepared weights: no BatchNorm and no single layer reads them."""
    for child in module.children():
        if isinstance(child, QATLayer):
            child.weight_quantizer.folded_norm, child.weight_quantizer.feeds_one_layer = "", False


def prepared_names(module: nn.Module) -> list[str]:
    """Return the parameters of a split recurrent layer that are fake-quantized."""
    return [child.parameter for child in module.children() if isinstance(child, QATRecurrentWeight)]


@torch.no_grad()
def own_weights(module: nn.Module, names: list[str]) -> None:
    """Let the children of a split recurrent layer own these of its weights, in place; it keeps none of them.

    It is then what conversion works on.
    """
    for name in names:
        child: Any = getattr(module, name.removeprefix(_PREFIX))
        child._parameters["weight"] = nn.Parameter(child.weight.detach().clone(), requires_grad=False)
        module._parameters[name] = None
    module.__class__ = RECURRENT_CLASSES[float_recurrent(module)][1]
    if isinstance(module, nn.RNNBase):
        module._init_flat_weights()

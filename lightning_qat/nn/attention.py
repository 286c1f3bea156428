"""Attention: the projections of ``nn.MultiheadAttention`` as layers that are called and quantized.

``nn.MultiheadAttention`` reads its weights and calls no layer. Here its three input projections are child layers
``q_proj``, ``k_proj`` and ``v_proj`` beside ``out_proj``, so that whatever works on prepared layers works on them.
They own no parameter: they are views of ``in_proj_weight``, or of the weights of other ``kdim`` and ``vdim``, which
stay with the attention under their names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_qat.config import PlanLike
from lightning_qat.nn.attention_core import CalledProjections
from lightning_qat.nn.layer import LAYER_CLASSES, QATLayer, make_qat, shallow_copy_into, unmake_qat
from lightning_qat.nn.linear import QATLinear, QuantizedLinear
from lightning_qat.nn.recompute import LayerFunction, fake_quantize_again, made_again_in_backward
from lightning_qat.nn.recurrent import RecurrentLayer, prepared_names
from lightning_qat.nn.single import single_layer_configs
from lightning_qat.quantizers.fake_quantizer import ActivationQuantizer

#: The children that project query, key and value, in the order of the rows of ``in_proj_weight``.
INPUT_PROJECTIONS = ("q_proj", "k_proj", "v_proj")
PROJECTIONS = (*INPUT_PROJECTIONS, "out_proj")
_PACKED = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias")

#: A fake-quantized input, and how to make it again.
_Made = tuple[Tensor, Any]


class Projection(nn.Linear):
    """One of the three input projections of an attention, which owns the parameters: a view of them.

    Args:
        attention: whose projection it is.
        part: 0 for the query's, 1 for the key's, 2 for the value's.
    """

    attention: nn.MultiheadAttention  # its class does not say that weights may be None
    part: int

    def __init__(self, attention: nn.MultiheadAttention, part: int) -> None:
        nn.Module.__init__(self)
        self.__dict__["attention"] = attention  # no child: it is the parent
        self.part = part
        self.in_features = (attention.embed_dim, attention.kdim, attention.vdim)[part]
        self.out_features = attention.embed_dim

    def _rows(self, packed: Tensor) -> Tensor:
        return packed[self.part * self.out_features : (self.part + 1) * self.out_features]

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """``[embed_dim, in_features]``; a parameter itself where kdim or vdim differ from embed_dim."""
        packed: Tensor | None = self.attention.in_proj_weight
        if packed is not None:
            return self._rows(packed)
        separate: Tensor = getattr(self.attention, f"{INPUT_PROJECTIONS[self.part]}_weight")
        return separate

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        """``[embed_dim]``."""
        packed: Tensor | None = self.attention.in_proj_bias
        return None if packed is None else self._rows(packed)


class SharedInput(ActivationQuantizer):
    """Quantizes the input of one projection, once for all that are given the same tensor.

    Attributes:
        alone: it was once given a tensor of its own, so its range may be another than its neighbour's.
    """

    alone: bool = False

    def get_extra_state(self) -> dict[str, Any]:
        return {**super().get_extra_state(), "alone": self.alone}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        super().set_extra_state(state)
        self.alone = bool(state.get("alone", True))

    def _phase(self) -> tuple[Any, ...]:
        flags = (self.quantizing, self.observing, self.frozen, self.calibrating, self.deferred, self.training)
        return self.format, self.calibrated, self.samples.most, *flags

    def follows(self, leader: SharedInput) -> bool:
        """Return whether it has seen what ``leader`` has seen, and would do the same: no tensor is compared."""
        learned = any(True for quantizer in (self, leader) for _ in quantizer.parameters())
        if self.alone or learned or self.config != leader.config or self._phase() != leader._phase():
            self.alone = True
            return False
        return self.debug_callback is None and leader.debug_callback is None  # those want to see every call

    def observes_now(self) -> bool:
        """Return whether the next input moves its range."""
        return self._observes_now()

    @torch.no_grad()
    def take_over(self, leader: SharedInput) -> None:
        """Know what ``leader`` has just learned, instead of looking at the same tensor again."""
        for mine, its in zip(self.buffers(), leader.buffers(), strict=True):
            mine.copy_(its)
        self.calibrated, self.samples.seen = leader.calibrated, leader.samples.seen
        self.batch_range.low.copy_(leader.batch_range.low)
        self.batch_range.high.copy_(leader.batch_range.high)
        self.batch_range.used = leader.batch_range.used


class QATProjection(QATLinear, Projection):
    """A :class:`Projection` with fake-quantized weight and input."""

    float_class = Projection  # type: ignore[assignment]
    input_quantizer_class = SharedInput
    #: The input of the next call, where it is fake-quantized already.
    given: _Made | None = None

    def compute(self, x: Tensor, function: LayerFunction) -> Tensor:
        made, self.given = self.given, None
        if made is None:
            return super().compute(x, function)
        weight = fake_quantize_again(self.weight_quantizer, self._joined_weight(x))
        with made_again_in_backward(made, weight):
            return function(made[0], weight[0])

    def weight_parameters(self) -> list[nn.Parameter]:
        held = self.attention._parameters
        names = ("in_proj_weight", f"{INPUT_PROJECTIONS[self.part]}_weight")
        return [p for name in names if (p := held.get(name)) is not None]


def _in_float(layer: nn.Module) -> bool:
    """Return whether ``layer`` is in float, or in a phase that leaves its weight and input there."""
    if not isinstance(layer, QATLayer):
        return True
    quantizer = layer.input_quantizer
    in_float = quantizer is None or not quantizer.quantizing or quantizer.calibrating
    return in_float and not layer.weight_quantizer.quantizing


LAYER_CLASSES[Projection] = (QATProjection, QuantizedLinear)


class QATMultiheadAttention(CalledProjections):
    """An ``nn.MultiheadAttention`` whose four projections have fake-quantized weights and inputs.

    It shares the parameters of the attention that it is made from. Each of query, key and value has a range of its
    own; where they are the same tensor it is observed and quantized once. In a float phase the result is that of
    ``nn.MultiheadAttention``, bit for bit.

    The products of queries with keys and of probabilities with values are in float, unless the attention's attribute
    ``quantize_products`` is True: then both sides of each are quantized, to as many bits as the activations (8 where
    these are in float), with ranges found at run time for each row that is summed over. In a model that ``prepare``
    is given, set ``attention.quantize_products = True`` on the ``nn.MultiheadAttention``.

    Args:
        attention: the float module, of any arguments.
        config: a config or a preset's name.
        quantize_activations: False is weight-only.
        quantize_products: see above; None is what the attention says.

    Raises:
        ValueError: ``attention`` is something else, a subclass included: it may have a ``forward`` of its own.
    """

    #: An attribute that the float module may have.
    quantize_products: bool = False
    #: Call the projections in a float phase too: somebody watches what they are given.
    calls_projections: bool = False

    def __init__(
        self,
        attention: nn.MultiheadAttention,
        config: PlanLike = "int8",
        quantize_activations: bool = True,
        quantize_products: bool | None = None,
    ) -> None:
        if not can_be_split(attention):
            raise ValueError(
                f"QATMultiheadAttention is made from an nn.MultiheadAttention that holds its weights as parameters, "
                f"not from a {type(attention).__name__}"
            )
        weight, activation = single_layer_configs(config)
        nn.Module.__init__(self)
        shallow_copy_into(self, attention)
        out_proj = attention.out_proj
        self.out_proj = type(out_proj).__new__(type(out_proj))
        shallow_copy_into(self.out_proj, out_proj)
        if quantize_products is not None:
            self.quantize_products = quantize_products
        split(self)
        for name in PROJECTIONS:
            make_qat(getattr(self, name), weight, activation if quantize_activations else None, name)
        settle(self)

    def _product_bits(self) -> int | None:
        if not self.quantize_products or all(_in_float(layer) for layer in self.children()):
            return None
        return self.planned_product_bits()

    def planned_product_bits(self) -> int | None:
        """Return the bits of the products outside of a float phase; None is float."""
        if not self.quantize_products:
            return None
        quantizers: list[Any] = [getattr(layer, "input_quantizer", None) for layer in self.children()]
        return next((quantizer.bits for quantizer in quantizers if quantizer is not None), 8)

    def _project(self, query: Tensor, key: Tensor, value: Tensor, packed: bool) -> tuple[Tensor, Tensor, Tensor]:
        layers: list[Any] = [getattr(self, name) for name in INPUT_PROJECTIONS]
        q_proj, k_proj, v_proj = layers
        if not all(_in_float(layer) for layer in layers):  # in a float phase another layout would round otherwise
            query, key, value = _laid_out(query, key, value)
        k_follows = _follows(k_proj, q_proj, key is query)
        v_follows = _follows(v_proj, k_proj, value is key)
        observes = k_follows or v_follows
        observes = observes and (q_proj if k_follows else k_proj).input_quantizer.observes_now()
        q = _make(q_proj, query)
        k = q if k_follows else _make(k_proj, key)
        v = k if v_follows else _make(v_proj, value)
        if observes and k_follows:
            k_proj.input_quantizer.take_over(q_proj.input_quantizer)
        if observes and v_follows:
            v_proj.input_quantizer.take_over(k_proj.input_quantizer)
        packs = packed and not self.calls_projections
        if packs and all(_in_float(layer) for layer in layers) and self.in_proj_weight is not None:
            return _project_packed(query, key, _joined(self.in_proj_weight, layers), self.in_proj_bias)
        for layer, made in zip(layers, (q, k, v), strict=True):
            if isinstance(layer, QATProjection):
                layer.given = made
        return q_proj(query), k_proj(key), v_proj(value)


def _laid_out(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the inputs as matrix products read them; the same tensors stay the same object.

    Each product would make, and keep, a copy of its own of what is fake-quantized in another layout.
    """
    q = query.contiguous()
    k = q if key is query else key.contiguous()
    return q, k, k if value is key else value.contiguous()


def _follows(layer: Any, leader: Any, same_tensor: bool) -> bool:
    """Return whether ``layer`` is given what ``leader`` is given, fake-quantized in the same way."""
    quantizer, its = (getattr(each, "input_quantizer", None) for each in (layer, leader))
    if quantizer is None:
        return False
    if not same_tensor or its is None:
        quantizer.alone = True
        return False
    follows: bool = quantizer.follows(its)
    return follows


def _make(layer: Any, x: Tensor) -> _Made:
    return fake_quantize_again(getattr(layer, "input_quantizer", None), x)


def _joined(weight: Tensor, layers: list[Any]) -> Tensor:
    """Return ``weight`` with the learned scales of ``layers`` in its graph, where ranks wait for these."""
    for layer in layers:
        for quantizer in (getattr(layer, name, None) for name in ("weight_quantizer", "input_quantizer")):
            weight = weight if quantizer is None else quantizer.joined(weight)
    return weight


def _project_packed(query: Tensor, key: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Project as PyTorch does where key and value are the same: another matrix product would round otherwise."""
    features = weight.shape[1]
    if query is key:
        q, k, v = _apart(F.linear(query, weight, bias), 3)
        return q, k, v
    q_weight, kv_weight = weight.split([features, 2 * features])
    q_bias, kv_bias = (None, None) if bias is None else bias.split([features, 2 * features])
    k, v = _apart(F.linear(key, kv_weight, kv_bias), 2)
    return F.linear(query, q_weight, q_bias), k, v


def _apart(x: Tensor, parts: int) -> Tensor:
    """Return ``[parts, L, N, E]`` of ``[L, N, parts * E]``."""
    return x.unflatten(-1, (parts, -1)).unsqueeze(0).transpose(0, -2).squeeze(-2).contiguous()


class QuantizedMultiheadAttention(CalledProjections):
    """A converted ``nn.MultiheadAttention``: four ``QuantizedLinear`` children instead of float weights.

    Attributes:
        product_bits: of both sides of the two products; None is float.
    """

    product_bits: int | None

    def _product_bits(self) -> int | None:
        return self.product_bits

    def _project(self, query: Tensor, key: Tensor, value: Tensor, packed: bool) -> tuple[Tensor, Tensor, Tensor]:
        layers: Any = self
        return layers.q_proj(query), layers.k_proj(key), layers.v_proj(value)


def can_be_split(module: nn.Module) -> bool:
    """Return whether ``module`` is an attention whose projections can be called as layers.

    A subclass may have a ``forward`` of its own, and pruning and parametrizations compute the weights it reads.
    """
    if type(module) is not nn.MultiheadAttention:
        return False
    names = ("in_proj_weight",) if module._qkv_same_embed_dim else tuple(f"{name}_weight" for name in INPUT_PROJECTIONS)
    return all(isinstance(module._parameters.get(name), nn.Parameter) for name in names)


def split(attention: nn.MultiheadAttention) -> None:
    """Let an ``nn.MultiheadAttention`` call its projections, in place; they are in float. Undone by :func:`merge`."""
    attention.__class__ = QATMultiheadAttention
    for part, name in enumerate(INPUT_PROJECTIONS):
        attention.register_module(name, Projection(attention, part))
    attention._modules["out_proj"] = attention._modules.pop("out_proj")  # last, as it is called


def projections_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return the input projections of every attention of ``model`` that is not split, by the names they would have."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention) and can_be_split(module):
            prefix = f"{name}." if name else ""
            found |= {f"{prefix}{part}": Projection(module, i) for i, part in enumerate(INPUT_PROJECTIONS)}
    return found


def merge(attention: nn.MultiheadAttention) -> None:
    """Turn a split attention back into the ``nn.MultiheadAttention`` it was, in place."""
    for name in PROJECTIONS:
        layer = getattr(attention, name)
        if isinstance(layer, QATLayer):
            unmake_qat(layer)
    for name in INPUT_PROJECTIONS:
        del attention._modules[name]
    attention.__class__ = nn.MultiheadAttention


def settle(attention: nn.MultiheadAttention) -> None:
    """Decide what is known of the prepared projections: no BatchNorm and no single layer reads their outputs."""
    for name in PROJECTIONS:
        layer = getattr(attention, name)
        if isinstance(layer, QATLayer):
            layer.weight_quantizer.folded_norm, layer.weight_quantizer.feeds_one_layer = "", False


def tensors_of(module: nn.Module) -> dict[str, Tensor | None]:
    """Return the parameters and buffers of ``module`` under the names that they have once it is converted."""
    if type(module) is Projection:
        return {"weight": module.weight, "bias": module.bias}
    gone: Sequence[str] = _PACKED if isinstance(module, QATMultiheadAttention) else ()
    gone = prepared_names(module) if isinstance(module, RecurrentLayer) else gone
    return {k: v for k, v in (module._parameters | module._buffers).items() if k not in gone}


@torch.no_grad()
def own_projections(attention: nn.MultiheadAttention, product_bits: int | None) -> None:
    """Let the projections of a split attention own their parts of its weights, in place; it keeps none.

    It is then what conversion works on: prepared projections are plain :class:`QATLinear`, others ``nn.Linear``.
    """
    facts: Any = attention
    for name in INPUT_PROJECTIONS:
        layer: Any = getattr(attention, name)
        weight, bias = layer.weight.detach().clone(), layer.bias
        layer.__class__ = QATLinear if isinstance(layer, QATLayer) else nn.Linear
        for attribute in ("attention", "part", "given"):
            layer.__dict__.pop(attribute, None)
        layer._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
        layer._parameters["bias"] = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
    for name in _PACKED:
        attention._parameters[name] = None
    attention.__class__ = QuantizedMultiheadAttention
    facts.product_bits = product_bits

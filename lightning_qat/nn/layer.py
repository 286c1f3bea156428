"""What all quantized layers share: a float layer takes on another class and keeps everything else.

A prepared layer is the user's own module object with its class changed, as
``torch.nn.utils.parametrize`` does: parameters, names, hooks, references held elsewhere and layers
shared by two parents stay as they are.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_qat.config import QuantizationConfig
from lightning_qat.nn.computed_weight import weight_now
from lightning_qat.nn.execution import KernelCache, reference_reason
from lightning_qat.nn.own_names import GivingWay, check_names
from lightning_qat.nn.packed_weight import float_weight, with_float_weight
from lightning_qat.nn.recompute import LayerFunction, fake_quantize_again, made_again_in_backward
from lightning_qat.quantizers.fake_quantizer import ActivationQuantizer, dynamic_parameters
from lightning_qat.quantizers.input_arrangement import ARRANGEMENT, arranged
from lightning_qat.quantizers.state import KeepsDtype
from lightning_qat.quantizers.weight_quantizer import WeightQuantizer
from lightning_qat.schemes import TensorFormat, blocks_end_with_rows, get_scheme


class _Adopting(nn.Module):
    """A class that float layers can take on; ones made for a user's subclass still pickle."""

    float_class: ClassVar[type[nn.Module]]
    channel_axis: ClassVar[int] = 0
    spatial_dims: ClassVar[int | None] = None
    quantizes_input: ClassVar[bool] = True
    input_quantizer_class: ClassVar[type[ActivationQuantizer]] = ActivationQuantizer
    #: The library's class and the user's, for a class made at run time.
    made_from: ClassVar[tuple[type, type] | None] = None

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self.made_from is None:
            return super().__reduce_ex__(protocol)
        return _new_like, self.made_from, self.__dict__


class QATLayer(_Adopting):
    """A float layer whose weight and input are fake-quantized.

    Attributes:
        weight_quantizer: of the weight.
        input_quantizer: of the input, or None for weight-only.
    """

    weight: Tensor
    weight_quantizer: WeightQuantizer
    input_quantizer: ActivationQuantizer | None

    def quantized_weight(self) -> Tensor:
        """Return the fake-quantized weight."""
        return self.weight_quantizer(self.weight)

    def quantized_input(self, x: Tensor) -> Tensor:
        """Return the fake-quantized input."""
        x = self.weight_quantizer.arranged(x)
        return x if self.input_quantizer is None else self.input_quantizer(x)

    def compute(self, x: Tensor, function: LayerFunction) -> Tensor:
        """Return ``function`` of the fake-quantized input and weight."""
        x = self.weight_quantizer.arranged(x)
        quantized_x = fake_quantize_again(self.input_quantizer, x)
        quantized_weight = fake_quantize_again(self.weight_quantizer, self._joined_weight(x))
        with made_again_in_backward(quantized_x, quantized_weight):
            return function(quantized_x[0], quantized_weight[0])

    def _joined_weight(self, x: Tensor) -> Tensor:
        """Return the weight, with the input's learned scale in its graph where ranks wait for it and ``x`` has none."""
        quantizer = self.input_quantizer
        if quantizer is None or quantizer.learned is None or quantizer.learns_from(x):
            return self.weight
        return quantizer.learned.joined(self.weight)

    def weight_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that the weight is, is computed from, or is a part of."""
        own = self._parameters.get("weight")
        if own is not None:
            return [own]
        quantizers = {
            id(p) for m in (self.weight_quantizer, self.input_quantizer) if m is not None for p in m.parameters()
        }
        return [p for p in self.parameters() if id(p) not in quantizers and p is not self._parameters.get("bias")]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # A weight that comes without an arrangement multiplies the input as it comes.
        arranges = any(f"{prefix}weight_quantizer.{name}" in state_dict for name in ARRANGEMENT)
        if f"{prefix}weight" in state_dict and not arranges:
            self.weight_quantizer.arrange_input(None, None)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def weight_codes(self) -> Tensor:
        """Return the integer codes of the weight as it is now, in its shape."""
        return self.weight_quantizer.codes(self.weight)


class QuantizedLayer(_Adopting, KeepsDtype):
    """A converted layer: packed integers instead of a float weight.

    Attributes:
        weight_packed: codes as the scheme stores them.
        weight_scale, weight_zero_point: one for each tensor, channel, group or block; a nested scale is codes, with
            ``weight_scale_absmax`` and ``weight_scale_offset``. :attr:`scale` is what they stand for.
        input_scale, input_zero_point: of a calibrated input; None for weight-only and dynamic ranges.
        input_order, input_factor: what is done to the input before all else, see
            :func:`lightning_qat.quantizers.input_arrangement.arranged`; None for most layers.
        weight_format, input_format: how to read them.
        weight_shape, weight_dtype: of the float weight.
        feeds_one_layer: the output is read by one quantized layer alone, through clamping, max pooling and flattening
            at most, so it may be computed straight to that layer's codes (:mod:`lightning_qat.nn.region`).
    """

    feeds_one_layer: bool = False
    weight_packed: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor
    input_scale: Tensor | None
    input_zero_point: Tensor | None
    input_order: Tensor | None
    input_factor: Tensor | None
    weight_format: TensorFormat
    input_format: TensorFormat | None
    weight_shape: torch.Size
    weight_dtype: torch.dtype
    #: Not state: what an integer kernel needs, packed on the first forward pass in evaluation.
    kernel_cache: KernelCache

    @property
    def execution(self) -> str:
        """The arithmetic of a plain forward pass as the layer stands: a kernel's name, or the reference and why.

        Such as ``"onednn int8"``, ``"onednn int8, codes out"``, ``"onednn int8 per token"`` or ``"reference: per
        sample"``. Some calls take the reference path all the same, see :mod:`lightning_qat.nn.execution`.
        """
        reason = reference_reason(self)
        return f"reference: {reason}" if reason is not None else self._integer_execution()

    def _integer_execution(self) -> str:
        """Return :attr:`execution` where the formats would do."""
        return "reference: no integer kernel for this layer"

    @property
    def codes(self) -> Tensor:
        """The integer codes, in the shape of the float weight."""
        return get_scheme(self.weight_format.scheme).unpack(self.weight_packed, self.weight_shape, self.weight_format)

    def held_scale(self) -> Tensor:
        """Return the weight's scale that values are computed with; ``scale`` where the layer has none of its own."""
        start = "weight_scale"
        stored = {name.removeprefix(start): t for name, t in self._buffers.items() if name.startswith(start)}
        return get_scheme(self.weight_format.scheme).read_scale(stored, self.weight_format)  # type: ignore[arg-type]

    scale: Any = GivingWay(held_scale)

    def weight_in(self, dtype: torch.dtype) -> Tensor:
        """Return the weight that the codes stand for, computed in every call: no float copy is kept."""
        held = (self.weight_packed, self.held_scale(), self.weight_zero_point, self.weight_shape, self.weight_format)
        return get_scheme(self.weight_format.scheme).dequantize_packed(*held, dtype)

    weight: Any = property(float_weight)

    def arranged_input(self, x: Tensor) -> Tensor:
        """Return ``x`` as the columns of the weight multiply it, in float."""
        buffers = self._buffers  # found without asking for an attribute, which costs a small layer its time
        order, factor = buffers["input_order"], buffers["input_factor"]
        return x if order is None and factor is None else arranged(x, order, factor)

    def quantized_input(self, x: Tensor) -> Tensor:
        """Return ``x`` as the layer computes with it: arranged, on the grid that it was trained with."""
        return self.on_grid(self.arranged_input(x))

    def on_grid(self, x: Tensor) -> Tensor:
        """Return an arranged input on its grid."""
        fmt = self.input_format
        if fmt is None or not x.numel():
            return x
        scheme = get_scheme(fmt.scheme)
        if fmt.dynamic:
            return scheme.fake_quantize(x, *dynamic_parameters(x, fmt, self.spatial_dims))
        return scheme.fake_quantize(x, self.input_scale, self.input_zero_point, fmt)  # type: ignore[arg-type]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)
        self.kernel_cache.clear()
        # The scales keep their dtype; what is computed from them follows ``model.half()``.
        self.weight_dtype = fn(torch.empty(0, dtype=self.weight_dtype)).dtype
        return self

    def extra_repr(self) -> str:
        fmt = self.weight_format
        facts = f"{tuple(self.weight_shape)}, {fmt.scheme}, bits={fmt.bits}, input={self.input_format}"
        kept = [name for name in ARRANGEMENT if self._buffers[name] is not None]
        return ", ".join([facts, *kept, self.execution])


class _OwnForward(QATLayer):
    """For a subclass with a ``forward`` of its own: the weight and the input are replaced around it."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = _replace_input(self.quantized_input, args, kwargs)
        with _weight_replaced(self, self.quantized_weight()):
            return super().forward(*args, **kwargs)


class _QuantizedOwnForward(QuantizedLayer):
    """As :class:`_OwnForward`, converted: it stores codes and dequantizes."""

    def _integer_execution(self) -> str:
        return "reference: a forward of its own"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = _replace_input(self.quantized_input, args, kwargs)
        forward = super().forward
        if torch.compiler.is_compiling():
            return forward(*args, **kwargs)

        def with_weight(weight: Tensor) -> Any:
            with _weight_replaced(self, weight):
                return forward(*args, **kwargs)

        return with_float_weight(self, (*args, *kwargs.values()), with_weight)


def _replace_input(
    quantize: Callable[[Tensor], Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Quantize the first floating tensor among the arguments."""
    for i, value in enumerate(args):
        if isinstance(value, Tensor) and value.is_floating_point():
            return (*args[:i], quantize(value), *args[i + 1 :]), kwargs
    for key, value in kwargs.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            return args, {**kwargs, key: quantize(value)}
    return args, kwargs


@contextlib.contextmanager
def _weight_replaced(module: nn.Module, value: Tensor) -> Iterator[None]:
    """Let ``module.weight`` be ``value``: an instance attribute comes before a registered parameter."""
    before = module.__dict__.get("weight")
    module.__dict__["weight"] = value
    try:
        yield
    finally:
        module.__dict__.pop("weight", None)  # which another thread may have done
        if before is not None and isinstance(module, QATLayer):  # pruning keeps its masked weight there
            module.__dict__["weight"] = before


#: Registry of float layer class -> (QAT class, quantized class).
LAYER_CLASSES: dict[type[nn.Module], tuple[type[QATLayer], type[QuantizedLayer]]] = {}


def register_layer(qat_class: type[QATLayer], quantized_class: type[QuantizedLayer]) -> None:
    """Let layers of ``qat_class.float_class`` and of its subclasses be quantized."""
    LAYER_CLASSES[qat_class.float_class] = (qat_class, quantized_class)


def supported_class(layer_type: type[nn.Module]) -> type[nn.Module] | None:
    """Return the registered float class that ``layer_type`` is or derives from."""
    return next((base for base in layer_type.__mro__ if base in LAYER_CLASSES), None)


#: Registry of (library class, user's class) -> the class made of both.
_MADE: dict[tuple[type, type], type[nn.Module]] = {}


def _made_class(library_class: type[_Adopting], user_class: type[nn.Module]) -> type[nn.Module]:
    made_from = (library_class, user_class)
    if made_from not in _MADE:
        facts = LAYER_CLASSES[supported_class(user_class)][0]  # type: ignore[index]
        names = ("float_class", "channel_axis", "spatial_dims", "quantizes_input")
        attributes: dict[str, Any] = {name: getattr(facts, name) for name in names}
        name = f"{library_class.__name__.lstrip('_')}_{user_class.__name__}"
        _MADE[made_from] = type(name, made_from, {**attributes, "made_from": made_from})
    return _MADE[made_from]


def _new_like(library_class: type[_Adopting], user_class: type[nn.Module]) -> nn.Module:
    made = _made_class(library_class, user_class)
    return made.__new__(made)


def _class_for(layer_type: type[nn.Module], *, quantized: bool) -> type[nn.Module]:
    """Return the class that a layer of ``layer_type`` takes on."""
    base = supported_class(layer_type)
    if base is None:
        known = ", ".join(t.__name__ for t in LAYER_CLASSES)
        raise ValueError(f"a layer of type {layer_type.__name__} cannot be quantized; these can: {known}")
    library_class: type[_Adopting] = LAYER_CLASSES[base][int(quantized)]
    if layer_type is base:
        return library_class
    if layer_type.forward is not base.forward:
        library_class = _QuantizedOwnForward if quantized else _OwnForward
    return _made_class(library_class, layer_type)


def float_type(layer: nn.Module) -> type[nn.Module]:
    """Return the class that ``layer`` had before it was prepared or converted."""
    if isinstance(layer, _Adopting):
        return layer.made_from[1] if layer.made_from is not None else layer.float_class
    return type(layer)


def make_qat(layer: nn.Module, weight: QuantizationConfig, activation: QuantizationConfig | None, name: str) -> None:
    """Turn a float layer into its fake-quantized counterpart, in place.

    Args:
        layer: of a registered class, or of a subclass of one.
        weight: how its weight is quantized.
        activation: how its input is quantized; None means weight-only.
        name: of the layer, for messages.
    """
    qat_class = _class_for(type(layer), quantized=False)
    facts: Any = qat_class
    check_names(layer, name, facts.float_class, LAYER_CLASSES[facts.float_class])
    tensor: Any = weight_now(layer)
    if is_lazy(tensor):
        raise ValueError(f"layer {name!r} is lazy and has no weight yet; run one batch through the model first")
    if issubclass(qat_class, _OwnForward) and isinstance(getattr(type(layer), "weight", None), property):
        raise ValueError(
            f"layer {name!r} has a forward of its own and a parametrized weight, which cannot be quantized "
            f"together; leave it in float with LayerRule({name!r})"
        )
    if activation is not None and activation.scheme == "llm_int8" and facts.spatial_dims is not None:
        activation = None  # tokens have outliers in columns; images do not
    weight_quantizer = WeightQuantizer(weight, tensor, name, facts.channel_axis)
    if issubclass(qat_class, nn.Embedding) and not blocks_end_with_rows(tensor.shape, weight_quantizer.format):
        raise ValueError(
            f"layer {name!r} looks single rows up, so blocks have to divide a row of {tensor.shape[1]} and scales "
            f"cannot be nested: {weight_quantizer.extra_repr()}; use a group_size that divides it, without nesting"
        )
    input_quantizer = None
    if activation is not None and facts.quantizes_input:
        input_quantizer = facts.input_quantizer_class(activation, name, facts.spatial_dims).to(tensor.device)
    layer.__class__ = qat_class
    layer.register_module("weight_quantizer", weight_quantizer)
    layer.register_module("input_quantizer", input_quantizer)
    for quantizer in (weight_quantizer, input_quantizer):
        if quantizer is not None:
            quantizer.train(layer.training)


def shallow_copy_into(target: nn.Module, layer: nn.Module) -> None:
    """Give ``target`` the parameters, buffers, hooks and attributes of ``layer``; the tensors are shared."""
    for key, value in layer.__dict__.items():
        target.__dict__[key] = copy.copy(value) if isinstance(value, dict) else value


def make_quantized(
    layer: nn.Module,
    weight_format: TensorFormat,
    input_format: TensorFormat | None,
    tensors: dict[str, Tensor | None],
    weight_shape: torch.Size,
    weight_dtype: torch.dtype,
    *,
    feeds_one_layer: bool = False,
) -> None:
    """Turn a float layer into its converted counterpart, in place.

    Args:
        layer: a float layer (not a prepared one).
        weight_format: how to read the weight's tensors.
        input_format: how to read the input's; None means weight-only.
        tensors: ``weight_packed``, ``weight_scale``, ``weight_zero_point``, ``input_scale``, ``input_zero_point``, what
            else the scheme stores of a scale, and ``input_order`` and ``input_factor`` where there are any.
        weight_shape: of the float weight.
        weight_dtype: of the float weight.
        feeds_one_layer: see :class:`QuantizedLayer`.
    """
    quantized_class = _class_for(type(layer), quantized=True)
    for holder in (layer._parameters, layer._buffers, layer.__dict__):
        holder.pop("weight", None)
    layer.__class__ = quantized_class
    for name, tensor in (dict.fromkeys(ARRANGEMENT) | tensors).items():
        layer.register_buffer(name, tensor)
    facts: Any = layer
    facts.weight_format, facts.input_format = weight_format, input_format
    facts.weight_shape, facts.weight_dtype = torch.Size(weight_shape), weight_dtype
    facts.kernel_cache, facts.feeds_one_layer = KernelCache(), feeds_one_layer
    bias = layer._parameters.get("bias")
    if bias is not None and bias.requires_grad:  # another model may have the very parameter, and train on
        layer._parameters["bias"] = nn.Parameter(bias.detach(), requires_grad=False)


def unmake_qat(layer: QATLayer) -> None:
    """Turn a prepared layer back into the float layer it was, in place."""
    layer.__class__ = float_type(layer)  # type: ignore[assignment]
    del layer._modules["weight_quantizer"], layer._modules["input_quantizer"]

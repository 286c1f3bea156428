"""The float weight of a converted layer, made from its codes: for one product, and again for the backward pass.

What trains through packed weights (low-rank adapters, soft prompts, an input that is searched for) needs the gradient
of the layer's input, for which a product keeps its weight: all layers together, the float model that packing saved.
Here only how to make it again is kept, as QLoRA does (Dettmers et al. 2023).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lightning_qat.nn.recompute import has_memory_of_its_own, made_again_in_backward

if TYPE_CHECKING:
    from lightning_qat.nn.layer import QuantizedLayer

#: What ends like an operation in place and changes no value.
_CHANGES_NOTHING = ("requires_grad_", "detach_", "share_memory_")
#: What is known of a weight that is not made. T5 asks for its dtype three times in each call of a layer.
_KNOWN = {
    *(getattr(Tensor, name).__get__ for name in ("dtype", "device", "shape", "ndim", "layout", "requires_grad")),
    *(getattr(Tensor, name).__get__ for name in ("is_cuda", "is_meta", "is_sparse", "is_quantized", "is_leaf")),
    *(getattr(Tensor, name).__get__ for name in ("grad", "_base")),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.nelement, Tensor.ndimension, Tensor.element_size, Tensor.__len__),
    *(Tensor.is_floating_point, Tensor.is_complex, Tensor.get_device, Tensor._is_view),
}


class ComputedWeight(Tensor):
    """A converted layer's weight as others read it; what is written to it would be lost, so that raises.

    So it is with views of it. Results of operations are plain tensors.
    """

    of_layer: str

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {} if kwargs is None else kwargs
        first = args[0] if args else kwargs.get("tensor")  # as torch.nn.init names it
        written = _guarded_in(first if _writes(func) else kwargs.get("out"))
        if written is not None:
            raise RuntimeError(
                f"the weight of {written.of_layer} is computed from its codes at every access, so what is written to "
                "it would be lost; merge adapters into the float model and quantize that, or compute with a copy: "
                "layer.weight.clone()"
            )
        if func is Tensor.detach and sys._getframe(1).f_code is nn.Parameter.__new__.__code__:
            # It asks for the very type again, and its own words would be of that alone.
            raise RuntimeError(
                f"the weight of {args[0].of_layer} is computed from its codes at every access; a parameter needs "
                "values of its own: nn.Parameter(layer.weight.clone()), or dequantize_model(model) for all layers"
            )
        with torch._C.DisableTorchFunctionSubclass():
            if func in _KNOWN:
                return func(*args, **kwargs)
            args, kwargs = tree_map_only(ComputedWeight, lambda t: t.plain(), (args, kwargs))
            result = func(*args, **kwargs)
        if isinstance(first, ComputedWeight):
            return tree_map_only(Tensor, lambda t: _guarded(t, first) if _is_part(t, args[0]) else t, result)
        return result

    def plain(self) -> Tensor:
        """Return the tensor that others compute with."""
        return self.as_subclass(Tensor)


class UnmadeWeight(ComputedWeight):
    """One that is made when somebody asks for more than its dtype, device or shape."""

    _layer: QuantizedLayer
    _before: list[tuple[str, int, int]]
    _made: Tensor | None

    @staticmethod
    def of(layer: QuantizedLayer) -> UnmadeWeight:
        """Return the weight of ``layer`` as it is now."""
        weight = Tensor._make_wrapper_subclass(
            UnmadeWeight, layer.weight_shape, dtype=layer.weight_dtype, device=layer.weight_packed.device
        )
        now = layer.__class__.__new__(layer.__class__)  # its tensors, should the layer be moved before they are read
        now.__dict__ = {**layer.__dict__, "_buffers": dict(layer._buffers)}
        weight._layer, weight._before, weight._made, weight.of_layer = now, _state(layer), None, _words(layer)
        return weight

    def plain(self) -> Tensor:
        """Return the weight, made once."""
        if self._made is None:
            if _state(self._layer) != self._before:
                raise RuntimeError(
                    f"the codes of {self.of_layer} were changed after its weight was asked for and before it was read; "
                    "take layer.weight.clone() before the change, or ask for it afterwards"
                )
            self._made = self._layer.weight_in(self._layer.weight_dtype)
        return self._made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        args, kwargs = tree_map_only(UnmadeWeight, lambda t: t.plain(), (args, kwargs or {}))
        return func(*args, **kwargs)


def _writes(func: Any) -> bool:
    name = func.__name__
    if name == "__set__":
        return bool(func == Tensor.data.__set__)  # type: ignore[attr-defined]
    in_place = name.startswith("__i") and name not in ("__index__", "__int__", "__invert__")
    ends = name.endswith("_") and not name.endswith("__")
    return (ends or in_place or name == "__setitem__") and name not in _CHANGES_NOTHING


def _guarded(part: Tensor, weight: ComputedWeight) -> ComputedWeight:
    guarded = part.as_subclass(ComputedWeight)
    guarded.of_layer = weight.of_layer
    return guarded


def _is_part(result: Tensor, weight: Tensor) -> bool:
    """Whether ``result`` is another tensor in the memory of ``weight``, as ``weight[0]`` and ``weight.data`` are."""
    if result is weight or type(result) is not Tensor or result.layout is not torch.strided:
        return False
    if torch._C._functorch.is_functorch_wrapped_tensor(result):
        return False
    return result.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()


def _guarded_in(written: Any) -> ComputedWeight | None:
    """Return the computed weight that ``written`` is or has, as the lists of ``torch._foreach_mul_`` do."""
    each = written if isinstance(written, (list, tuple)) else (written,)
    return next((t for t in each if isinstance(t, ComputedWeight)), None)


def float_weight(layer: QuantizedLayer) -> Tensor:
    """Return the weight that the codes stand for, in the layer's dtype: that of the call under way, or made anew."""
    of_call: Tensor | None = layer.__dict__.get("weight")
    if of_call is not None:
        return of_call
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or not has_memory_of_its_own(layer.weight_packed):
        return layer.weight_in(layer.weight_dtype)
    return UnmadeWeight.of(layer)


def _words(layer: QuantizedLayer) -> str:
    return f"a converted layer ({type(layer).__name__} {tuple(layer.weight_shape)}, {layer.weight_format.scheme})"


class _WeightAgain:
    """Makes the float weight of a layer again, laid out as the part of it that was saved."""

    def __init__(self, layer: QuantizedLayer, dtype: torch.dtype) -> None:
        self.layer = layer
        self.dtype = dtype
        self.state = _state(layer)
        #: The whole, where it is not what the codes stand for.
        self.kept: Tensor | None = None

    def make(self, saved: tuple[Any, ...]) -> Tensor:
        if self.kept is not None:
            return self.kept.as_strided(*saved)
        if _state(self.layer) != self.state:
            raise RuntimeError(
                f"the codes of {_words(self.layer)} were moved or changed between its forward and its backward pass; "
                "move a model, or load into it, before the forward pass"
            )
        with torch.no_grad():
            return self.layer.weight_in(self.dtype).as_strided(*saved)

    def keep_if_changed(self, weight: Tensor) -> None:
        """Keep ``weight`` where a forward wrote into it, as ``self.weight.data.clamp_(min=0)`` does."""
        if not torch.equal(weight, self.layer.weight_in(self.dtype)):
            self.kept = weight


def _state(layer: QuantizedLayer) -> list[tuple[str, int, int]]:
    """Return what changes when any of a layer's tensors is changed in place or gets other memory."""
    held = [(name, tensor) for name, tensor in layer._buffers.items() if tensor is not None]
    return [(name, t.data_ptr(), -1 if t.is_inference() else t._version) for name, t in held]


def with_float_weight(layer: QuantizedLayer, inputs: tuple[Any, ...], function: Callable[[Tensor], Any]) -> Any:
    """Return ``function`` of the layer's float weight, which is not kept for the backward pass unless it is changed.

    Args:
        layer: whose weight it is.
        inputs: what else the layer computes with; the tensors say whether there will be a backward pass.
        function: what the user's layer does with the weight.
    """
    return _with(layer, inputs, function, layer.weight_dtype, may_change=True)


def multiplied_by_weight(layer: QuantizedLayer, x: Tensor, product: Callable[[Tensor], Tensor]) -> Tensor:
    """Return a product of ``x`` and the layer's float weight, as :func:`with_float_weight`.

    Under autocast the weight is made in the dtype that the product is computed in: a copy fewer, the same values.

    Args:
        layer: whose weight it is.
        x: the input, as the layer computes with it.
        product: a linear operation or a convolution, given the weight.
    """
    dtype, device = layer.weight_dtype, x.device.type
    if dtype == torch.float32 and torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    result: Tensor = _with(layer, (x, layer.bias), product, dtype)
    return result


def _with(
    layer: QuantizedLayer,
    inputs: tuple[Any, ...],
    function: Callable[[Tensor], Any],
    dtype: torch.dtype,
    *,
    may_change: bool = False,
) -> Any:
    weight = layer.weight_in(dtype)
    backward = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs)
    if not backward or torch.compiler.is_compiling() or torch.jit.is_tracing() or not has_memory_of_its_own(weight):
        return function(weight)
    again, held = _WeightAgain(layer, dtype), weight.detach()  # the same memory, whatever becomes of ``weight.data``
    with made_again_in_backward((weight, again), over_others=True):
        result = function(weight)
    if may_change:
        again.keep_if_changed(held)
    return result

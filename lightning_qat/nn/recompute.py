"""Fake-quantized tensors that are computed again in backward instead of being kept for it.

A convolution keeps its input and its weight for the gradients. Fake-quantized, both are copies that float
training does not have; what they were made from is kept anyway (the input by the layer before, the weight
as the parameter). So only how to make them again is kept: a few element-wise passes for what would be
about a third more memory.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lightning_qat.ops.layout import is_plain
from lightning_qat.ops.workspace import passing_results
from lightning_qat.quantizers.debug import tell
from lightning_qat.quantizers.fake_quantizer import FakeQuantizer
from lightning_qat.quantizers.weight_quantizer import WeightQuantizer
from lightning_qat.schemes import TensorFormat

if TYPE_CHECKING:
    from typing import TypeGuard


class MakesAgain(Protocol):
    """Makes a tensor again in the backward pass."""

    def make(self, saved: tuple[Any, ...]) -> Tensor:
        """Return the part of the tensor that has this size, stride and offset."""


class _Again:
    """Makes a fake-quantized tensor again, laid out as the part of it that was saved."""

    def __init__(
        self, source: Tensor, parameters: tuple[Tensor, Tensor, TensorFormat], quantizer: FakeQuantizer
    ) -> None:
        self.source = source.detach()
        self.version = source._version
        self.parameters = parameters
        self.scheme = quantizer.scheme
        self.name = quantizer.name
        #: The whole, where somebody else keeps it until the backward pass.
        self.kept: Tensor | None = None
        #: Where the backward pass of a learned scale looks for the whole; None where there is none.
        self.made: list[Tensor] | None = None

    def make(self, saved: tuple[Any, ...]) -> Tensor:
        if self.source._version != self.version:
            raise RuntimeError(
                f"a tensor that layer {self.name!r} quantizes was changed in place before its backward pass; "
                "use an operation that is not in place after the layer"
            )
        if self.kept is not None:
            return self.kept.as_strided(*saved)
        with passing_results():  # ``source`` is detached: no graph is made where one is kept
            whole = self.scheme.fake_quantize_through(self.source, *self.parameters)
        if self.made is not None:
            self.made[:] = [whole]
        return whole.as_strided(*saved)


def has_memory_of_its_own(x: Tensor) -> bool:
    """Whether ``x`` is a plain tensor that can be told by its address and version, as under no transform.

    Not where a mode sees operations (``make_fx``, which writes them down): kernels called directly are none of them.
    Nor in forward mode, of which they know nothing.
    """
    return is_plain(x) and not x.is_inference() and not x.is_meta and sees_no_mode() and forward_ad._current_level < 0


def sees_no_mode() -> bool:
    """Return whether no transform and no mode sees what is done here."""
    return torch._C._functorch.maybe_current_level() is None and not torch._C._len_torch_dispatch_stack()


def _may_keep(quantizer: FakeQuantizer | None) -> TypeGuard[WeightQuantizer]:
    """Whether the value of a weight may be one that was kept: that has no gradient for a scale."""
    return isinstance(quantizer, WeightQuantizer) and quantizer.kept is not None and not quantizer.learns_now


def fake_quantize_again(quantizer: FakeQuantizer | None, source: Tensor) -> tuple[Tensor, _Again | None]:
    """Return the fake-quantized ``source`` and how to make it again; itself and None where it stays in float."""
    if quantizer is None:
        return source, None
    learned = quantizer.learned
    stays = learned is not None and not quantizer.learns_from(source)
    if learned is not None and not stays:
        source = quantizer.joined(source)
    plain = not (torch.compiler.is_compiling() or torch.jit.is_tracing()) and has_memory_of_its_own(source)
    if plain and _may_keep(quantizer):
        kept: Any = quantizer.kept
        found = kept.get(quantizer, source)
        if found is not None:
            again = _Again(source, found[2], quantizer)
            again.kept = found[1]
            if quantizer.debug_callback is not None:
                tell(quantizer, source, found[1], found[2])
            return found[0], again if torch.is_grad_enabled() else None
    parameters = quantizer.parameters_now(source)
    if parameters is None:
        return source, None
    if not plain:
        if stays:
            return quantizer.scheme.fake_quantize(source, *parameters), None
        return quantizer.fake_quantize(source, parameters), None
    covered = isinstance(quantizer, WeightQuantizer) and quantizer.covers_weight
    made: list[Tensor] = []
    with passing_results():
        if stays:
            quantized = quantizer.scheme.fake_quantize_through(source, *parameters)
        else:
            quantized = quantizer.fake_quantize_through(source, parameters, made, covered=covered)
    if quantizer.debug_callback is not None:
        tell(quantizer, source, quantized, parameters)
    if not torch.is_grad_enabled():
        return quantized, None
    again = _Again(source, parameters, quantizer)
    again.made = made if learned is not None and quantizer.learns_now and not stays else None
    return quantized, again


def made_again_in_backward(
    *made: tuple[Tensor, MakesAgain | None], over_others: bool = False
) -> AbstractContextManager[Any]:
    """Let an operation inside keep, for its backward pass, how to make the tensors instead of the tensors.

    Compiled graphs choose themselves what to compute again.

    Args:
        made: tensors, and what makes each of them again; None is for one that is kept as it is.
        over_others: other hooks on saved tensors (activation checkpointing, offloading) get the other tensors; else,
            where there are some, they get all.
    """
    # Facts of the tensors, not the tensors: autograd keeps the hook, and with it all that it refers to.
    known = {t.data_ptr(): (t.numel(), t.storage_offset(), again) for t, again in made if again is not None}
    if not known:
        return nullcontext()
    others = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if others is not None and not over_others:
        return nullcontext()

    def pack(tensor: Tensor) -> Any:
        numel, start, again = known.get(tensor.data_ptr(), (0, 0, None))
        if again is not None and numel and tensor.numel() == numel:
            return again.make, (tensor.size(), tensor.stride(), tensor.storage_offset() - start)
        return tensor if others is None else (others[1], others[0](tensor))

    return torch.autograd.graph.saved_tensors_hooks(pack, _unpack)


def _unpack(kept: Any) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    make, packed = kept
    made: Tensor = make(packed)
    return made


#: What computes a layer from its input and its weight.
LayerFunction = Callable[[Tensor, Tensor], Tensor]

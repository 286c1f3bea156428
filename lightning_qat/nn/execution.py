"""Which arithmetic a converted layer computes with: an integer kernel, or the reference and why.

A kernel is taken only where its grid is the trained one. Some things are known of a layer at any time
(:func:`reference_reason`, what ``QuantizedLayer.execution`` shows); others only of a call, which then takes the
reference path: under ``torch.compile`` (but for :func:`lightning_qat.nn.triton_linear.takes_ops`), ``torch.export``,
``torch.jit.trace``, autocast and modes that see PyTorch's operations (``make_fx``, fake tensors), where a gradient,
forward or backward, is wanted, for empty inputs, and for inputs of another dtype, device or tensor class; a weight-only
Linear also where the number of tokens makes a float product faster, and, where it would compute with integers, for NaN
and infinities. What the C++ kernels of
:mod:`lightning_qat.native` do for few tokens, ``"native ..."``, oneDNN's do for more.

A residual block of convolutions ends in one pass: the floats' sum, its ReLU and the codes of the layer that reads it
(:mod:`lightning_qat.nn.region`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from lightning_qat.nn.region import RegionTensor
from lightning_qat.ops.integer_linear import MAX_TERMS, CodeRange, code_range
from lightning_qat.schemes import IntegerScheme, LLMInt8Scheme, TensorFormat, get_scheme

if TYPE_CHECKING:
    from lightning_qat.nn.layer import QuantizedLayer

#: Computes a layer's output from its input and bias.
IntegerKernel = Callable[[Tensor, Tensor | None], Tensor]

#: Name, tensor, its version and address when the kernel was built.
_Seen = tuple[str, Tensor | None, int, int]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_TENSORS = ("weight_packed", "weight_scale", "weight_zero_point", "input_scale", "input_zero_point")


class KernelCache:
    """A layer's packed weight: built on first use, rebuilt when the codes change, never copied or pickled."""

    def __init__(self) -> None:
        self._built: tuple[tuple[Any, ...], list[_Seen], IntegerKernel | None] | None = None
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: dict[int, Any]) -> KernelCache:
        return KernelCache()

    def __reduce__(self) -> tuple[type[KernelCache], tuple[()]]:
        return KernelCache, ()

    def clear(self) -> None:
        """Forget the packed weight."""
        self._built = None

    def get(
        self, layer: QuantizedLayer, settings: tuple[Any, ...], build: Callable[[], IntegerKernel | None]
    ) -> IntegerKernel | None:
        """Return the kernel of ``layer`` as it is now, or None where ``build`` has none.

        Args:
            layer: whose kernel it is.
            settings: what it depends on besides formats, tensors, dtype and mode.
            build: makes it.
        """
        settings = (settings, layer.weight_format, layer.input_format, layer.weight_dtype, layer.training)
        built = self._built
        if built is None or built[0] != settings or not _same(built[1], layer._buffers):
            with self._lock:
                built = self._built
                if built is None or built[0] != settings or not _same(built[1], layer._buffers):
                    # Tensors are kept, so that no other one takes the address.
                    tensors = [(name, tensor, *_state(tensor)) for name, tensor in layer._buffers.items()]
                    built = self._built = (settings, tensors, build())
        return built[2]


def _state(tensor: Tensor | None) -> tuple[int, int]:
    """Return what changes when a tensor is changed in place and counts that, or gets other memory."""
    if tensor is None:
        return 0, 0
    return -1 if tensor.is_inference() else tensor._version, tensor.data_ptr()


def _same(tensors: list[_Seen], buffers: dict[str, Tensor | None]) -> bool:
    """Return whether the tensors are the very ones, unchanged; on the way of every call, so without detours."""
    if len(tensors) != len(buffers):
        return False
    for name, tensor, version, address in tensors:
        if buffers.get(name) is not tensor:
            return False
        if tensor is not None and (tensor.data_ptr() != address or (version >= 0 and tensor._version != version)):
            return False
    return True


def state_reason(layer: QuantizedLayer) -> str | None:
    """Return why ``layer`` takes the reference path as it stands, whatever its formats are, or None."""
    if layer.training:
        return "training mode"
    buffers = [buffer for name in _TENSORS if (buffer := layer._buffers.get(name)) is not None]
    if any(buffer.device.type != "cpu" for buffer in buffers):
        return f"on {buffers[0].device.type}"
    if any(buffer.is_inference() for buffer in buffers):
        return "built in inference mode"  # changes in place are not counted
    if layer.weight_dtype not in _DTYPES:
        return f"computes in {str(layer.weight_dtype).removeprefix('torch.')}"
    return "no weights" if layer.weight_shape.numel() == 0 else None


def reference_reason(layer: QuantizedLayer) -> str | None:
    """Return why ``layer`` cannot compute with integers as it stands, or None; looks at metadata only."""
    weight, grid = layer.weight_format, layer.input_format
    if grid is None and not isinstance(layer, nn.Linear):
        return "weight-only"
    reason = state_reason(layer)
    if reason is not None:
        return reason
    if _is_llm_int8(weight) and isinstance(layer, nn.Linear) and (grid is None or _is_llm_int8(grid)):
        return None if layer.weight_shape[1] <= MAX_TERMS else f"sums of more than {MAX_TERMS} products"
    return _weight_reason(weight, layer) or (None if grid is None else _input_reason(grid))


def _is_llm_int8(fmt: TensorFormat) -> bool:
    return type(get_scheme(fmt.scheme)) is LLMInt8Scheme


def _weight_reason(fmt: TensorFormat, layer: QuantizedLayer) -> str | None:
    if type(get_scheme(fmt.scheme)) is not IntegerScheme:
        return f"weights in {fmt.scheme}"
    if fmt.group_size is not None and layer.input_format is not None:
        return "weights in groups"
    if fmt.axis not in (None, 0):
        return f"weight scales along dimension {fmt.axis}"
    if fmt.bits > 8:
        return f"{fmt.bits}-bit weights"
    if fmt.bits == 8 and not fmt.symmetric:
        return "asymmetric 8-bit weights"  # code - zero point needs nine bits
    if (fmt.group_size or layer.weight_shape[1:].numel()) > MAX_TERMS:
        return f"sums of more than {MAX_TERMS} products"
    return None


def _input_reason(fmt: TensorFormat) -> str | None:
    if type(get_scheme(fmt.scheme)) is not IntegerScheme:
        return f"inputs in {fmt.scheme}"
    if fmt.bits > 8:
        return f"{fmt.bits}-bit inputs"
    if fmt.axis is not None or fmt.group_size is not None:
        return "inputs not quantized per tensor"
    return None


def takes_integers(layer: QuantizedLayer, x: Tensor) -> bool:
    """Return whether this call can go to an integer kernel, if the layer has one."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() or torch._C._len_torch_dispatch_stack():
        return False
    if type(x) is RegionTensor:  # of a layer that asked all this
        return layer.weight_dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    if type(x) is not Tensor:
        return False
    if torch._C._functorch.maybe_current_level() is not None:  # under vmap and its kin
        return False
    if x.dtype != layer.weight_dtype or not x.is_cpu or x.layout != torch.strided or not x.numel():
        return False
    if x.is_neg():  # in memory lies what is to be negated
        return False
    if torch.is_grad_enabled():
        bias: Any = layer.bias
        if x.requires_grad or (bias is not None and bias.requires_grad):
            return False
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:
        return False
    return not (torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled("cpu"))


def weight_values(layer: QuantizedLayer) -> Tensor:
    """Return ``code - zero point`` as int8: fewer bits are widened, for the packed cache only."""
    codes, zero_point = layer.codes, layer.weight_zero_point
    if layer.weight_format.symmetric:
        return codes
    rows = zero_point.to(torch.int16).reshape(-1, 1)  # of the tensor, of channels or of groups
    values = codes.to(torch.int16).reshape(rows.shape[0], -1) - rows
    return values.to(torch.int8).reshape(codes.shape)


def static_input(layer: QuantizedLayer) -> tuple[Tensor, float, CodeRange]:
    """Return scale, scale as a number, and codes of a calibrated input."""
    fmt: Any = layer.input_format
    scale: Any = layer.input_scale
    zero_point = layer.input_zero_point
    # A copy: what is computed with is what was packed, whatever happens to the buffer meanwhile.
    scale = scale.detach().to(torch.float32, copy=True).reshape(())
    zero = 0 if zero_point is None else int(torch.round(zero_point.float()).item())
    return scale, scale.item(), code_range(fmt.bits, fmt.symmetric, zero)

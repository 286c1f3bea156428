"""What a file format of whole models has to say, and the registry of those there are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from lightning_qat.formats.contents import Contents
from lightning_qat.nn import QuantizedLinear
from lightning_qat.schemes import TensorFormat, get_scheme
from lightning_qat.validation import nearest_first


@dataclass(frozen=True, eq=False)
class HeldLayer:
    """A quantized Linear as it was read from a file: what :func:`lightning_qat.nn.layer.make_quantized` takes.

    Args:
        weight_format: how to read the weight.
        tensors: ``weight_packed``, ``weight_scale``, ``weight_zero_point`` and what else the scheme stores.
        input_format: how to read the input's; None for weight-only.
    """

    weight_format: TensorFormat
    tensors: dict[str, Tensor | None]
    input_format: TensorFormat | None = None


class ModelFormat(ABC):
    """A format that holds the Linears of a model, each under its own name, beside the tensors left in float."""

    #: ``quant_method`` of the ``quantization_config`` in ``config.json``.
    method: ClassVar[str]
    #: Ends of the names of the tensors by which a quantized layer is recognized.
    marks: ClassVar[tuple[str, ...]]
    #: Whether groups may be of inputs that do not lie together.
    holds_order: ClassVar[bool] = False

    @abstractmethod
    def config(self, contents: Contents) -> dict[str, Any]:
        """Return the ``quantization_config``.

        Raises:
            ValueError: naming the layer, the value and the way out, if the format cannot hold something.
        """

    @abstractmethod
    def write(self, layer: QuantizedLinear, config: dict[str, Any]) -> dict[str, Tensor]:
        """Return the tensors of a layer by the ends of their names, the bias excepted."""

    @abstractmethod
    def read(self, name: str, tensors: Mapping[str, Tensor], linear: nn.Linear, config: dict[str, Any]) -> HeldLayer:
        """Return what the tensors of a layer say.

        Args:
            name: of the layer, for messages.
            tensors: by the ends of their names.
            linear: the float layer they are for.
            config: the ``quantization_config``.

        Raises:
            ValueError: if they do not fit each other or the layer.
        """


_REGISTRY: dict[str, ModelFormat] = {}

FormatT = TypeVar("FormatT", bound=type[ModelFormat])


def register_format(*names: str) -> Callable[[FormatT], FormatT]:
    """Let :func:`lightning_qat.export` write a format under these names; its constructor takes the name."""

    def add(kind: FormatT) -> FormatT:
        for name in names:
            _REGISTRY[name] = kind(name)  # type: ignore[call-arg]
        return kind

    return add


def get_format(name: str, others: tuple[str, ...] = ()) -> ModelFormat:
    """Return the format called ``name``; raise ``ValueError`` listing those there are, ``others`` among them."""
    if name not in _REGISTRY:
        known = ", ".join(repr(n) for n in nearest_first(str(name), (*_REGISTRY, *others)))
        raise ValueError(f"format={str(name)!r} is unknown; use one of: {known}")
    return _REGISTRY[name]


def format_of_method(method: str) -> ModelFormat:
    """Return the format whose files say ``quant_method: method``."""
    for found in _REGISTRY.values():
        if found.method == method:
            return found
    known = ", ".join(sorted({repr(found.method) for found in _REGISTRY.values()}))
    raise ValueError(f"quant_method={method!r} cannot be read; these can: {known}")


def check_held(
    name: str, tensors: Mapping[str, Tensor], **expected: tuple[torch.dtype | None, tuple[int, ...]]
) -> None:
    """Raise ``ValueError`` unless tensors of a layer are as they have to be: a damaged file would be read as another.

    Args:
        name: of the layer.
        tensors: by the ends of their names.
        **expected: dtype and shape by these; a dtype of None is any floating point, of finite numbers.
    """
    for end, (dtype, shape) in expected.items():
        tensor = tensors[end]
        right = tensor.is_floating_point() if dtype is None else tensor.dtype == dtype
        if not right or tuple(tensor.shape) != shape:
            kind = "floating point" if dtype is None else dtype
            raise ValueError(
                f"layer {name!r} has {end} of {tensor.dtype} {list(tensor.shape)} where the model and the config take "
                f"{kind} {list(shape)}; the file is damaged or of another model"
            )
        if dtype is None and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"layer {name!r} has {end} with NaN or inf; the file is damaged")


def groups_of(name: str, columns: int, size: int) -> int:
    """Return how many groups of ``size`` inputs, -1 being all, ``columns`` make; raise ``ValueError`` for a part."""
    if size != -1 and (size < 1 or columns % size):
        raise ValueError(f"layer {name!r} has {columns} inputs, which group_size={size} does not divide")
    return 1 if size == -1 else columns // size


def integer_layer(
    codes: Tensor, scale: Tensor, zero_point: Tensor, bits: int, *, grouped: bool, symmetric: bool
) -> HeldLayer:
    """Return an integer weight as our own layers hold it.

    Args:
        codes: ``0 .. 2**bits - 1``, ``[out_features, in_features]``.
        scale: ``[out_features, groups]``.
        zero_point: shaped as ``scale``, in the range of ``codes``.
        bits: of a code.
        grouped: there are groups, be it one a row; otherwise there is one scale for each channel.
        symmetric: the zero points are in the middle, and the codes are to be signed ones. Where a code of 8 bits is
            outside the symmetric grid, which has no -128, the layer is asymmetric all the same.
    """
    middle = 2 ** (bits - 1)
    symmetric = symmetric and bool((zero_point == middle).all()) and not (bits >= 8 and bool((codes == 0).any()))
    fmt = TensorFormat(
        "int4" if bits == 4 else "int8",
        bits,
        symmetric,
        axis=None if grouped else 0,
        group_size=codes.shape[1] // scale.shape[1] if grouped else None,
    )
    scale = (scale if grouped else scale.squeeze(1)).float().contiguous()
    zero_point = (zero_point if grouped else zero_point.squeeze(1)).to(torch.int32).contiguous()
    codes = codes.to(torch.int32) - middle if symmetric else codes
    packed = get_scheme(fmt.scheme).pack(codes.to(torch.int8 if symmetric else torch.uint8).contiguous(), fmt)
    zeros = None if symmetric else zero_point
    return HeldLayer(fmt, {"weight_packed": packed, "weight_scale": scale, "weight_zero_point": zeros})

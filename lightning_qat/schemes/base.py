"""The contract of a number format, and the registry."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_qat.ops.observe import row_extremes
from lightning_qat.ops.packing import pack_bits, unpack_bits
from lightning_qat.ops.transformed import as_it_comes, is_transformed, straight_through
from lightning_qat.schemes.format import TensorFormat, rows_of, scale_shape
from lightning_qat.validation import SCHEME_BITS, check_int, load_entry_point, nearest_first


class Scheme(ABC):
    """A number format. All methods are pure: they never change what they are given.

    A format of one's own gives :meth:`parameters`, :meth:`quantize` and :meth:`dequantize`, and
    :func:`register_scheme` its name; the rest follows from these. ``rows_of(x, fmt)`` and ``rows_to(rows, x, fmt)``
    of :mod:`lightning_qat.schemes.format` give one row of values for each scale, and back.

    Shapes: ``scale`` and ``zero_point`` hold one value for each tensor, channel, group or block, as
    :func:`lightning_qat.schemes.format.scale_shape` says.
    """

    #: Whether ``TensorFormat.bits`` may change while training.
    changes_bits: ClassVar[bool] = False
    #: Whether a scale may be multiplied by a factor for each output channel, which is how BatchNorm is folded.
    folds_norms: ClassVar[bool] = False
    #: Whether the range may be searched for (``observer="mse"``), not only be that of the extremes.
    searches_ranges: ClassVar[bool] = False
    #: Whether a gradient may come back to the scale: :meth:`fake_quantize` then has one for it.
    learns_scales: ClassVar[bool] = False
    #: Whether the input of a layer can have this format.
    takes_inputs: ClassVar[bool] = False
    #: Whether inputs need no range from outside: each forward finds what it needs.
    finds_ranges: ClassVar[bool] = False
    #: Elements of a block where nothing says; None for formats whose scales belong to tensors, channels or groups.
    block_size: ClassVar[int | None] = None

    @abstractmethod
    def parameters(self, low: Tensor, high: Tensor, fmt: TensorFormat) -> tuple[Tensor, Tensor]:
        """Return ``(scale, zero_point)`` of the range ``[low, high]``, elementwise."""

    def parameters_of(self, x: Tensor, fmt: TensorFormat) -> tuple[Tensor, Tensor]:
        """Return ``(scale, zero_point)`` of the ranges that ``x`` has."""
        rows, shape = rows_of(x, fmt), scale_shape(x.shape, fmt)
        if not rows.numel():
            zeros = torch.zeros(shape, dtype=torch.float32, device=x.device)
            return self.parameters(zeros, zeros, fmt)
        if rows.dtype == torch.float64:
            rows = rows.float()
        low, high = (bound.reshape(shape) for bound in row_extremes(rows))
        return self.parameters_of_range(low, high, fmt)

    def parameters_of_range(self, low: Tensor, high: Tensor, fmt: TensorFormat) -> tuple[Tensor, Tensor]:
        """Return :meth:`parameters` of the range, widened to be symmetric where ``fmt`` is."""
        if fmt.symmetric:
            high = torch.maximum(high, -low)  # NaN and inf come out as they are
            low = -high
        return self.parameters(low, high, fmt)

    @abstractmethod
    def quantize(self, x: Tensor, scale: Tensor, zero_point: Tensor | None, fmt: TensorFormat) -> Tensor:
        """Return the integer codes of ``x``, in its shape."""

    @abstractmethod
    def dequantize(
        self, codes: Tensor, scale: Tensor, zero_point: Tensor | None, fmt: TensorFormat, dtype: torch.dtype
    ) -> Tensor:
        """Return the values that ``codes`` stand for; ``scale`` is the one of :meth:`effective_scale`."""

    def fake_quantize(self, x: Tensor, scale: Tensor, zero_point: Tensor | None, fmt: TensorFormat) -> Tensor:
        """Quantize and dequantize ``x``, with a straight-through gradient."""
        scale = scale.detach()
        if is_transformed():
            return straight_through(
                x, lambda x, s, z: _values_of_codes(x, s, z, self, fmt), as_it_comes, scale, zero_point
            )
        values: Tensor = _StraightThrough.apply(x, self, scale, zero_point, fmt)
        return values

    def fake_quantize_through(
        self, x: Tensor, scale: Tensor, zero_point: Tensor | None, fmt: TensorFormat, *, covered: bool = False
    ) -> Tensor:
        """Do what :meth:`fake_quantize` does to an ordinary tensor in eager mode, with a gradient for ``x`` alone.

        ``covered`` says that the range is known to hold every element of ``x``.
        """
        return self.fake_quantize(x, scale, zero_point, fmt)

    def fake_quantize_gradient(
        self, grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor | None, fmt: TensorFormat
    ) -> Tensor:
        """Return the gradient of ``x`` that :meth:`fake_quantize` has where its result has ``grad``."""
        with torch.enable_grad():
            source = x.detach().requires_grad_()
            result = self.fake_quantize(source, scale, zero_point, fmt)
        return torch.autograd.grad(result, source, grad)[0]

    def quantize_stochastically(
        self,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        fmt: TensorFormat,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return codes whose expected values are ``x``, within the range."""
        raise ValueError(f"scheme={fmt.scheme!r} does not round stochastically; use stochastic=False")

    def pack(self, codes: Tensor, fmt: TensorFormat) -> Tensor:
        """Return ``codes`` as they are stored: whole bytes as they are, fewer bits without waste."""
        return codes.clone() if _stored_whole(fmt) else pack_bits(codes, fmt.bits, signed=fmt.symmetric)

    def unpack(self, packed: Tensor, shape: torch.Size, fmt: TensorFormat) -> Tensor:
        """Return the codes, of ``shape``, that ``packed`` holds."""
        if _stored_whole(fmt):
            return packed.reshape(shape)
        return unpack_bits(packed, fmt.bits, shape, signed=fmt.symmetric)

    def quantize_packed(self, x: Tensor, scale: Tensor, zero_point: Tensor | None, fmt: TensorFormat) -> Tensor:
        """Return :meth:`pack` of what :meth:`quantize` returns."""
        return self.pack(self.quantize(x, scale, zero_point, fmt).contiguous(), fmt)

    def quantize_by_own_range(self, x: Tensor, fmt: TensorFormat) -> tuple[Tensor, Tensor] | None:
        """Return :meth:`quantize_packed` and the scale of :meth:`parameters_of`, where one pass gives both.

        None where it does not. A block that holds no finite value has a scale that is not finite.
        """
        return None

    def dequantize_packed(
        self,
        packed: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        shape: torch.Size,
        fmt: TensorFormat,
        dtype: torch.dtype,
    ) -> Tensor:
        """Return the values of packed codes: :meth:`dequantize` of what :meth:`unpack` returns."""
        return self.dequantize(self.unpack(packed, shape, fmt), scale, zero_point, fmt, dtype)

    def store_scale(self, scale: Tensor, fmt: TensorFormat) -> dict[str, Tensor]:
        """Return how a scale is stored: tensors by the ends of their names, the first being ``""``."""
        return {"": scale}

    def read_scale(self, stored: dict[str, Tensor], fmt: TensorFormat) -> Tensor:
        """Return the scale that :meth:`store_scale` stored."""
        return stored[""]

    def effective_scale(self, scale: Tensor, fmt: TensorFormat) -> Tensor:
        """Return the scale that values are dequantized with: as it is read again after being stored."""
        return scale

    def linear(
        self,
        x: Tensor,
        packed: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        shape: torch.Size,
        fmt: TensorFormat,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Return ``x @ weight.T + bias``.

        Args:
            x: ``[..., in_features]``.
            packed: the weight, as :meth:`pack` returned it.
            scale: of :meth:`effective_scale`.
            zero_point: of the weight.
            shape: of the weight, ``[out_features, in_features]``.
            fmt: of the weight.
            bias: ``[out_features]`` or None.
        """
        weight = self.dequantize_packed(packed, scale, zero_point, shape, fmt, x.dtype)
        return F.linear(x, weight, bias)

    def check_bits(self, bits: int, fmt: TensorFormat) -> int:
        """Return ``bits`` if a format like ``fmt`` can have them; raise ``ValueError`` otherwise."""
        if self.changes_bits:
            _, fewest, most = SCHEME_BITS.get(fmt.scheme, (0, 2, 16))
            # The plain integers go through all bits while training, whatever they are called.
            return check_int("bits", bits, *((2, 16) if self.searches_ranges else (fewest, most)))
        if bits != fmt.bits:
            raise ValueError(f"bits={bits!r} is not allowed: scheme={fmt.scheme!r} keeps its {fmt.bits} bits")
        return bits


def _stored_whole(fmt: TensorFormat) -> bool:
    """Whether the codes fill an integer type of their own: they then keep their shape on disk."""
    return fmt.bits == 8 or (fmt.bits == 16 and fmt.symmetric)


def _values_of_codes(x: Tensor, scale: Tensor, zero_point: Tensor | None, scheme: Scheme, fmt: TensorFormat) -> Tensor:
    codes = scheme.quantize(x, scale, zero_point, fmt)
    return scheme.dequantize(codes, scheme.effective_scale(scale, fmt), zero_point, fmt, x.dtype)


class _StraightThrough(torch.autograd.Function):
    """The values of codes, with the gradient passed on as it comes."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scheme: Scheme, scale: Tensor, zero_point: Tensor | None, fmt: TensorFormat
    ) -> Tensor:
        return _values_of_codes(x, scale, zero_point, scheme, fmt)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None, None, None, None


_REGISTRY: dict[str, Scheme] = {}

SchemeT = TypeVar("SchemeT", bound=type[Scheme])


def _register(*names: str) -> Callable[[SchemeT], SchemeT]:
    def add(scheme: SchemeT) -> SchemeT:
        for name in names:
            _REGISTRY[name] = scheme()
        return scheme

    return add


def register_scheme(name: str, *, bits: int | tuple[int, int, int] = 8) -> Callable[[SchemeT], SchemeT]:
    """Let configs, plans, recipes and saved models name a format of one's own.

    Another package's formats are found by name without being imported first if it has the entry point
    ``name = "package.module"`` in the group ``lightning_qat.schemes``.

    Args:
        name: for ``QuantizationConfig(name)``; not one that is taken.
        bits: of a code, 2 to 16; or its own, the fewest and the most.

    Raises:
        ValueError: if the name is taken or the bits are out of range.
        TypeError: if what is decorated is no complete :class:`Scheme`.
    """
    own, fewest, most = (bits, bits, bits) if isinstance(bits, int) else bits
    for value in (own, fewest, most):
        check_int("bits", value, 2, 16)
    if not fewest <= own <= most:
        raise ValueError(f"bits={bits!r} is not allowed; use (its own, the fewest, the most)")
    if not isinstance(name, str) or not name:
        raise ValueError(f"name={name!r} is not allowed; use a non-empty string")

    def add(scheme: SchemeT) -> SchemeT:
        if not (isinstance(scheme, type) and issubclass(scheme, Scheme)):
            raise TypeError(f"register_scheme({name!r}) is for subclasses of Scheme, not {scheme!r}")
        known = _REGISTRY.get(name)
        same = known is not None and (type(known).__module__, type(known).__qualname__) == (
            scheme.__module__,
            scheme.__qualname__,
        )
        if not same and (known is not None or name in SCHEME_BITS):
            raise ValueError(f"scheme {name!r} is registered already; choose another name")
        made = scheme()  # before the name is known anywhere: an incomplete one raises here
        SCHEME_BITS[name] = (own, fewest, most)
        _REGISTRY[name] = made
        return scheme

    return add


def registered_schemes() -> tuple[str, ...]:
    """Return the names of all registered schemes."""
    return tuple(_REGISTRY)


def get_scheme(name: str) -> Scheme:
    """Return the scheme called ``name``; raise ``ValueError`` listing those there are, nearest first."""
    found = _REGISTRY.get(name)
    if found is None:
        load_entry_point(str(name))
        found = _REGISTRY.get(str(name))
    if found is None:
        known = ", ".join(repr(n) for n in nearest_first(str(name), _REGISTRY))
        raise ValueError(f"scheme={str(name)!r} has no implementation in this version; use one of: {known}")
    return found

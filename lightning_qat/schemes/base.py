"""The contract of a number format, the value that names one, and the registry."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_qat.config import nearest_first


@dataclass(frozen=True)
class TensorFormat:
    """How the codes of one tensor are to be read: everything but the tensors themselves.

    Args:
        scheme: name of a registered scheme.
        bits: bits of a code.
        symmetric: codes around zero; otherwise ``0 .. 2**bits - 1`` with a zero point.
        axis: dimension with a scale for each index; None with ``group_size`` None is per tensor.
        group_size: consecutive elements of a row that share a scale.
        dynamic: ranges are found at run time (activations only).
        dynamic_range: what one of these covers: ``"token"`` (of a convolution's input, a sample) or ``"tensor"``.
    """

    scheme: str
    bits: int
    symmetric: bool
    axis: int | None = None
    group_size: int | None = None
    dynamic: bool = False
    dynamic_range: str = "token"

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, from which ``TensorFormat(**values)`` makes the same format."""
        values = asdict(self) | {"scheme": str(self.scheme)}
        if self.dynamic_range == "token":  # as before there was a choice
            del values["dynamic_range"]
        return values


class Scheme(ABC):
    """A number format. All methods are pure: they never change what they are given.

    Shapes: ``scale`` and ``zero_point`` hold one value for each tensor, channel or group, as
    ``TensorFormat.axis`` and ``TensorFormat.group_size`` say.
    """

    @abstractmethod
    def parameters(self, low: Tensor, high: Tensor, fmt: TensorFormat) -> tuple[Tensor, Tensor]:
        """Return ``(scale, zero_point)`` of the range ``[low, high]``, elementwise."""

    @abstractmethod
    def fake_quantize(self, x: Tensor, scale: Tensor, zero_point: Tensor | None, fmt: TensorFormat) -> Tensor:
        """Quantize and dequantize ``x``, with a straight-through gradient."""

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

    @abstractmethod
    def quantize(self, x: Tensor, scale: Tensor, zero_point: Tensor | None, fmt: TensorFormat) -> Tensor:
        """Return the integer codes of ``x``, in its shape."""

    @abstractmethod
    def dequantize(
        self, codes: Tensor, scale: Tensor, zero_point: Tensor | None, fmt: TensorFormat, dtype: torch.dtype
    ) -> Tensor:
        """Return the values that ``codes`` stand for."""

    @abstractmethod
    def pack(self, codes: Tensor, fmt: TensorFormat) -> Tensor:
        """Return ``codes`` as they are stored."""

    @abstractmethod
    def unpack(self, packed: Tensor, shape: torch.Size, fmt: TensorFormat) -> Tensor:
        """Return the codes, of ``shape``, that ``packed`` holds."""


_REGISTRY: dict[str, Scheme] = {}


def _register(*names: str) -> Callable[[type[Scheme]], type[Scheme]]:
    def add(scheme: type[Scheme]) -> type[Scheme]:
        for name in names:
            _REGISTRY[name] = scheme()
        return scheme

    return add


def registered_schemes() -> tuple[str, ...]:
    """Return the names of all registered schemes."""
    return tuple(_REGISTRY)


def get_scheme(name: str) -> Scheme:
    """Return the scheme called ``name``; raise ``ValueError`` listing those there are, nearest first."""
    if str(name) not in _REGISTRY:
        known = ", ".join(repr(n) for n in nearest_first(str(name), _REGISTRY))
        raise ValueError(f"scheme={str(name)!r} has no implementation in this version; use one of: {known}")
    return _REGISTRY[str(name)]

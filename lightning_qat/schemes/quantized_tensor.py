"""One quantized tensor: packed codes, scales, and how to read them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from lightning_qat.schemes.base import get_scheme
from lightning_qat.schemes.format import TensorFormat, rows_of, rows_to, scale_shape

#: Key of the state dict that holds the format: uint8 bytes of UTF-8 JSON, so that every value is a tensor.
_FORMAT = "format"
_SCALE = "scale"


@dataclass(frozen=True, eq=False)
class Outliers:
    """Columns of a tensor that stay in 16 bit (LLM.int8()).

    Args:
        columns: int64, ``[count]``: indices into a row, which is everything of one index of dimension 0.
        values: float16 or bfloat16, ``[rows, count]``.
    """

    columns: Tensor
    values: Tensor


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A tensor in a number format; made by :func:`lightning_qat.quantize` and never changed.

    Args:
        packed: the codes as the scheme stores them.
        stored_scale: the scales as the scheme stores them: ``{"": scale}``, or nested.
        zero_point: int32, shaped as the scale; None for formats without one.
        format: how to read it.
        shape: of the float tensor.
        dtype: of the float tensor, and of what :meth:`dequantize` returns.
        outliers: columns that are not in the codes, or None.
        input_scale: float32, one for each element of a row, flattened: what rows were multiplied by before they were
            quantized, and values are divided by (AWQ); or None.
        order: int64, one for each element of a row: which column of the tensor the stored column is, where GPTQ made
            groups of columns that do not lie together; None where columns are stored as they lie.
    """

    packed: Tensor
    stored_scale: dict[str, Tensor] = field(repr=False)
    zero_point: Tensor | None
    format: TensorFormat
    shape: torch.Size
    dtype: torch.dtype
    outliers: Outliers | None = None
    input_scale: Tensor | None = None
    order: Tensor | None = None

    @property
    def codes(self) -> Tensor:
        """The integer codes, in the shape of the float tensor."""
        return self._in_place(get_scheme(self.format.scheme).unpack(self.packed, self.shape, self.format))

    @property
    def group_of_columns(self) -> Tensor | None:
        """Which group, and so which scale of its row, each column has, int64; None without groups within rows."""
        width, size = self.format.group_size or self.format.block_size, prod(self.shape[1:])
        if width is None or len(self.shape) < 2 or size % width:
            return None
        groups = torch.arange(size, device=self.device) // width
        return groups if self.order is None else torch.empty_like(groups).index_copy_(0, self.order, groups)

    def _in_place(self, stored: Tensor) -> Tensor:
        """Return what is stored for each column where the tensor has that column."""
        if self.order is None:
            return stored
        rows = stored.reshape(self.shape[0], -1)
        return torch.empty_like(rows).index_copy_(1, self.order, rows).view(self.shape)

    @property
    def scale(self) -> Tensor:
        """The scale that values are computed with, float32: one for the tensor, each channel, group, token or block."""
        return get_scheme(self.format.scheme).read_scale(self.stored_scale, self.format)

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.packed.device

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is stored but the format itself."""
        return sum(t.numel() * t.element_size() for name, t in self.state_dict().items() if name != _FORMAT)

    @property
    def bits_per_value(self) -> float:
        """Bits that a value takes, scales and all counted."""
        return 8 * self.nbytes / max(prod(self.shape), 1)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the values that the codes stand for, in ``dtype``, which is floating-point, or the one they had."""
        _check_floating(dtype)
        scheme, dtype = get_scheme(self.format.scheme), dtype or self.dtype
        read = dtype if self.input_scale is None else torch.float32
        values = scheme.dequantize_packed(self.packed, self.scale, self.zero_point, self.shape, self.format, read)
        values = self._in_place(values)
        if self.input_scale is not None:
            values = (values / self.input_scale.view(1, *self.shape[1:])).to(dtype)
        if self.outliers is not None:
            rows = rows_of(values, self.format)
            values = rows_to(
                rows.index_copy(1, self.outliers.columns, self.outliers.values.to(dtype)), values, self.format
            )
        return values

    def to(self, *args: Any, **kwargs: Any) -> QuantizedTensor:
        """Return this on another device, or with values of another floating-point dtype; as ``Tensor.to`` is called."""
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        _check_floating(dtype)
        moved = self
        if device is not None and device != self.device:
            state = {name: tensor.to(device) for name, tensor in self.state_dict().items() if name != _FORMAT}
            moved = _from_tensors(state, self.format, self.shape, self.dtype)
        return moved if dtype is None else replace(moved, dtype=dtype)

    def state_dict(self) -> dict[str, Tensor]:
        """Return tensors by name, the format among them: for safetensors, or for ``torch.load(weights_only=True)``."""
        facts = {
            "format": self.format.to_dict(),
            "shape": list(self.shape),
            "dtype": str(self.dtype).removeprefix("torch."),
        }
        text = torch.frombuffer(bytearray(json.dumps(facts).encode()), dtype=torch.uint8)
        state = {"packed": self.packed, **{_SCALE + end: tensor for end, tensor in self.stored_scale.items()}}
        if self.zero_point is not None:
            state["zero_point"] = self.zero_point
        if self.outliers is not None:
            state |= {"outlier_columns": self.outliers.columns, "outlier_values": self.outliers.values}
        if self.input_scale is not None:
            state["input_scale"] = self.input_scale
        if self.order is not None:
            state["order"] = self.order
        return {**state, _FORMAT: text}

    @classmethod
    def from_state_dict(cls, state_dict: dict[str, Tensor]) -> QuantizedTensor:
        """Return what :meth:`state_dict` was taken of.

        Raises:
            ValueError: if a tensor is missing, unknown or does not fit the format.
        """
        state = dict(state_dict)
        missing = [name for name in ("packed", _SCALE, _FORMAT) if name not in state]
        if missing:
            lacking = ", ".join(map(repr, missing))
            raise ValueError(f"state_dict lacks {lacking}; give what QuantizedTensor.state_dict made")
        text = bytes(state.pop(_FORMAT).cpu().tolist())
        try:
            facts = json.loads(text.decode())
            fmt, dtype = TensorFormat(**facts["format"]), getattr(torch, facts["dtype"])
            shape = torch.Size(facts["shape"])
            if not isinstance(dtype, torch.dtype):
                raise TypeError(f"{facts['dtype']} is no dtype")
        except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"state_dict[{_FORMAT!r}] is damaged: {error}") from None
        made = _from_tensors(state, fmt, shape, dtype)
        try:
            fits = _order_fits(made) and made.codes.shape == shape and _scales_fit(made)
        except (KeyError, RuntimeError, ValueError):
            fits = False
        if not fits:
            raise ValueError(
                f"state_dict['packed'] is {made.packed.dtype} of shape {tuple(made.packed.shape)}, which is no tensor "
                f"with its scales of shape {tuple(shape)} in {fmt.scheme} with {fmt.bits} bits"
            )
        return made

    def __repr__(self) -> str:
        fmt = self.format
        parts = [f"{tuple(self.shape)}", str(fmt.scheme), f"{fmt.bits} bits", f"{self.bits_per_value:.3f} bits a value"]
        if self.outliers is not None:
            parts.append(f"{self.outliers.columns.numel()} outlier columns")
        if self.input_scale is not None:
            parts.append("rows divided by an input scale")
        if self.order is not None:
            parts.append("columns in an order of their own")
        return f"QuantizedTensor({', '.join(parts)}, dtype={self.dtype}, device={self.device})"


def _check_floating(dtype: torch.dtype | None) -> None:
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype={dtype} is not allowed; use a floating-point dtype, such as torch.float16")


def _order_fits(held: QuantizedTensor) -> bool:
    if held.order is None:
        return True
    columns = torch.arange(prod(held.shape[1:]), device=held.order.device)
    return len(held.shape) > 1 and torch.equal(held.order.sort().values, columns)


def _scales_fit(held: QuantizedTensor) -> bool:
    scale, zero, inputs = held.scale, held.zero_point, held.input_scale
    if inputs is not None and (inputs.dtype != torch.float32 or inputs.shape != (prod(held.shape[1:]),)):
        return False
    if scale.dtype != torch.float32 or (zero is not None and zero.shape != scale.shape):
        return False
    return held.format.dynamic or scale.shape == scale_shape(held.shape, held.format)


def _from_tensors(
    state: dict[str, Tensor], fmt: TensorFormat, shape: torch.Size, dtype: torch.dtype
) -> QuantizedTensor:
    state = dict(state)
    packed, zero_point = state.pop("packed"), state.pop("zero_point", None)
    outliers = None
    if "outlier_columns" in state:
        outliers = Outliers(state.pop("outlier_columns"), state.pop("outlier_values"))
    input_scale, order = state.pop("input_scale", None), state.pop("order", None)
    unknown = [name for name in state if not name.startswith(_SCALE)]
    if unknown:
        raise ValueError(f"state_dict has {', '.join(map(repr, unknown))}, which no quantized tensor has; take it out")
    scale = {name.removeprefix(_SCALE): tensor for name, tensor in state.items()}
    return QuantizedTensor(packed, scale, zero_point, fmt, shape, dtype, outliers, input_scale, order)

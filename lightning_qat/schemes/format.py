"""The value that names a number format, and which elements of a tensor share a scale in it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from math import prod
from typing import Any

import torch
from torch import Tensor

#: Fields that old manifests and checkpoints have whatever their value.
_ALWAYS = ("scheme", "bits", "symmetric", "axis", "group_size", "dynamic")


@dataclass(frozen=True)
class TensorFormat:
    """How the codes of one tensor are to be read: everything but the tensors themselves.

    Args:
        scheme: name of a registered scheme.
        bits: bits of a code.
        symmetric: codes around zero; otherwise ``0 .. 2**bits - 1`` with a zero point.
        axis: dimension with a scale for each index; None with ``group_size`` and ``block_size`` None is per tensor.
        group_size: consecutive elements of a row that share a scale.
        dynamic: ranges are found at run time (activations only).
        dynamic_range: what one of these covers: ``"token"`` (of a convolution's input, a sample) or ``"tensor"``.
        block_size: consecutive elements of the flattened tensor that share a scale; the last block may be shorter.
        nested: scales are stored as codes of their own.
        rule: which code a value between two gets where bitsandbytes' CPU and CUDA differ.
        outlier_threshold: see ``BitsAndBytesConfig``; for inputs in ``"llm_int8"``.
    """

    scheme: str
    bits: int
    symmetric: bool
    axis: int | None = None
    group_size: int | None = None
    dynamic: bool = False
    dynamic_range: str = "token"
    block_size: int | None = None
    nested: bool = False
    rule: str = "cpu"
    outlier_threshold: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, from which ``TensorFormat(**values)`` makes the same format."""
        values = asdict(self) | {"scheme": str(self.scheme)}
        return {
            field.name: values[field.name]
            for field in fields(self)
            if field.name in _ALWAYS or values[field.name] != field.default
        }

    def described(self) -> str:
        """Return it in words, for the ``repr`` of a quantizer."""
        parts = [self.scheme, f"bits={self.bits}", "symmetric" if self.symmetric else "asymmetric"]
        if self.axis is not None:
            parts.append(f"axis={self.axis}")
        if self.group_size is not None:
            parts.append(f"group_size={self.group_size}")
        if self.block_size is not None:
            parts.append(f"block_size={self.block_size}" + (", nested" if self.nested else ""))
        return ", ".join(parts)


def scale_shape(shape: torch.Size, fmt: TensorFormat) -> tuple[int, ...]:
    """Return the shape that a scale has for a tensor of ``shape`` whose ranges are not found at run time."""
    if fmt.block_size is not None:
        return (-(-prod(shape) // fmt.block_size),)
    if fmt.group_size is not None:
        return (shape[0], prod(shape[1:]) // fmt.group_size) if len(shape) > 1 else (prod(shape) // fmt.group_size,)
    return () if fmt.axis is None else (shape[fmt.axis],)


def rows_of(x: Tensor, fmt: TensorFormat) -> Tensor:
    """Return ``x`` as ``[number of scales, elements that share one]``; a short last block is filled up with 0."""
    if fmt.block_size is not None:
        flat = x.reshape(-1)
        missing = -flat.numel() % fmt.block_size
        return (torch.nn.functional.pad(flat, (0, missing)) if missing else flat).view(-1, fmt.block_size)
    if fmt.group_size is not None:
        return x.reshape(-1, fmt.group_size)
    if fmt.dynamic and fmt.dynamic_range == "token" and fmt.axis is None and x.dim():
        return x.reshape(-1, x.shape[-1]) if x.numel() else x.reshape(prod(x.shape[:-1]), x.shape[-1])
    if fmt.axis is None:
        return x.reshape(1, -1)
    moved = x.movedim(fmt.axis, 0)
    return moved.reshape(moved.shape[0], prod(moved.shape[1:]))


def rows_to(rows: Tensor, x: Tensor, fmt: TensorFormat) -> Tensor:
    """Return what :func:`rows_of` made of ``x``, or something of the same shape, in the shape of ``x``."""
    if fmt.block_size is not None:
        return rows.reshape(-1)[: x.numel()].reshape(x.shape)
    if fmt.axis is None or fmt.group_size is not None:
        return rows.reshape(x.shape)
    moved = x.movedim(fmt.axis, 0)
    return rows.reshape(moved.shape).movedim(0, fmt.axis)

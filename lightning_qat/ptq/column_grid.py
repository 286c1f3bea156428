"""The grid of a weight matrix as its columns are walked through."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_qat.ops.codebook_tables import bin_codes, codebook, thresholds
from lightning_qat.ops.fake_quantize import quant_range
from lightning_qat.ops.gptq import Levels, Steps, placed_codes
from lightning_qat.schemes import CodebookScheme, IntegerScheme, TensorFormat, get_scheme

#: Bits that codes are chosen for.
FEWEST_BITS, MOST_BITS = 2, 8


@dataclass(frozen=True, eq=False)
class ColumnGrid:
    """The values that the elements of a weight ``[out_features, in_features]`` can have.

    Args:
        step: float32 ``[parts, out_features]``: the scale of each row in every part of the columns.
        zero: the codes of 0.0, whole numbers in float32 shaped as ``step``; None is 0.
        part_of: int64 ``[in_features]``: the part that a column belongs to.
        levels: what steps are multiplied by.
    """

    step: Tensor
    zero: Tensor | None
    part_of: Tensor
    levels: Levels

    def of(self, columns: Tensor) -> Steps:
        """Return the steps of ``columns``, int64 ``[count]``, as ``[count, out_features]``."""
        parts = self.part_of[columns]
        return Steps(self.step[parts], None if self.zero is None else self.zero[parts])


def check_target(fmt: TensorFormat) -> None:
    """Raise ``ValueError`` unless codes can be chosen for ``fmt``."""
    scheme = get_scheme(fmt.scheme)
    if type(scheme) is not IntegerScheme and not isinstance(scheme, CodebookScheme):
        raise ValueError(
            f"scheme={fmt.scheme!r} is no grid that GPTQ chooses codes for; use 'gptq', 'int4', 'int8', 'nf4' or "
            "'fp4', or round to nearest"
        )
    if not FEWEST_BITS <= fmt.bits <= MOST_BITS:
        raise ValueError(f"bits={fmt.bits} is not allowed with GPTQ; use {FEWEST_BITS} to {MOST_BITS}")
    if fmt.dynamic or fmt.axis not in (None, 0):
        raise ValueError(f"{fmt} is no format of a weight [out_features, in_features]; use axis=0 or None")


def part_columns(fmt: TensorFormat, shape: torch.Size) -> int | None:
    """Return how many neighbouring columns share their scales; None where blocks do not end with rows."""
    if fmt.block_size is not None:
        return fmt.block_size if shape[1] % fmt.block_size == 0 else None
    return fmt.group_size or shape[1]


def column_grid(fmt: TensorFormat, shape: torch.Size, scale: Tensor, zero_point: Tensor | None) -> ColumnGrid:
    """Return the grid of a weight.

    Args:
        fmt: see :func:`check_target`.
        shape: of the weight, ``[out_features, in_features]``.
        scale: as it is quantized with, shaped as ``scale_shape`` says.
        zero_point: shaped as ``scale``, or None.
    """
    rows, columns = shape
    scale = get_scheme(fmt.scheme).effective_scale(scale, fmt).to(torch.float32)
    index, width = torch.arange(columns, device=scale.device), part_columns(fmt, shape)
    zero = None
    if fmt.block_size is not None:
        step, part_of = _block_steps(scale, shape, fmt.block_size)
    else:
        step, part_of = _spread(scale, rows), index // (width or columns)
        zero = None if fmt.symmetric or zero_point is None else _spread(zero_point.to(torch.float32), rows)
    return ColumnGrid(step, zero, part_of, _levels(fmt, scale.device))


def _spread(parameter: Tensor, rows: int) -> Tensor:
    """Return ``[parts, rows]`` of one value, of one for each row or of ``[rows, parts]``; a tensor of its own."""
    wide = parameter.reshape(1, 1).expand(rows, 1) if parameter.numel() == 1 else parameter.reshape(rows, -1)
    return wide.t().clone(memory_format=torch.contiguous_format)


def _block_steps(scale: Tensor, shape: torch.Size, block: int) -> tuple[Tensor, Tensor]:
    rows, columns = shape
    index = torch.arange(columns, device=scale.device)
    if columns % block == 0:
        return _spread(scale, rows), index // block
    # Blocks go on in the next row: each element has a part of its own.
    spread = scale.reshape(-1, 1).expand(-1, block).reshape(-1)[: rows * columns]
    return spread.reshape(rows, columns).t().contiguous(), index


def _levels(fmt: TensorFormat, device: torch.device) -> Levels:
    scheme = get_scheme(fmt.scheme)
    if not isinstance(scheme, CodebookScheme):
        return Levels(*quant_range(fmt.bits, fmt.symmetric))
    order = bin_codes(scheme.codebook, fmt.rule, device).to(torch.int64)
    values = codebook(scheme.codebook, device)[order]
    return Levels(0, len(values) - 1, values, thresholds(scheme.codebook, fmt.rule, device))


def codes_of_levels(chosen: Tensor, fmt: TensorFormat, order: Tensor | None = None) -> Tensor:
    """Return the codes of a format, in its dtype, ``[out_features, in_features]``, contiguous.

    Args:
        chosen: what an op chose: int16 ``[in_features, out_features]``.
        fmt: of the codes.
        order: int64 ``[in_features]``: which column each row of ``chosen`` is; None is as they lie.
    """
    scheme, table = get_scheme(fmt.scheme), None
    if isinstance(scheme, CodebookScheme):
        table = bin_codes(scheme.codebook, fmt.rule, chosen.device)
    order = torch.arange(len(chosen), device=chosen.device) if order is None else order
    return placed_codes(chosen, order, table, torch.int8 if fmt.symmetric else torch.uint8)

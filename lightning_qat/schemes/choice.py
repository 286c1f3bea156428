"""From a config to the format of one tensor, checked against its shape."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from lightning_qat.config import BitsAndBytesConfig, QuantizationConfig, QuantizationScheme
from lightning_qat.schemes.base import Scheme, get_scheme
from lightning_qat.schemes.format import TensorFormat

#: Integers whose codes are chosen for a weight by what its layer's inputs were.
_CHOSEN_CODES = (QuantizationScheme.GPTQ, QuantizationScheme.AWQ)


def weight_format(config: QuantizationConfig, shape: torch.Size, axis: int = 0, name: str = "") -> TensorFormat:
    """Return how a weight, or another tensor that is there as a whole, is quantized.

    Args:
        config: what is wanted.
        shape: of the weight.
        axis: dimension of the output channels.
        name: of its layer, for messages.

    Raises:
        ValueError: if the scheme or the shape cannot have it.
    """
    scheme, where = get_scheme(config.scheme), f" (layer {name!r})" if name else ""
    if not scheme.searches_ranges and (config.observer or "min_max") != "min_max":
        raise ValueError(
            f"observer={config.observer!r} is not available with scheme={str(config.scheme)!r}{where}; use 'min_max'"
        )
    fmt = TensorFormat(str(config.scheme), int(config.bits or 8), config.symmetric)
    changes: dict[str, object] = {}
    if scheme.block_size is not None:
        bnb = config.bnb
        block = config.group_size or (bnb.block_size if bnb is not None else scheme.block_size)
        changes = {"block_size": block, **_nested(bnb, scheme)}
    elif config.group_size is not None:
        _check_group(config.group_size, shape, axis, where)
        changes = {"group_size": config.group_size}
    elif config.per_channel or config.scheme == "llm_int8":
        changes = {"axis": axis if shape else None}
    return TensorFormat(**{**vars(fmt), **changes})


def _nested(bnb: BitsAndBytesConfig | None, scheme: Scheme) -> dict[str, object]:
    return {} if bnb is None else {"nested": bnb.nested_quantization, "rule": bnb.rule}


def _check_group(group_size: int, shape: torch.Size, axis: int, where: str) -> None:
    row = prod(shape[1:]) if len(shape) > 1 else prod(shape)
    if axis != 0:
        raise ValueError(
            f"group_size={group_size} is not available for transposed convolutions{where}; use per_channel=True"
        )
    if row % group_size:
        divisors = [d for d in range(min(group_size, row), 0, -1) if row % d == 0][:2]
        ways = " or ".join(str(d) for d in divisors)
        raise ValueError(f"group_size must divide in_features: {row} % {group_size} != 0{where}; use group_size={ways}")


def input_format(config: QuantizationConfig, name: str = "") -> TensorFormat:
    """Return how the input of a layer is quantized.

    Raises:
        ValueError: if the scheme is for weights only, or scales are asked for that inputs do not have.
    """
    scheme = get_scheme(config.scheme)
    if not scheme.takes_inputs or config.scheme in _CHOSEN_CODES:
        raise ValueError(
            f"scheme={str(config.scheme)!r} is for weights (input of layer {name!r}); use 'int8' or 'dynamic', or no "
            "activation config for weight-only"
        )
    if not scheme.searches_ranges and config.observer not in (None, "min_max", "moving_average"):
        raise ValueError(
            f"observer={config.observer!r} is not available with scheme={str(config.scheme)!r} (input of layer "
            f"{name!r}); use 'moving_average' or 'min_max'"
        )
    if config.per_channel or config.group_size is not None:
        raise ValueError(
            f"per_channel and group_size are for weights (input of layer {name!r}); "
            "use a per-tensor config, or QuantizationConfig('dynamic') for per-token ranges"
        )
    threshold = 0.0
    if config.scheme == "llm_int8":
        threshold = float(config.bnb.outlier_threshold if config.bnb is not None else 6.0)
    return TensorFormat(
        str(config.scheme),
        int(config.bits or 8),
        config.symmetric,
        dynamic=config.dynamic or scheme.finds_ranges,
        dynamic_range=config.dynamic_range,
        outlier_threshold=threshold,
    )


def rows_of_scale(
    scale: Tensor, zero_point: Tensor | None, index: Tensor, fmt: TensorFormat, table: torch.Size
) -> tuple[Tensor, Tensor | None]:
    """Return scale and zero point of the rows ``index`` of a table ``[rows, features]``.

    Blocks have to divide a row, see :func:`blocks_end_with_rows`.
    """
    index = index.reshape(-1)
    if fmt.block_size is None:
        return scale[index], None if zero_point is None else zero_point[index]
    by_row = scale.reshape(table[0], -1)[index].reshape(-1)
    return by_row, None if zero_point is None else zero_point.reshape(table[0], -1)[index].reshape(-1)


def blocks_end_with_rows(shape: torch.Size, fmt: TensorFormat) -> bool:
    """Return whether rows of a table can be quantized without the others: no block and no nested scale spans two."""
    return fmt.block_size is None or (not fmt.nested and prod(shape[1:]) % fmt.block_size == 0)

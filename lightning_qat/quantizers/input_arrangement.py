"""What is done to a layer's input, feature by feature, before its weight multiplies it.

AWQ and SmoothQuant multiply columns of a weight and divide what they multiply; where nothing before the layer can take
that division in, the layer does it itself. GPTQ may make groups of columns that do not lie together; the layer then
takes its features in the order of the columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

#: Names of the buffers that hold it.
ARRANGEMENT = INPUT_ORDER, INPUT_FACTOR = "input_order", "input_factor"


def arranged(x: Tensor, order: Tensor | None, factor: Tensor | None) -> Tensor:
    """Return what the columns of a weight multiply, in the dtype of ``x``.

    Args:
        x: ``[..., in_features]``; one of other sizes comes back as it is, for its layer to refuse.
        order: int64 ``[in_features]``: which feature each column multiplies; None is column by column.
        factor: float32 ``[in_features]``: what that feature is multiplied by, by column; None is 1.
    """
    if order is not None:
        x = x if x.shape[-1:] != order.shape else x.index_select(-1, order)
    if factor is None or x.shape[-1:] != factor.shape:
        return x
    return (x * factor).to(x.dtype)


def by_feature(columns: Tensor, order: Tensor | None, factor: Tensor | None) -> Tensor:
    """Return the weight that multiplies an input as it comes, ``[out_features, in_features]``, in its dtype.

    Args:
        columns: the weight whose columns multiply ``arranged(x, order, factor)``.
        order: see :func:`arranged`.
        factor: see :func:`arranged`.
    """
    if factor is not None:
        columns = (columns * factor.to(columns.device)).to(columns.dtype)
    return columns if order is None else torch.empty_like(columns).index_copy_(1, order.to(columns.device), columns)


def by_feature_in(state_dict: dict[str, Any], quantizer: str) -> dict[str, Any]:
    """Return ``state_dict`` of a prepared model with weights that multiply inputs as they come.

    Args:
        state_dict: is not changed.
        quantizer: name of a layer's child that holds the arrangement.
    """
    found = dict(state_dict)
    ends = tuple(f"{quantizer}.{name}" for name in ARRANGEMENT)
    for prefix in dict.fromkeys(key.removesuffix(end) for end in ends for key in state_dict if key.endswith(end)):
        weight = f"{prefix}weight"
        if isinstance(found.get(weight), Tensor):
            found[weight] = by_feature(found[weight], *(state_dict.get(prefix + end) for end in ends))
    return found

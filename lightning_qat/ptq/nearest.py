"""Round to nearest: what every other algorithm has to beat."""

from __future__ import annotations

from torch import Tensor

from lightning_qat.ptq.chosen import ChosenCodes, output_error
from lightning_qat.schemes import TensorFormat, get_scheme


def choose_nearest(
    weight: Tensor,
    gram: Tensor | None,
    fmt: TensorFormat,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
) -> ChosenCodes:
    """Return the code nearest to each weight.

    Args:
        weight: ``[N, K]``.
        gram: ``[K, K]``, the sum of ``x x^T`` over inputs; None where they were not looked at: the loss is then NaN.
        fmt: of the codes.
        scale: of a given grid; None takes that of the extremes.
        zero_point: of a given grid.
    """
    scheme = get_scheme(fmt.scheme)
    given = scale is not None
    extremes = scheme.parameters_of(weight, fmt) if not given or gram is not None else (scale, zero_point)
    chosen_scale, chosen_zero = (scale, zero_point) if scale is not None else extremes
    codes = scheme.quantize(weight, chosen_scale, chosen_zero, fmt)  # type: ignore[arg-type]
    zero = None if fmt.symmetric else chosen_zero
    made = ChosenCodes(codes, chosen_scale, zero, fmt, float("nan"), float("nan"))  # type: ignore[arg-type]
    if gram is None:
        return made
    loss = output_error(weight, made.values(), gram)
    nearest = loss if not given else choose_nearest(weight, gram, fmt).loss
    return ChosenCodes(codes, made.scale, zero, fmt, loss, nearest)

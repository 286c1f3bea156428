"""Activation-aware scales of weights (Lin et al. 2023, AWQ), searched with the Gram matrix of the inputs alone.

Columns of a weight are multiplied by ``s`` before they are quantized and what feeds them is divided by it: nothing
changes in float, and the columns that matter are rounded on a finer grid. What a scale loses at the outputs is
``tr((W - Q(W s) / s) G (W - Q(W s) / s)^T)``: no activations are kept, and no forward is run for a point of the grid.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_qat.ptq.chosen import error_of
from lightning_qat.ptq.column_grid import part_columns
from lightning_qat.ptq.expected_error import conditional_variances, first_of_each, least_expected_error
from lightning_qat.schemes import TensorFormat, get_scheme
from lightning_qat.validation import check_bool, check_choice, check_fraction, check_int

#: Elements that are quantized at a time: 16 MB of scratch.
_PIECE = 2**22
#: Smallest scale before they are normalized, as in the published code.
_LEAST = 1e-4

#: How codes are chosen after the scales.
CODES = ("nearest", "gptq")


@dataclass(frozen=True, kw_only=True)
class AWQOptions:
    """How scales are searched.

    Args:
        grid_points: exponents that are tried: ``0, 1 / grid_points, ...`` short of 1.
        balanced: also divide by the weights' magnitude to the power ``1 - alpha``; None tries both.
        sampled_rows: rows of each weight that rank the grid; the best few are then measured with all.
        finalists: how many these are.
        refine: go on from the best of the grid to the scales of least expected error.
        refinement_steps: of that descent.
        codes: what the scales are for: ``"nearest"``, or ``"gptq"``, which lets later columns make up for an error.
        damping: share of the mean diagonal added to the Gram matrix where it is factored.
        clip: search for the range of each group after scaling.
        keep_scales: where nothing before a Linear can take its scale in, let the Linear multiply its input by the
            inverse, where that gains enough. Files of other libraries, ONNX excepted, have no place for that: False
            leaves such layers unscaled.
    """

    grid_points: int = 20
    balanced: bool | None = None
    sampled_rows: int = 256
    finalists: int = 4
    refine: bool = True
    refinement_steps: int = 100
    codes: str = "nearest"
    damping: float = 0.01
    clip: bool = True
    keep_scales: bool = True

    def __post_init__(self) -> None:
        for name in ("grid_points", "sampled_rows", "finalists"):
            check_int(name, getattr(self, name), 1)
        check_int("refinement_steps", self.refinement_steps, 0)
        for name in ("refine", "clip", "keep_scales"):
            check_bool(name, getattr(self, name))
        if self.balanced is not None:
            check_bool("balanced", self.balanced)
        check_choice("codes", self.codes, CODES)
        check_fraction("damping", self.damping, include_one=False)


@dataclass(frozen=True)
class GridPoint:
    """One point of the grid.

    Args:
        alpha: exponent of the inputs' magnitude.
        balanced: whether it was divided by the weights' magnitude to the power ``1 - alpha``.
        loss: over the rows that were looked at, scaled up to all of them.
    """

    alpha: float
    balanced: bool
    loss: float


@dataclass(frozen=True, eq=False)
class AWQScales:
    """What was found for weights that share an input.

    Args:
        scales: float32 ``[K]``: weights are to be multiplied by them, inputs divided.
        alpha: of the grid's best; None where leaving weights as they are is best.
        balanced: of the grid's best.
        loss: ``sum tr((W - Q(W s) / s) G (W - Q(W s) / s)^T)`` with codes rounded to nearest.
        plain_loss: the same without scales.
        grid: all points.
        refined: whether the scales went on from the grid's best.
    """

    scales: Tensor
    alpha: float | None
    balanced: bool
    loss: float
    plain_loss: float
    grid: tuple[GridPoint, ...]
    refined: bool


def awq_scale(
    magnitude: Tensor, alpha: float, weight_magnitude: Tensor | None = None, tied: Tensor | None = None
) -> Tensor:
    """Return the scales of one point of the grid, ``[K]``, normalized so that largest times smallest is 1.

    Args:
        magnitude: mean ``|x|`` of each input, ``[K]``.
        alpha: exponent, 0 to 1.
        weight_magnitude: of :func:`weight_magnitude`; where given, scales are divided by it to the power
            ``1 - alpha``.
        tied: see :func:`search_scales`.
    """
    if tied is not None:
        magnitude = _mean_of_tied(magnitude, tied)
    scale = magnitude.float().pow(alpha)
    if weight_magnitude is not None:
        weight_magnitude = weight_magnitude if tied is None else _mean_of_tied(weight_magnitude, tied)
        scale = scale / (weight_magnitude.pow(1 - alpha) + _LEAST)
    scale = scale.clamp_min(_LEAST)
    scale = scale / (scale.max() * scale.min()).sqrt()
    return of_first(torch.where(torch.isfinite(scale), scale, 1.0), tied)


def weight_magnitude(weights: Sequence[Tensor], formats: Sequence[TensorFormat]) -> Tensor:
    """Return the mean over all rows of ``|W|`` as a share of its group's largest magnitude, float32 ``[K]``."""
    total, rows = torch.zeros(weights[0].shape[1], device=weights[0].device), 0
    for weight, fmt in zip(weights, formats, strict=True):
        for part in weight.split(_rows_of_piece(weight)):
            width = part_columns(fmt, weight.shape) or weight.shape[1]
            groups = part.float().abs().reshape(-1, width)
            total += (groups / (groups.amax(1, keepdim=True) + 1e-6)).reshape(part.shape).sum(0)
        rows += len(weight)
    return total / max(rows, 1)


def scaled_values(weight: Tensor, scale: Tensor, fmt: TensorFormat) -> Tensor:
    """Return ``Q(W s) / s``, float32: each weight as it comes out after rounding to nearest.

    Args:
        weight: ``[N, K]``.
        scale: ``s``, ``[K]``.
        fmt: of the codes.
    """
    scheme, scaled = get_scheme(fmt.scheme), weight.float() * scale
    step, zero = scheme.parameters_of(scaled, fmt)
    return scheme.fake_quantize(scaled, step, zero, fmt) / scale


@torch.no_grad()
def scaled_loss(weight: Tensor, scale: Tensor, gram: Tensor, fmt: TensorFormat) -> float:
    """Return ``tr((W - Q(W s) / s) G (W - Q(W s) / s)^T)``, in pieces of bounded memory, summed in float64.

    Args:
        weight: ``[N, K]``.
        scale: ``s``, ``[K]``.
        gram: ``G``, ``[K, K]``, or its diagonal ``[K]`` where that is all there is.
        fmt: of the codes.
    """
    pieces = weight.split(_rows_of_piece(weight)) if rows_are_independent(fmt, weight.shape) else (weight,)
    total = 0.0
    for part in pieces:
        error = scaled_values(part, scale, fmt).sub_(part)
        if gram.dim() == 1:
            total += float((error * gram).mul_(error).sum(1).sum(dtype=torch.float64))
        else:
            total += error_of(error, gram)
    return total


def rows_are_independent(fmt: TensorFormat, shape: torch.Size) -> bool:
    """Return whether a row is quantized the same without the others."""
    return fmt.axis == 0 or (part_columns(fmt, shape) is not None and (fmt.group_size or fmt.block_size) is not None)


def _rows_of_piece(weight: Tensor) -> int:
    return max(_PIECE // max(weight.shape[1], 1), 1)


@torch.no_grad()
def search_scales(
    weights: Sequence[Tensor],
    gram: Tensor,
    mean_magnitude: Tensor,
    formats: Sequence[TensorFormat],
    options: AWQOptions | None = None,
    tied: Tensor | None = None,
) -> AWQScales:
    """Return the scales of least loss for weights that share an input.

    Args:
        weights: ``[N_i, K]`` each, floating point.
        gram: ``[K, K]``, the sum of ``x x^T`` over the inputs; ``[K]`` is the diagonal of one that has nothing else.
        mean_magnitude: mean ``|x|``, ``[K]``.
        formats: of the weights.
        options: how to search.
        tied: int64 ``[K]``: inputs with the same number, from 0 on, have to get the same scale, as the heads of a
            grouped attention that read the same value head.

    Returns:
        The best that was found; with ``codes="nearest"`` its loss is at most that without scales.

    Raises:
        ValueError: if shapes do not agree or there is no weight.
    """
    options = options or AWQOptions()
    check_group(weights, gram, mean_magnitude, formats)
    weights = [weight.float().contiguous() for weight in weights]
    search = _Search(weights, gram.float(), list(formats), options.sampled_rows)
    magnitude = mean_magnitude.float()
    shared = weight_magnitude(weights, formats)
    grid, scales = [], []
    for alpha, balanced in _points(options):
        scale = awq_scale(magnitude, alpha, shared if balanced else None, tied)
        grid.append(GridPoint(alpha, balanced, search.estimate(scale)))
        scales.append(scale)
    ones = torch.ones_like(magnitude)
    plain = search.loss(ones)
    best, loss, at = ones, plain, -1
    for index in sorted(range(len(grid)), key=lambda i: grid[i].loss)[: options.finalists]:
        exact = grid[index].loss if search.exact else search.loss(scales[index])
        if exact < loss:
            best, loss, at = scales[index], exact, index
    refined = False
    if options.refine and options.refinement_steps:
        best, loss, refined = _refined(search, best, loss, options, tied)
    point = grid[at] if at >= 0 else None
    return AWQScales(
        best, None if point is None else point.alpha, point is not None and point.balanced, loss, plain, tuple(grid),
        refined,
    )  # fmt: skip


def check_group(weights: Sequence[Tensor], gram: Tensor, magnitude: Tensor, formats: Sequence[TensorFormat]) -> None:
    """Raise ``ValueError`` unless weights, Gram matrix, magnitudes and formats belong together."""
    if not weights or len(weights) != len(formats):
        raise ValueError(f"{len(weights)} weights have {len(formats)} formats; give one or more, each with its own")
    size = weights[0].shape[-1]
    shapes = [tuple(weight.shape) for weight in weights]
    if any(len(shape) != 2 or shape[1] != size for shape in shapes):
        raise ValueError(f"weights of shapes {shapes} share no input; give matrices [N_i, K] with the same K")
    if gram.shape not in ((size, size), (size,)) or magnitude.shape != (size,):
        raise ValueError(
            f"gram has shape {tuple(gram.shape)} and magnitudes {tuple(magnitude.shape)}; weights of {size} columns "
            f"take ({size}, {size}) and ({size},)"
        )


def _points(options: AWQOptions) -> Iterator[tuple[float, bool]]:
    for balanced in (False, True) if options.balanced is None else (options.balanced,):
        for step in range(options.grid_points):
            yield step / options.grid_points, balanced


def of_first(scale: Tensor, tied: Tensor | None) -> Tensor:
    """Return ``scale`` with those of tied inputs equal: ``pow`` may differ in the last place from lane to lane."""
    return scale if tied is None else scale[first_of_each(tied)][tied]


def _mean_of_tied(values: Tensor, tied: Tensor) -> Tensor:
    count = len(first_of_each(tied))
    sums = torch.zeros(count, device=values.device).index_add_(0, tied, values.float())
    return (sums / torch.bincount(tied, minlength=count))[tied]


class _Search:
    """Losses of one group of weights at any scale, of a sample of rows or of all."""

    def __init__(self, weights: list[Tensor], gram: Tensor, formats: list[TensorFormat], rows: int) -> None:
        self.weights, self.gram, self.formats = weights, gram, formats
        self.sampled: list[Tensor] = []
        self._factors: list[float] = []
        for weight, fmt in zip(weights, formats, strict=True):
            # Evenly spread, for neighbouring rows belong to one head.
            step = max(len(weight) // rows, 1) if rows_are_independent(fmt, weight.shape) else 1
            self.sampled.append(weight[::step].contiguous())
            self._factors.append(len(weight) / max(len(self.sampled[-1]), 1))
        self.exact = all(factor == 1 for factor in self._factors)

    def estimate(self, scale: Tensor) -> float:
        """Return the loss as the sampled rows have it."""
        return sum(
            factor * scaled_loss(weight, scale, self.gram, fmt)
            for weight, fmt, factor in zip(self.sampled, self.formats, self._factors, strict=True)
        )

    def loss(self, scale: Tensor) -> float:
        """Return the loss of all rows."""
        return sum(
            scaled_loss(weight, scale, self.gram, fmt) for weight, fmt in zip(self.weights, self.formats, strict=True)
        )


def _refined(
    search: _Search, start: Tensor, loss: float, options: AWQOptions, tied: Tensor | None
) -> tuple[Tensor, float, bool]:
    """Return better scales on the way from ``start`` to those of least expected error, if there are any."""
    gram = search.gram
    if gram.dim() == 1:
        cost = gram
    else:
        cost = gram.diagonal() if options.codes == "nearest" else conditional_variances(gram, options.damping)
    end = least_expected_error(
        search.sampled, search.formats, cost, start, steps=options.refinement_steps, tied=tied
    )  # fmt: skip
    if options.codes == "gptq":
        return end, search.loss(end), True
    best, refined = start, False
    for share in (0.25, 0.5, 0.75, 1.0):
        between = of_first(start.pow(1 - share) * end.pow(share), tied)
        found = search.loss(between)
        if found < loss:
            best, loss, refined = between, found, True
    return best, loss, refined

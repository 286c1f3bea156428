"""GPTQ: codes of one weight matrix that make the error of its layer's outputs small.

:func:`choose_gptq` is what the engine calls. ``GPTQOptions.published()`` is what the paper's authors published (Frantar
et al. 2023); by default scales are searched for, and codes and scales refined besides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_qat.ops.gptq import Reached, Steps, gptq_columns, ordered_columns, values_of_levels
from lightning_qat.ops.upper_factor import upper_factor
from lightning_qat.ptq.chosen import ChosenCodes, output_error
from lightning_qat.ptq.column_grid import (
    ColumnGrid,
    check_target,
    codes_of_levels,
    column_grid,
    part_columns,
)
from lightning_qat.ptq.nearest import choose_nearest
from lightning_qat.ptq.refinement import refine
from lightning_qat.ptq.scale_search import search_scales
from lightning_qat.schemes import TensorFormat, get_scheme, scale_shape
from lightning_qat.schemes.finite import check_finite
from lightning_qat.validation import check_bool, check_choice, check_int

#: What errors are weighted with in the search for scales.
SCALE_SEARCHES = ("none", "mse", "gram")

#: A loss that is a smaller share of the one with damping is worked out anew: their difference would be rounding.
_LEAST_SHARE = 0.2

#: The first damping that is tried after 0.0, and what it grows by until the factor is found; the last one tried.
_FIRST_DAMPING, _GROWTH, _MOST_DAMPING = 1e-4, 2.0, 10.0


@dataclass(frozen=True, kw_only=True)
class GPTQOptions:
    """How codes are chosen.

    Args:
        damping: share of the mean of the Gram matrix's diagonal that is added to it; doubled until it can be inverted.
        activation_order: begin with the columns whose inputs are largest.
        static_groups: find all scales before the first column is rounded. Otherwise each group's are found when it is
            reached, of the weights as they are by then; with ``activation_order`` its columns then do not lie together:
            a plain Linear takes its input features in that order, other layers cannot.
        block_size: columns that are rounded before all others follow.
        scale_search: ``"none"`` takes the scales of the extremes; ``"mse"`` those of least squared error of the
            weights, ``"gram"`` of the weights weighted by the power of their inputs.
        sweeps: passes of coordinate descent over the codes that follow, each of which makes the loss smaller.
        refit_scales: fit the scales to the codes in each of these.
        compare: work out what the nearest codes would lose, report it, and take them where that is less. It costs a
            product of the weight and the Gram matrix, about a third of the published algorithm's time.
    """

    damping: float = 0.01
    activation_order: bool = True
    static_groups: bool = True
    block_size: int = 128
    scale_search: str = "gram"
    sweeps: int = 3
    refit_scales: bool = True
    compare: bool = True

    def __post_init__(self) -> None:
        damping = self.damping
        if isinstance(damping, bool) or not isinstance(damping, (int, float)) or not 0 <= damping <= 1:
            raise ValueError(f"damping={damping!r} is not allowed; use a number in [0, 1], such as 0.01")
        for name in ("activation_order", "static_groups", "refit_scales", "compare"):
            check_bool(name, getattr(self, name))
        check_int("block_size", self.block_size, 1)
        check_int("sweeps", self.sweeps, 0)
        check_choice("scale_search", self.scale_search, SCALE_SEARCHES)

    @classmethod
    def published(cls, **changes: Any) -> GPTQOptions:
        """Return the algorithm as it was published: scales of the extremes, nothing refined."""
        return cls(**{"scale_search": "none", "sweeps": 0, **changes})


@torch.no_grad()
def choose_gptq(
    weight: Tensor,
    gram: Tensor,
    fmt: TensorFormat,
    options: GPTQOptions | None = None,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
) -> ChosenCodes:
    """Return codes for ``weight`` whose outputs are off by little; never by more than with the nearest, if compared.

    Where the Gram matrix cannot be used, because it is not finite or cannot be inverted with any damping, each weight
    gets its nearest code; ``notes`` of the result say so.

    Args:
        weight: floating point, ``[out_features, in_features]``.
        gram: ``[in_features, in_features]``, the sum of ``x x^T`` over inputs ``x``, or any positive multiple.
        fmt: integers of 2 to 8 bits or a codebook; scales of a tensor, of rows, groups or blocks.
        options: None is ``GPTQOptions()``.
        scale: given, as learned by QAT, it is kept; shaped as ``scale_shape(weight.shape, fmt)``.
        zero_point: of this ``scale``.

    Raises:
        ValueError: if a shape or the format does not fit, or ``weight`` holds NaN or inf.
    """
    options = options or GPTQOptions()
    _check(weight, gram, fmt, scale)
    if scale is None and orders_groups(weight.shape, fmt, options):
        raise ValueError(
            "static_groups=False with activation_order=True makes groups of columns that do not lie together, which"
            " only a plain Linear can hold; use static_groups=True or activation_order=False, or GPTQQuantizer"
        )
    weight, gram = weight.detach().to(torch.float32), gram.detach().to(weight.device, torch.float32)
    given = None
    if scale is not None:
        zero = torch.zeros_like(scale) if zero_point is None else zero_point
        given = (scale.detach().to(torch.float32), zero.detach().to(torch.int32))
    solved, notes = _solve(gram, options)
    if solved is None:
        return replace(choose_nearest(weight, gram, fmt, *(given or ())), notes=notes)
    nearest = choose_nearest(weight, gram, fmt, *(given or ())) if options.compare else None
    chosen = _choose(weight, solved, fmt, options, given)
    codes, loss = _settled(weight, gram, fmt, solved, chosen)
    if nearest is not None and not loss <= nearest.loss:
        notes += (f"rounding to nearest loses less, {nearest.loss:.6g} instead of {loss:.6g}, and was taken",)
        return replace(nearest, damping=solved.damping, notes=notes)
    kept = None if fmt.symmetric else chosen.zero_point
    nearest_loss = math.nan if nearest is None else nearest.nearest_loss
    return ChosenCodes(codes, chosen.scale, kept, fmt, loss, nearest_loss, solved.damping, notes)


def choose_ordered(
    weight: Tensor, gram: Tensor, fmt: TensorFormat, options: GPTQOptions | None = None, **grid: Tensor | None
) -> ChosenCodes:
    """Return what :func:`choose_gptq` does, with groups in activation order where the options ask for it.

    Columns that follow each other in that order are a group, and the result says which they are.

    Args:
        weight: see :func:`choose_gptq`.
        gram: likewise.
        fmt: likewise.
        options: likewise.
        **grid: ``scale`` and ``zero_point`` that are given: their groups are of neighbours.
    """
    options = options or GPTQOptions()
    if grid.get("scale") is not None or not orders_groups(weight.shape, fmt, options):
        return choose_gptq(weight, gram, fmt, options, **grid)
    order = torch.argsort(gram.diagonal(), descending=True, stable=True)
    lying, gram = weight[:, order.to(weight.device)], gram[order][:, order]
    chosen = choose_gptq(lying, gram, fmt, replace(options, activation_order=False))
    return replace(chosen, order=order.to(weight.device))


def orders_groups(shape: torch.Size, fmt: TensorFormat, options: GPTQOptions) -> bool:
    """Return whether groups are of columns in activation order."""
    width = part_columns(fmt, shape)
    return options.activation_order and not options.static_groups and width is not None and width < shape[1]


def check_gram(gram: Tensor, size: int) -> None:
    """Raise ``ValueError`` unless a Gram matrix is one of ``size`` input features."""
    if gram.shape != (size, size):
        raise ValueError(f"gram has shape {tuple(gram.shape)}; a weight of {size} input features takes {(size, size)}")


def _check(weight: Tensor, gram: Tensor, fmt: TensorFormat, scale: Tensor | None) -> None:
    check_target(fmt)
    if weight.dim() != 2 or not weight.is_floating_point() or not weight.numel():
        raise ValueError(
            f"weight is {weight.dtype} of shape {tuple(weight.shape)}; use floating point [out_features, in_features]"
        )
    size = weight.shape[1]
    check_gram(gram, size)
    if fmt.group_size is not None and size % fmt.group_size:
        raise ValueError(f"group_size must divide in_features: {size} % {fmt.group_size} != 0")
    check_finite(weight)
    if scale is None:
        return
    if scale.shape != scale_shape(weight.shape, fmt):
        raise ValueError(f"scale has shape {tuple(scale.shape)}; {fmt} takes {scale_shape(weight.shape, fmt)}")
    if not bool((torch.isfinite(scale) & (scale > 0)).all()) and fmt.block_size is None:
        raise ValueError("scale holds a value that is not positive and finite; give the scales that QAT learned")


# --- the matrix to be solved ----------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Solved:
    """The Gram matrix divided by ``unit``: its diagonal and the upper factor with columns in ``order``.

    ``diagonal`` has ``added`` in it, as does the matrix that was decomposed.
    """

    gram: Tensor
    unit: Tensor
    diagonal: Tensor
    added: Tensor
    upper: Tensor
    order: Tensor
    damping: float

    def hessian(self) -> Tensor:
        """Return the matrix that was decomposed, its columns as they lie."""
        hessian = self.gram / self.unit
        hessian.diagonal().copy_(self.diagonal)
        return hessian


def _solve(gram: Tensor, options: GPTQOptions) -> tuple[_Solved | None, tuple[str, ...]]:
    """Return the factor found with the least damping of the ladder, and notes of what was done about the matrix."""
    power = gram.diagonal()
    # A sum has no end if one of its terms has none; it also may where all have.
    finite = bool(torch.isfinite(gram.sum())) or bool(torch.isfinite(gram).all())
    if not finite or bool((power < 0).any()):
        return None, ("the Gram matrix holds NaN, infinity or a negative power: weights were rounded to nearest",)
    dead = power == 0
    notes: tuple[str, ...] = ()
    if bool(dead.any()):
        notes = (f"{int(dead.sum())} of {len(power)} input features were always 0: weights rounded to nearest",)
    # In units of the mean power nothing of this under- or overflows.
    unit = power.mean(dtype=torch.float64).clamp_min(torch.finfo(torch.float32).tiny).to(torch.float32)
    own = power / unit
    plain, damping = own.masked_fill(dead, 1.0), options.damping
    order = torch.arange(len(power), device=gram.device)
    if options.activation_order:
        order = torch.argsort(power, descending=True, stable=True)
    while True:
        diagonal = plain + damping
        upper = upper_factor(gram, diagonal[order], order if options.activation_order else None, unit)
        if upper is not None:
            if damping != options.damping:
                notes += (f"damping was raised from {options.damping:g} to {damping:g}",)
            return _Solved(gram, unit, diagonal, diagonal - own, upper, order, damping), notes
        damping = max(damping * _GROWTH, _FIRST_DAMPING)
        if damping > _MOST_DAMPING:
            return None, (*notes, "the Gram matrix has no inverse with any damping: weights were rounded to nearest")


# --- the codes ------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Chosen:
    """What GPTQ chose: codes of the ops, transposed, scales and zero points as the scheme has them, and the loss.

    ``damped`` is what the loss has of what was added to the diagonal; ``order`` which columns the codes are of, None
    where these are as they lie.
    """

    codes: Tensor
    order: Tensor | None
    scale: Tensor
    zero_point: Tensor
    loss: float
    damped: float


def _choose(
    weight: Tensor, solved: _Solved, fmt: TensorFormat, options: GPTQOptions, given: tuple[Tensor, Tensor] | None
) -> _Chosen:
    scale, zero = given if given is not None else _scales_of(weight, fmt, options, solved.diagonal)
    grid = column_grid(fmt, weight.shape, scale, zero)
    columns = ordered_columns(weight, solved.order)
    width = part_columns(fmt, weight.shape)
    found = given is None and not options.static_groups and width is not None and width < weight.shape[1]
    walk = _GroupsWhenReached(grid, fmt, options, solved, int(width or 0), zero) if found else None

    def steps_of(start: int, stop: int, reached: Reached) -> Steps:
        if walk is not None:
            walk.reach(start, stop, reached)
        return grid.of(solved.order[start:stop])

    codes, total = gptq_columns(columns, solved.upper, steps_of, grid.levels, options.block_size)
    order: Tensor | None = solved.order
    loss, added = float(total), solved.added[solved.order]
    if walk is not None:
        scale, zero = walk.scale, walk.zero_point
    if options.sweeps:
        refits, lying = given is None and options.refit_scales and not fmt.nested, weight.t().contiguous()
        codes, order = torch.empty_like(codes).index_copy_(0, solved.order, codes), None
        codes, grid, loss = refine(
            lying, codes, solved.hessian(), grid, sweeps=options.sweeps, width=width if refits else None,
            shared_by_rows=not scale.dim(), block_size=options.block_size,
        )  # fmt: skip
        steps = grid.of(torch.arange(len(lying), device=lying.device))
        columns, added = lying - values_of_levels(codes, steps, grid.levels), solved.added
        if refits and width is not None:
            scale = _scale_of(grid, scale)
    damped = float(torch.linalg.vector_norm(columns, dim=1).square_().mul_(added).sum(dtype=torch.float64))
    return _Chosen(codes, order, scale, zero, loss, damped)


def _scales_of(weight: Tensor, fmt: TensorFormat, options: GPTQOptions, power: Tensor) -> tuple[Tensor, Tensor]:
    if options.scale_search == "none":
        return get_scheme(fmt.scheme).parameters_of(weight, fmt)
    return search_scales(weight, fmt, power if options.scale_search == "gram" else torch.ones_like(power))


def _scale_of(grid: ColumnGrid, like: Tensor) -> Tensor:
    """Return the steps of a grid in the shape that the scheme has them."""
    return (grid.step[0, 0] if not like.dim() else grid.step.t()).reshape(like.shape).clone()


class _GroupsWhenReached:
    """Gives each group its scales once it is reached, of the weights as the columns before have changed them."""

    def __init__(
        self, grid: ColumnGrid, fmt: TensorFormat, options: GPTQOptions, solved: _Solved, width: int, zero: Tensor
    ) -> None:
        self.grid, self.fmt, self.options, self.width = grid, fmt, options, width
        self.power = solved.diagonal
        parts, rows = grid.step.shape
        self._zero = torch.zeros((parts, rows), dtype=torch.int32, device=grid.step.device)
        self._shape = zero.shape

    def reach(self, start: int, stop: int, reached: Reached) -> None:
        for first in range(-(-start // self.width) * self.width, stop, self.width):
            last = first + self.width
            columns = reached(first, last).t().contiguous()
            scale, zero = _scales_of(columns, self.fmt, self.options, self.power[first:last])
            part = first // self.width
            self.grid.step[part] = scale.reshape(-1)
            self._zero[part] = zero.reshape(-1)
            if self.grid.zero is not None:
                self.grid.zero[part] = zero.reshape(-1).to(torch.float32)

    @property
    def scale(self) -> Tensor:
        return self.grid.step.t().reshape(self._shape).clone()

    @property
    def zero_point(self) -> Tensor:
        return self._zero.t().reshape(self._shape).clone()


def _settled(weight: Tensor, gram: Tensor, fmt: TensorFormat, solved: _Solved, chosen: _Chosen) -> tuple[Tensor, float]:
    """Return the codes of the format and their loss."""
    scheme = get_scheme(fmt.scheme)
    codes = codes_of_levels(chosen.codes, fmt, chosen.order)
    scale = scheme.effective_scale(chosen.scale, fmt)

    def values() -> Tensor:
        return scheme.dequantize(codes, scale, chosen.zero_point, fmt, torch.float32)

    if scheme.block_size is not None:
        # Of several codes with one value the one that this value has, and of nested scales what is stored.
        codes = scheme.quantize(values(), chosen.scale, chosen.zero_point, fmt)
    # What the algorithm summed up, less what the damping and the ones for dead features are in it: no further product.
    loss = chosen.loss - chosen.damped
    if fmt.nested or not loss > _LEAST_SHARE * chosen.loss:
        return codes, output_error(weight, values(), gram)
    return codes, loss * float(solved.unit)

"""Ranges cut where the outputs lose least by it, searched with the Gram matrix of the inputs.

The published search (Lin et al. 2023, AWQ's ``auto_clip``) looks at each group of weights alone. Here that is where it
begins: groups are then gone through again with the errors of all others as they are, so that the loss of no row grows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_qat.native.clipping import best_shares
from lightning_qat.ops.fake_quantize import quant_range
from lightning_qat.ptq.awq import rows_are_independent
from lightning_qat.ptq.chosen import ChosenCodes, output_error
from lightning_qat.ptq.column_grid import part_columns
from lightning_qat.ptq.nearest import choose_nearest
from lightning_qat.ptq.scale_search import search_scales as search_ranges
from lightning_qat.schemes import IntegerScheme, TensorFormat, get_scheme, rows_of, scale_shape
from lightning_qat.validation import check_fraction, check_int

#: Elements of weights that are worked on at a time.
_PIECE = 2**22
#: Groups of more columns are not tried at every share: each takes products with all of the Gram matrix.
_WIDE = 512


@dataclass(frozen=True, kw_only=True)
class ClippingOptions:
    """How ranges are searched.

    Args:
        least_share: smallest share of a group's range that is tried.
        shares: how many are tried, evenly spread up to the whole range.
        sweeps: most passes over all groups, each with the errors of the others as they are.
    """

    least_share: float = 0.5
    shares: int = 20
    sweeps: int = 3

    def __post_init__(self) -> None:
        check_fraction("least_share", self.least_share, include_one=False)
        check_int("shares", self.shares, 1)
        check_int("sweeps", self.sweeps, 0)


@torch.no_grad()
def choose_clipped(
    weight: Tensor,
    gram: Tensor,
    fmt: TensorFormat,
    options: ClippingOptions | None = None,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
) -> ChosenCodes:
    """Return nearest codes on the grids of least loss; the loss is at most that of the grids of the extremes.

    Args:
        weight: ``[N, K]``.
        gram: ``[K, K]``, the sum of ``x x^T`` over inputs.
        fmt: of the codes.
        options: how to search.
        scale: of a given grid, which stays as it is.
        zero_point: of a given grid.
    """
    options = options or ClippingOptions()
    nearest = choose_nearest(weight, gram, fmt, scale, zero_point)
    if scale is not None:
        return replace(nearest, notes=("its grid is given: nothing to clip",))
    width = part_columns(fmt, weight.shape)
    if width is None or fmt.nested or not weight.numel():
        return replace(nearest, notes=("blocks that go on in the next row are not clipped",) if width is None else ())
    values, gram = weight.float(), gram.float()
    if not rows_are_independent(fmt, weight.shape):
        found = _whole_tensor(values, gram, fmt, options)
    else:
        rows = max(_PIECE // weight.shape[1], 1)
        parts = [_of_rows(part, gram, fmt, width, options) for part in values.split(rows)]
        shape = scale_shape(weight.shape, fmt)
        found = (
            torch.cat([part[0] for part in parts]).reshape(shape),
            torch.cat([part[1] for part in parts]).reshape(shape),
        )
    scheme = get_scheme(fmt.scheme)
    codes = scheme.quantize(weight, *found, fmt)
    zero = None if fmt.symmetric else found[1]
    made = ChosenCodes(codes, found[0], zero, fmt, 0.0, nearest.loss)
    loss = output_error(weight, made.values(), gram)
    return replace(made, loss=loss) if loss <= nearest.loss else nearest


def _shares(fmt: TensorFormat, options: ClippingOptions) -> list[float]:
    """Return the shares of the range that are tried, the whole first."""
    step = (1 - options.least_share) / options.shares
    found = [1 - step * i for i in range(options.shares + 1)]
    if fmt.symmetric and fmt.bits < 8 and get_scheme(fmt.scheme).block_size is None:
        # The largest positive code lies half a step inside of the range: this gives it all of the range.
        half = 2 ** (fmt.bits - 1)
        found.append((half - 0.5) / (half - 1))
    return found


class _Ranges:
    """The ranges of rows of weights and the errors of rounding within parts of these."""

    def __init__(self, rows: Tensor, fmt: TensorFormat) -> None:
        self.rows, self.fmt, self.scheme = rows, fmt, get_scheme(fmt.scheme)
        per_scale = rows_of(rows, fmt)
        low, high = per_scale.amin(1), per_scale.amax(1)
        if fmt.symmetric:
            high = torch.maximum(high, -low)
            low = -high
        self.low, self.high = low, high
        self._shape = scale_shape(rows.shape, fmt)

    def parameters(self, low: Tensor | float, high: Tensor | float) -> tuple[Tensor, Tensor]:
        """Return scale and zero point of shares of the range."""
        low, high = (self.low * low).reshape(self._shape), (self.high * high).reshape(self._shape)
        return self.scheme.parameters(low, high, self.fmt)

    def errors(self, low: Tensor | float, high: Tensor | float) -> Tensor:
        """Return ``Q - W``, shaped as the rows."""
        return self.scheme.fake_quantize(self.rows, *self.parameters(low, high), self.fmt).sub_(self.rows)

    def best_of(self, low: Tensor, high: Tensor, own: Tensor, others: Tensor | None) -> Tensor | None:
        """Return which shares lose least of those of each row, ``[tries, rows]``; None where they are tried in turn."""
        if type(self.scheme) is not IntegerScheme:
            return None
        step, zero = self.scheme.parameters(self.low * low, self.high * high, self.fmt)
        at_zero = None if self.fmt.symmetric else zero.to(torch.float32)
        return best_shares(self.rows, own, others, step, at_zero, quant_range(self.fmt.bits, self.fmt.symmetric))


def _whole_tensor(weight: Tensor, gram: Tensor, fmt: TensorFormat, options: ClippingOptions) -> tuple[Tensor, Tensor]:
    ranges = _Ranges(weight, fmt)

    def loss(share: float) -> float:
        errors = ranges.errors(share, share)
        return float(torch.mm(errors, gram).mul_(errors).sum(dtype=torch.float64))

    best = min(_shares(fmt, options), key=loss)
    return ranges.parameters(best, best)


def _of_rows(
    weight: Tensor, gram: Tensor, fmt: TensorFormat, width: int, options: ClippingOptions
) -> tuple[Tensor, Tensor]:
    """Return scales and zero points of rows that are quantized without the others, flat."""
    if width > _WIDE:
        return _of_wide_rows(weight, gram, fmt)
    low = high = _each_alone(weight, gram, fmt, width, options)
    whole = torch.ones_like(low)
    ranges = _Ranges(weight, fmt)
    better = _row_losses(ranges.errors(low, high), gram) < _row_losses(ranges.errors(1.0, 1.0), gram)
    low = high = torch.where(better.unsqueeze(1), low.view(len(weight), -1), whole.view(len(weight), -1)).view(-1)
    low, high = _sweep(weight, gram, fmt, width, (low, high), options)
    scale, zero = ranges.parameters(low, high)
    return scale.reshape(-1), zero.reshape(-1)


def _of_wide_rows(weight: Tensor, gram: Tensor, fmt: TensorFormat) -> tuple[Tensor, Tensor]:
    """Return for each row the range of its extremes or the one that is best for uncorrelated inputs."""
    ranges, scheme = _Ranges(weight, fmt), get_scheme(fmt.scheme)
    plain, cut = ranges.parameters(1.0, 1.0), search_ranges(weight, fmt, gram.diagonal())
    losses = [
        _row_losses(scheme.fake_quantize(weight, *grid, fmt).sub_(weight), gram) for grid in (plain, cut)
    ]  # fmt: skip
    better = (losses[1] < losses[0]).view(-1, 1)
    scale, zero = (
        torch.where(better, b.reshape(len(weight), -1), a.reshape(len(weight), -1)).view(-1)
        for a, b in zip(plain, cut, strict=True)
    )
    return scale, zero


def _row_losses(errors: Tensor, gram: Tensor) -> Tensor:
    return torch.mm(errors, gram).mul_(errors).sum(1)


def _each_alone(weight: Tensor, gram: Tensor, fmt: TensorFormat, width: int, options: ClippingOptions) -> Tensor:
    """Return the best share of each group with no error anywhere else, flat."""
    at_once = _each_alone_at_once(weight, gram, fmt, width, options)
    if at_once is not None:
        return at_once
    ranges, count = _Ranges(weight, fmt), weight.shape[1] // width
    blocks = torch.stack([gram[i * width : (i + 1) * width, i * width : (i + 1) * width] for i in range(count)])
    best = torch.full((len(weight), count), torch.inf, device=weight.device)
    share = torch.ones_like(best)
    for tried in _shares(fmt, options):
        errors = ranges.errors(tried, tried).view(len(weight), count, width).transpose(0, 1)
        loss = torch.bmm(errors, blocks).mul_(errors).sum(2).t()
        better = loss < best
        best = torch.where(better, loss, best)
        share = torch.where(better, tried, share)
    return share.reshape(-1)


def _each_alone_at_once(
    weight: Tensor, gram: Tensor, fmt: TensorFormat, width: int, options: ClippingOptions
) -> Tensor | None:
    shares = torch.tensor(_shares(fmt, options), dtype=torch.float32, device=weight.device)
    tried, found = shares[:, None].expand(-1, len(weight)), []
    for start in range(0, weight.shape[1], width):
        columns = slice(start, start + width)
        best = _Ranges(weight[:, columns].contiguous(), fmt).best_of(tried, tried, gram[columns, columns], None)
        if best is None:
            return None
        found.append(shares[best])
    return torch.stack(found, 1).reshape(-1)


def _sweep(
    weight: Tensor,
    gram: Tensor,
    fmt: TensorFormat,
    width: int,
    shares: tuple[Tensor, Tensor],
    options: ClippingOptions,
) -> tuple[Tensor, Tensor]:
    """Return shares of the range, below and above, that are better for all groups together, flat."""
    low, high = (share.view(len(weight), -1).clone() for share in shares)
    errors = _Ranges(weight, fmt).errors(low.view(-1), high.view(-1))
    ways = _ways(fmt)
    for number in range(options.sweeps):
        products, changed = torch.mm(errors, gram), False
        for group in range(weight.shape[1] // width):
            columns = slice(group * width, (group + 1) * width)
            own = gram[columns, columns]
            ranges = _Ranges(weight[:, columns].contiguous(), fmt)
            before = errors[:, columns].clone()
            now, way = (low[:, group].clone(), high[:, group].clone()), ways[number % len(ways)]
            tried = [now, *(way(share, *now) for share in _shares(fmt, options))]
            others = products[:, columns] - torch.mm(before, own)
            at_low, at_high = _best_with_others(ranges, before, own, others, tried)
            errors[:, columns] = ranges.errors(at_low, at_high)
            low[:, group], high[:, group] = at_low, at_high
            products.addmm_(errors[:, columns] - before, gram[columns])
            changed = changed or not torch.equal(before, errors[:, columns])
        if not changed and number >= len(ways):
            break
    return low.view(-1), high.view(-1)


def _best_with_others(
    ranges: _Ranges, before: Tensor, own: Tensor, others: Tensor, tried: list[tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Return the shares of least loss of those tried; ``before`` are the errors of the first."""
    lows, highs = (torch.stack(ends) for ends in zip(*tried, strict=True))
    at_once = ranges.best_of(lows, highs, own, others)
    if at_once is not None:
        return lows.gather(0, at_once[None])[0], highs.gather(0, at_once[None])[0]
    best, (at_low, at_high) = _with_others(before, own, others), tried[0]
    for low, high in tried[1:]:
        loss = _with_others(ranges.errors(low, high), own, others)
        better = loss < best
        best = torch.where(better, loss, best)
        at_low, at_high = torch.where(better, low, at_low), torch.where(better, high, at_high)
    return at_low, at_high


def _with_others(errors: Tensor, own: Tensor, others: Tensor) -> Tensor:
    """Return what the loss of each row has of one group: ``e G e^T + 2 e (E_others G)^T``."""
    return (torch.mm(errors, own).add_(others, alpha=2).mul_(errors)).sum(1)


_Way = Callable[[float, Tensor, Tensor], tuple[Tensor, Tensor]]


def _ways(fmt: TensorFormat) -> list[_Way]:
    """Return how a share is tried in each sweep: on both sides, above alone, below alone."""

    def both(share: float, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        return torch.full_like(low, share), torch.full_like(high, share)

    def above(share: float, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        return low, torch.full_like(high, share)

    def below(share: float, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        return torch.full_like(low, share), high

    return [both] if fmt.symmetric else [both, above, below]

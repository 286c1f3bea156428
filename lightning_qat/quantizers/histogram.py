"""Histograms of observed values, and the range that each of three criteria takes from one.

Pure functions on tensors; the observers hold the state. A histogram is a row of ``B`` equal bins over
``[-R, R)``, where ``R`` is a power of two above every magnitude seen. Doubling ``R`` merges the bins
pairwise about the centre, so that a row never depends on how its data were cut into batches.

``R`` is float64, because the power of two above the largest float32 is no float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_qat.ops.affine import choose_scale_zero_point
from lightning_qat.ops.fake_quantize import fake_quantize, quant_range

#: Elements worked on at once. Temporaries of 1 MiB stay in a CPU's cache: binning 4 million values in
#: one piece took five times as long as in pieces of this size.
_CHUNK = 1 << 17

#: Fractions of an end of the range that the search tries: steps of 2**(1/4) down to the width of a bin
#: of the default histogram, and zero. Geometric, since one outlier may stretch a range a hundredfold.
_COARSE = (*(2.0 ** (-i / 4) for i in range(45)), 0.0)

#: Factors tried around the best of the coarse ones, up to its neighbours: steps of 2 percent, at which
#: the squared error, flat at its minimum, is right to a fraction of a percent.
_FINE = tuple(2.0 ** (i / 32) for i in range(-7, 8))

#: ``(low, high)`` of shape ``[C, K]`` -> error ``[C, K]``, float64.
_ErrorOf = Callable[[Tensor, Tensor], Tensor]


class Histogram(NamedTuple):
    """What is known of the values of ``C`` channels.

    Attributes:
        counts: ``[C, B]``, int64.
        half_range: ``[C]``, float64: ``R``; 0 for a row whose values are all zero.
        low: ``[C]``, float32, the exact minimum.
        high: ``[C]``, float32, the exact maximum.
    """

    counts: Tensor
    half_range: Tensor
    low: Tensor
    high: Tensor

    @property
    def span(self) -> Tensor:
        """``half_range``, and 1 where it is 0: to divide by."""
        return torch.where(self.half_range > 0, self.half_range, torch.ones_like(self.half_range))


def covering_power(magnitude: Tensor) -> Tensor:
    """Return the smallest power of two above each ``magnitude``, float64, and 0 for 0."""
    wide = magnitude.double()  # a denormal float32 is a normal float64
    # x = m * 2**e with 0.5 <= m < 1, so the quotient is 2**e without rounding; exp2 may be off by an ulp.
    return torch.where(wide > 0, wide / torch.frexp(wide).mantissa, torch.zeros_like(wide))


def doublings(old: Tensor, new: Tensor) -> Tensor:
    """Return how often ``old`` doubles to become ``new``, int64; 0 where ``old`` is 0."""
    ratio = torch.where(old > 0, new / old, torch.ones_like(new))
    return torch.frexp(ratio).exponent.long() - 1


def merge_bins(rows: Tensor, shift: Tensor) -> Tensor:
    """Return histograms whose range has doubled ``shift`` times: no interpolation, sums are kept.

    Args:
        rows: ``[C, B]`` counts or sums.
        shift: ``[C]``, int64.
    """
    half = rows.shape[1] // 2
    offset = torch.arange(-half, half, device=rows.device)
    # Bin j of the offsets covers [j, j + 1) widths, and floor(j / 2**k) is an arithmetic shift.
    index = (offset >> shift.clamp(max=62)[:, None]) + half
    return torch.zeros_like(rows).scatter_add_(1, index, rows)


def add_values_(counts: Tensor, sums: Tensor | None, values: Tensor, half_range: Tensor) -> None:
    """Add values to histograms, in place.

    Args:
        counts: ``[C, B]``, int64.
        sums: ``[C, B]``, float64, of the values in each bin; None where they are not kept.
        values: ``[C, n]``, finite, magnitudes below ``half_range``.
        half_range: ``[C]``, float64; 0 for a row whose values are all zero.
    """
    channels, bins = counts.shape
    # One rounding, the same whatever R is, as R is a power of two: that makes merging exact. In float64,
    # where a small value over a large R does not underflow to the wrong side of zero.
    per_width = (bins // 2 / torch.where(half_range > 0, half_range, torch.ones_like(half_range)))[:, None]
    first = (torch.arange(channels, device=counts.device) * bins + bins // 2)[:, None]
    one = torch.ones((), dtype=counts.dtype, device=counts.device)
    for part in values.split(max(1, _CHUNK // channels), dim=1):
        wide = part.float().double()
        index = ((wide * per_width).floor_().long() + first).flatten()
        counts.view(-1).scatter_add_(0, index, one.expand_as(index))
        if sums is not None:
            sums.view(-1).scatter_add_(0, index, wide.flatten())


def percentile_range(seen: Histogram, percentile: float) -> tuple[Tensor, Tensor]:
    """Return the ``100 - percentile`` and the ``percentile`` percentile of each row.

    Interpolates between order statistics as numpy's default does; an order statistic is known to
    within its bin, the first and the last exactly.

    Args:
        seen: not empty.
        percentile: above 50, to 100.
    """
    half, last_bin = seen.counts.shape[1] // 2, seen.counts.shape[1] - 1
    width = seen.half_range / half
    cumulative = seen.counts.cumsum(1)
    last = cumulative[:, -1] - 1
    lowest, highest = seen.low.double(), seen.high.double()

    def order_statistic(rank: Tensor) -> Tensor:
        index = torch.searchsorted(cumulative, rank[:, None], right=True).clamp(max=last_bin)
        count = seen.counts.gather(1, index)
        rank_in_bin = rank[:, None] - (cumulative.gather(1, index) - count)
        value = (index - half + (rank_in_bin + 0.5) / count)[:, 0] * width
        value = torch.minimum(torch.maximum(value, lowest), highest)
        return torch.where(rank <= 0, lowest, torch.where(rank >= last, highest, value))

    def at(fraction: float) -> Tensor:
        position = fraction * last.double()
        rank = position.floor().long()
        below, above = order_statistic(rank), order_statistic(rank + 1)
        return (below + (above - below) * (position - rank)).float()

    return at((100.0 - percentile) / 100.0), at(percentile / 100.0)


class _Best:
    """The range inside ``[low, high]`` with the least error so far, for each row.

    Starts from the whole of it, and a tie keeps the earlier, so that no result is worse than min-max.
    """

    def __init__(self, error_of: _ErrorOf, low: Tensor, high: Tensor, chunk: int) -> None:
        self.error_of, self.chunk = error_of, chunk
        self.low, self.high = low, high
        self._floor, self._ceiling = low[:, None], high[:, None]
        self.error = error_of(self._floor, self._ceiling)[:, 0]

    def inside(self, ends: Tensor, factors: Tensor) -> Tensor:
        """Return ``[C, K]`` products of ``[C, 1]`` ends with ``[K]`` factors, clamped to the whole range."""
        return torch.minimum(torch.maximum(ends * factors, self._floor), self._ceiling)

    def consider(self, lows: Tensor, highs: Tensor) -> None:
        """Take the best of ``[C, K]`` candidates where it is better."""
        lows, highs = torch.broadcast_tensors(lows, highs)
        parts = zip(lows.split(self.chunk, dim=1), highs.split(self.chunk, dim=1), strict=True)
        error, index = torch.cat([self.error_of(*part) for part in parts], dim=1).min(1)
        better = error < self.error
        self.low = torch.where(better, lows.gather(1, index[:, None])[:, 0], self.low)
        self.high = torch.where(better, highs.gather(1, index[:, None])[:, 0], self.high)
        self.error = torch.where(better, error, self.error)


def _row_chunks(channels: int, columns: int) -> Iterator[slice]:
    step = max(1, _CHUNK // columns)
    for start in range(0, channels, step):
        yield slice(start, start + step)


def _factors(values: tuple[float, ...], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device)


def _filled(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Return the indices ``[C, M]`` of the bins that are not empty, and their counts as float64.

    A row of a weight holds far fewer values than there are bins. ``M`` is the most of any row; a row with
    fewer is filled up with empty bins.
    """
    filled = counts > 0
    most = max(1, int(filled.sum(1).max()))
    index = filled.byte().argsort(dim=1, descending=True, stable=True)[:, :most]
    return index, counts.gather(1, index).double()


def uniform_squared_error(
    counts: Tensor, left: Tensor, width: Tensor, low: Tensor, high: Tensor, *, symmetric: bool, bits: int
) -> Tensor:
    """Return the squared quantization error of histograms whose values are uniform within a bin.

    The integral of ``(u - clamp(round(u)))**2`` is ``n / 12 + r**3 / 3`` with ``n = clamp(round(u))`` and
    ``r = u - n``, so a bin costs its two edges whether it is wider or narrower than a step.

    Args:
        counts: ``[C, B]``, float64.
        left: ``[C, B]``, float64, the lower edge of each bin.
        width: ``[C]``, float64, of the bins.
        low: ``[C, K]``, candidates.
        high: ``[C, K]``.
        symmetric: of the grid.
        bits: of the grid.

    Returns:
        ``[C, K]``, float64: the sum over all values.
    """
    scale, zero_point = choose_scale_zero_point(low, high, bits=bits, symmetric=symmetric)
    first, last = quant_range(bits, symmetric)
    step = scale.double()[..., None]
    zero = torch.zeros_like(step) if zero_point is None else zero_point.double()[..., None]

    def integral(edges: Tensor) -> Tensor:
        u = edges[:, None, :] / step
        code = u.round().clamp_(first - zero, last - zero)
        rest = u.sub_(code)
        return (rest * rest).mul_(rest).div_(3).add_(code, alpha=1 / 12)

    per_bin = integral(left + width[:, None]).sub_(integral(left)).mul_(counts[:, None, :])
    return per_bin.sum(-1) * step[..., 0].pow(3) / width[:, None]


def least_squares_range(seen: Histogram, *, symmetric: bool, bits: int) -> tuple[Tensor, Tensor]:
    """Return the range inside the exact one with the least expected squared quantization error.

    What torch.ao's ``HistogramObserver`` looks for, by another search: one threshold for both ends,
    then each end by itself (coordinate descent), then a finer grid around the best.

    Args:
        seen: not empty.
        symmetric: of the grid; its range has one threshold.
        bits: of the grid.
    """
    index, counts = _filled(seen.counts)
    half = seen.counts.shape[1] // 2
    width = seen.span / half
    left = (index - half) * width[:, None]
    found = []
    for rows in _row_chunks(*index.shape):
        part = counts[rows], left[rows], width[rows]

        def error_of(lows: Tensor, highs: Tensor, part: tuple[Tensor, Tensor, Tensor] = part) -> Tensor:
            return uniform_squared_error(*part, lows, highs, symmetric=symmetric, bits=bits)

        best = _Best(error_of, seen.low[rows], seen.high[rows], max(1, _CHUNK // part[0].numel()))
        _descend(best, symmetric)
        found.append((best.low, best.high))
    return torch.cat([pair[0] for pair in found]), torch.cat([pair[1] for pair in found])


def _descend(best: _Best, symmetric: bool) -> None:
    low, high, inside = best.low[:, None], best.high[:, None], best.inside
    coarse, fine = _factors(_COARSE, low), _factors(_FINE, low)
    absmax = torch.maximum(-low, high)
    best.consider(inside(-absmax, coarse), inside(absmax, coarse))
    if symmetric:
        threshold = torch.maximum(-best.low, best.high)[:, None]
        best.consider(inside(-threshold, fine), inside(threshold, fine))
        return
    for _ in range(2):
        before = best.error
        best.consider(inside(low, coarse), best.high[:, None])
        best.consider(best.low[:, None], inside(high, coarse))
        if torch.equal(before, best.error):
            break
    best.consider(inside(best.low[:, None], fine), inside(best.high[:, None], fine))
    best.consider(inside(best.low[:, None], fine), best.high[:, None])
    best.consider(best.low[:, None], inside(best.high[:, None], fine))


def shrunk_range(
    seen: Histogram, sums: Tensor, factors: tuple[float, ...], norm: float, *, symmetric: bool, bits: int
) -> tuple[Tensor, Tensor]:
    """Return the exact range times the factor with the least ``|x - fake_quantize(x)|**norm``.

    The search of GPTQ's and llm-compressor's ``mse`` observers, on the mean of each bin.

    Args:
        seen: not empty.
        sums: ``[C, B]``, of the values in each bin.
        factors: to try on both ends.
        norm: exponent of the error.
        symmetric: of the grid.
        bits: of the grid.
    """
    index, counts = _filled(seen.counts)
    means = (sums.gather(1, index) / counts.clamp(min=1)).float()
    shrink = _factors(factors, seen.low)
    found = []
    for rows in _row_chunks(*index.shape):
        # In units of R, where a power of the error can neither overflow nor vanish.
        x, weight, span = means[rows], counts[rows, None], seen.span[rows, None, None]

        def error_of(
            lows: Tensor, highs: Tensor, x: Tensor = x, weight: Tensor = weight, span: Tensor = span
        ) -> Tensor:
            scale, zero = choose_scale_zero_point(lows, highs, bits=bits, symmetric=symmetric)
            tiled = x[:, None, :].expand(*lows.shape, -1).flatten(0, 1)
            flat_zero = None if zero is None else zero.flatten()
            q = fake_quantize(tiled, scale.flatten(), flat_zero, bits=bits, symmetric=symmetric, axis=0)
            error = (q.double() - tiled.double()).reshape(*lows.shape, -1).div_(span).abs_().pow_(norm)
            return error.mul_(weight).sum(-1)

        best = _Best(error_of, seen.low[rows], seen.high[rows], max(1, _CHUNK // x.numel()))
        best.consider(best.inside(seen.low[rows, None], shrink), best.inside(seen.high[rows, None], shrink))
        found.append((best.low, best.high))
    return torch.cat([pair[0] for pair in found]), torch.cat([pair[1] for pair in found])

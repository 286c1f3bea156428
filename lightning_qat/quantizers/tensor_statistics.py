"""What a float tensor looks like, before a number format is chosen for it.

Everything is exact: moments are sums in float64 about the mean, percentiles are order statistics of the values
themselves, found by radix selection on their bits. Memory stays that of a chunk, whatever the size of the tensor
(``torch.quantile`` takes 16 million elements at most).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

#: Elements worked on at once: the temporaries stay in a CPU's cache.
_CHUNK = 1 << 17

#: Bits of a key that one pass of the radix selection sorts by.
_DIGIT = 16

_PERCENTILES = {"p0_1": 0.1, "p1": 1.0, "p50": 50.0, "p99": 99.0, "p99_9": 99.9}

#: An outlier is further from the mean than this many standard deviations: of normal values, 2 in a thousand million.
_OUTLIER_STDS = 6


@dataclass(frozen=True, kw_only=True)
class QuantizationStats:
    """Statistics of the finite values of a tensor; NaN where there are none.

    ``peak_to_rms_db`` says what a uniform grid can do: ``b`` bits per tensor, symmetric, reach an SQNR of about
    ``6.02 b + 4.77 - peak_to_rms_db`` dB. Where it is large, ``outlier_fraction`` is small and ``channel_absmax_max``
    is far above ``channel_absmax_median``, scales per channel or group gain most.

    Attributes:
        shape: of the tensor.
        dtype: such as ``"float32"``.
        count: elements.
        nan_count: elements that are NaN.
        inf_count: elements that are infinite.
        min: least finite value.
        max: greatest finite value.
        mean: of the finite values.
        std: of the finite values, divided by their number.
        absmax: greatest magnitude.
        zero_fraction: share of the finite values that are 0.
        p0_1: percentile 0.1, as numpy's default interpolates; likewise ``p1``, ``p50``, ``p99``, ``p99_9``.
        kurtosis: fourth moment about the mean over ``std**4``: 3 for normal values, 1.8 for uniform ones; NaN where
            ``std`` is 0.
        outlier_fraction: share of the finite values further than ``6 std`` from the mean.
        peak_to_rms_db: ``20 log10(absmax / rms)``; NaN where all is 0.
        channels: how many, along ``axis``; None without one, as the next three.
        channel_absmax_min: least of the channels' greatest magnitudes.
        channel_absmax_median: their median.
        channel_absmax_max: their greatest.
        codes_used: distinct codes of a quantized tensor; None for a float one.
        code_entropy: in bits, of the codes' frequencies; likewise.
    """

    shape: tuple[int, ...]
    dtype: str
    count: int
    nan_count: int
    inf_count: int
    min: float
    max: float
    mean: float
    std: float
    absmax: float
    zero_fraction: float
    p0_1: float
    p1: float
    p50: float
    p99: float
    p99_9: float
    kurtosis: float
    outlier_fraction: float
    peak_to_rms_db: float
    channels: int | None = None
    channel_absmax_min: float | None = None
    channel_absmax_median: float | None = None
    channel_absmax_max: float | None = None
    codes_used: int | None = None
    code_entropy: float | None = None

    @classmethod
    @torch.no_grad()
    def from_tensor(cls, tensor: Any, axis: int | None = None) -> QuantizationStats:
        """Return the statistics of ``tensor``, which may also be a quantized one: those of what it stands for.

        Args:
            tensor: floating point, any shape, strides and device; or an object with ``dequantize()`` and ``codes``.
            axis: dimension of the channels to tell the ranges of, may be negative; None tells none.

        Raises:
            TypeError: if ``tensor`` is neither.
            ValueError: if it is not a dense floating-point tensor, or has no such ``axis``.
        """
        codes: dict[str, Any] = {}
        if not isinstance(tensor, Tensor) and callable(getattr(tensor, "dequantize", None)):
            codes = _of_codes(getattr(tensor, "codes", None))
            tensor = tensor.dequantize()
        values = _checked(tensor)
        channels = {} if axis is None else _of_channels(values, axis)
        found: dict[str, Any] = {"shape": tuple(values.shape), "dtype": str(values.dtype).removeprefix("torch.")}
        return cls(**found, **_of_values(values.reshape(-1)), **channels, **codes)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; numbers that JSON does not have become ``"nan"``, ``"inf"`` and ``"-inf"``."""
        return {name: _plain(value) for name, value in asdict(self).items()}

    def __str__(self) -> str:
        rows = {name: _shown(value) for name, value in asdict(self).items() if value is not None}
        width = max(map(len, rows))
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())


def _checked(tensor: Any) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"tensor is a {type(tensor).__name__}; use a floating-point tensor or a quantized one")
    if not tensor.is_floating_point():
        raise ValueError(f"tensor has dtype {tensor.dtype}; use a floating-point tensor, such as tensor.float()")
    if tensor.layout != torch.strided:
        raise ValueError(f"tensor has layout {tensor.layout}; use tensor.to_dense()")
    return tensor.detach()


def _finite_chunks(flat: Tensor) -> Iterator[Tensor]:
    """Yield the finite values of a tensor of one dimension, in float32 or, of float64, in float64; both exact."""
    for chunk in flat.split(_CHUNK):
        wide = chunk if chunk.dtype in (torch.float32, torch.float64) else chunk.float()
        yield wide[wide.isfinite()]


def _of_values(flat: Tensor) -> dict[str, Any]:
    finite = zeros = nans = 0
    low, high = math.inf, -math.inf
    for chunk in _finite_chunks(flat):
        if chunk.numel():
            least, most = torch.aminmax(chunk)
            low, high = min(low, float(least)), max(high, float(most))
        finite += chunk.numel()
        zeros += int((chunk == 0).sum())
    if finite < flat.numel():
        nans = sum(int(chunk.isnan().sum()) for chunk in flat.split(_CHUNK))
    counts = {"count": flat.numel(), "nan_count": nans, "inf_count": flat.numel() - finite - nans}
    if not finite:
        names = ("min", "max", "mean", "std", "absmax", "zero_fraction", "kurtosis", "outlier_fraction")
        return {**counts, **dict.fromkeys((*names, "peak_to_rms_db", *_PERCENTILES), math.nan)}
    return {
        **counts,
        "min": low,
        "max": high,
        "absmax": max(-low, high),
        "zero_fraction": zeros / finite,
        **_moments(flat, finite, low, high),
        **_percentiles(flat, finite),
    }


def _moments(flat: Tensor, count: int, low: float, high: float) -> dict[str, float]:
    if low == high:  # a mean that is a rounding off would make a spread of it
        peak = 0.0 if low else math.nan
        return {"mean": low, "std": 0.0, "kurtosis": math.nan, "outlier_fraction": 0.0, "peak_to_rms_db": peak}
    # By a power of two, which rounds nothing: the fourth power of a large float64 would be infinite. In two steps,
    # as 2**1074 itself is.
    peak, exponent = math.frexp(max(-low, high))
    factors = 2.0 ** (-exponent // 2), 2.0 ** (-exponent - -exponent // 2)

    def scaled() -> Iterator[Tensor]:
        return (chunk.double() * factors[0] * factors[1] for chunk in _finite_chunks(flat))

    mean = math.fsum(float(chunk.sum()) for chunk in scaled()) / count
    squares = math.fsum(float(chunk.square().sum()) for chunk in scaled()) / count
    powers = [(float(d.sum()), float((d * d).sum())) for chunk in scaled() for d in [(chunk - mean).square()]]
    variance, fourth = (math.fsum(column) / count for column in zip(*powers, strict=True))
    limit = _OUTLIER_STDS * math.sqrt(variance)
    return {
        "mean": math.ldexp(mean, exponent),
        "std": math.ldexp(math.sqrt(variance), exponent),
        "kurtosis": fourth / variance**2,
        "outlier_fraction": sum(int(((chunk - mean).abs() > limit).sum()) for chunk in scaled()) / count,
        "peak_to_rms_db": 20 * math.log10(peak / math.sqrt(squares)),
    }


def _percentiles(flat: Tensor, count: int) -> dict[str, float]:
    places = {name: percent / 100 * (count - 1) for name, percent in _PERCENTILES.items()}
    ranks = sorted({rank for place in places.values() for rank in (math.floor(place), math.ceil(place))})
    values = dict(zip(ranks, _order_statistics(flat, ranks), strict=True))
    found = {}
    for name, place in places.items():
        low, high, part = values[math.floor(place)], values[math.ceil(place)], place % 1
        found[name] = low if low == high else low * (1 - part) + high * part
    return found


def _order_statistics(flat: Tensor, ranks: Sequence[int]) -> list[float]:
    """Return the finite values that would have ``ranks`` if all were sorted.

    Floats order as their bits do, once those of negative numbers are turned round. Each pass counts the next digit
    of the keys that begin as a wanted one does.
    """
    width = 64 if flat.dtype == torch.float64 else 32
    integer, floating = (torch.int64, torch.float64) if width == 64 else (torch.int32, torch.float32)
    half, mask = 1 << (_DIGIT - 1), (1 << _DIGIT) - 1
    prefix, left = dict.fromkeys(ranks, 0), {rank: rank for rank in ranks}
    for shift in range(width - _DIGIT, -1, -_DIGIT):
        offset = half if shift == width - _DIGIT else 0  # the first digit has the sign
        counts = {start: torch.zeros(1 << _DIGIT, dtype=torch.int64, device=flat.device) for start in prefix.values()}
        for chunk in _finite_chunks(flat):
            key = _turned(chunk.view(integer)).long()
            digit = ((key >> shift) + offset) & mask
            for start, histogram in counts.items():
                begins = digit if offset else digit[key >> (shift + _DIGIT) == start]
                histogram += torch.bincount(begins, minlength=1 << _DIGIT)
        sums = {start: histogram.cumsum(0) for start, histogram in counts.items()}
        for rank in ranks:
            up_to = sums[prefix[rank]]
            found = int(torch.searchsorted(up_to, left[rank], right=True))
            left[rank] -= int(up_to[found - 1]) if found else 0
            prefix[rank] = (prefix[rank] << _DIGIT) + found - offset
    keys = torch.tensor([prefix[rank] for rank in ranks], dtype=torch.int64).to(integer)
    return [float(value) for value in _turned(keys).view(floating)]


def _turned(bits: Tensor) -> Tensor:
    """Return the bits of floats as integers that order as the floats do; turned twice they are themselves."""
    return bits ^ ((bits >> (torch.iinfo(bits.dtype).bits - 1)) & torch.iinfo(bits.dtype).max)


def _of_channels(values: Tensor, axis: int) -> dict[str, Any]:
    if isinstance(axis, bool) or not isinstance(axis, int) or not -values.dim() <= axis < values.dim():
        raise ValueError(f"axis={axis!r} is not a dimension of a tensor of shape {tuple(values.shape)}")
    rows = values.movedim(axis, 0)
    if not values.numel():
        return {"channels": rows.shape[0]}
    found: list[float] = []
    for part in rows.split(max(1, _CHUNK // rows[0].numel())):
        wide = part.reshape(part.shape[0], -1)
        wide = (wide if wide.dtype == torch.float64 else wide.float()).abs()
        found += torch.where(wide.isfinite(), wide, 0.0).amax(1).tolist()
    return {
        "channels": len(found),
        "channel_absmax_min": min(found),
        "channel_absmax_median": statistics.median(found),
        "channel_absmax_max": max(found),
    }


def _of_codes(codes: Any) -> dict[str, Any]:
    if not isinstance(codes, Tensor):
        return {}
    counts = torch.unique(codes, return_counts=True)[1].double()
    shares = counts / counts.sum()
    # 0.0 - x: the entropy of one code is 0, not -0.
    return {"codes_used": counts.numel(), "code_entropy": 0.0 - float((shares * shares.log2()).sum())}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _shown(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)

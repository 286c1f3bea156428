"""Observers: modules that learn the range of a tensor, and the scale and zero point that follow.

``update`` of :class:`MinMaxObserver` and :class:`MovingAverageObserver` reads nothing back to the host
on a GPU and traces under ``torch.compile(fullgraph=True)``. Those with a histogram are for calibration, outside
compiled graphs: choosing their range reads values back and tries some hundred candidates.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qat.ops.affine import choose_scale_zero_point
from lightning_qat.quantizers import histogram
from lightning_qat.quantizers.state import QuantizationState
from lightning_qat.validation import check_choice, check_int, check_number


class Observer(QuantizationState):
    """Learns the range of the tensors it is shown. Statistics are float32 and never change the tensor.

    Args:
        num_channels: one range for each index of ``axis``; None is one for the tensor.
        axis: dimension of the channels; only used with ``num_channels``.
        name: of the layer, for messages.

    Attributes:
        min_val: ``[]`` or ``[num_channels]``, float32; ``inf`` before the first batch.
        max_val: the same; ``-inf`` before the first batch.
        follows_training: whether an update is cheap enough for every training step.

    Raises:
        ValueError: from ``update``, if a tensor on the CPU holds NaN or inf, or its ``axis`` has another
            size. On other devices NaN and inf stay in the buffers, and :meth:`check_finite` reports them.
    """

    min_val: Tensor
    max_val: Tensor
    follows_training: bool = True

    def __init__(self, *, num_channels: int | None = None, axis: int = 0, name: str = "") -> None:
        super().__init__()
        if num_channels is not None:
            check_int("num_channels", num_channels, 1)
        if not isinstance(axis, int) or isinstance(axis, bool):
            raise ValueError(f"axis={axis!r} is not allowed; use an integer")
        self.num_channels = num_channels
        self.axis = axis
        self.name = name
        # Only ever a positive answer, so that asking again does not synchronize a GPU.
        self._known_observed = False
        shape = () if num_channels is None else (num_channels,)
        self.register_buffer("min_val", torch.full(shape, math.inf, dtype=torch.float32))
        self.register_buffer("max_val", torch.full(shape, -math.inf, dtype=torch.float32))

    @property
    def observed(self) -> bool:
        """Whether any data was seen. Reads from the device."""
        return not bool(self._unset().any())

    def _unset(self) -> Tensor:
        return self.min_val > self.max_val  # False for NaN, which thus stays and is found

    def update(self, x: Tensor) -> None:
        """Learn from ``x``, of any shape and any real dtype. An empty tensor is ignored."""
        if x.numel():
            x = x.detach()
            self._learn(x, *self.batch_extremes(x))

    def batch_extremes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the extremes of ``x``, not empty, without learning from it; ``ValueError`` as from ``update``."""
        low, high = self._extremes(x.detach())
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            self._raise_if_not_finite(low, high)
        return low, high

    def _extremes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.num_channels is None:
            low, high = torch.aminmax(x)
            return low.float(), high.float()
        if not -x.dim() <= self.axis < x.dim() or x.shape[self.axis] != self.num_channels:
            raise ValueError(
                f"num_channels={self.num_channels} along axis={self.axis} does not fit a tensor of shape "
                f"{list(x.shape)} ({self._who()})"
            )
        axis = self.axis % x.dim()
        dims = [d for d in range(x.dim()) if d != axis]
        if not dims:
            return x.float(), x.float()
        # Two reductions: aminmax along a dimension took 15 times as long on a CPU (2048 x 2048, float32).
        return x.amin(dims).float(), x.amax(dims).float()

    def _learn(self, x: Tensor, low: Tensor, high: Tensor) -> None:
        """Take a batch into the statistics; ``low`` and ``high`` are its extremes."""
        raise NotImplementedError

    def _who(self) -> str:
        return f"layer {self.name!r}" if self.name else f"an unnamed {type(self).__name__}"

    def check_finite(self) -> None:
        """Raise ``ValueError`` if NaN or inf was observed. Reads from the device."""
        self._raise_if_not_finite(self.min_val, self.max_val)

    def _raise_if_not_finite(self, low: Tensor, high: Tensor) -> None:
        where = ""
        if low.dim():
            bad = ~(low.isfinite() & high.isfinite())
            if not bool(bad.any()):
                return
            channel = int(bad.nonzero()[0])
            low, high, where = low[channel], high[channel], f" in channel {channel}"
        least, most = float(low), float(high)
        if (math.isfinite(least) and math.isfinite(most)) or (least == math.inf and most == -math.inf):
            return
        found = "NaN" if math.isnan(least) or math.isnan(most) else "inf (in float32)"
        raise ValueError(
            f"{self._who()} observed {found}{where}, which has no quantization range; leave the batch that "
            "causes it out, mask with a finite value such as torch.finfo(dtype).min, or keep the layer in "
            "float with LayerRule(match=..., weight=None)"
        )

    def _require_data(self) -> None:
        if torch.compiler.is_compiling():
            return
        if not self._known_observed:
            if not self.observed:
                who = self._who()
                raise ValueError(f"calibration saw no data for {who}; run calibrate(...) with at least one batch")
            self._known_observed = True
        if self.min_val.device.type == "cpu":
            self.check_finite()

    def _choose_range(self, symmetric: bool, bits: int) -> tuple[Tensor, Tensor]:
        """Return the range for a grid, float32, in the shape of the buffers."""
        return self.min_val, self.max_val

    @torch.no_grad()
    def range(self, symmetric: bool = True, bits: int = 8) -> tuple[Tensor, Tensor]:
        """Return copies of ``(low, high)``, ``[]`` or ``[num_channels]``, before zero is included.

        Args:
            symmetric: of the grid; the histogram and mse observers choose by it.
            bits: of the grid, likewise.

        Raises:
            ValueError: if no data was observed, or NaN or inf.
        """
        self._require_data()
        low, high = self._choose_range(symmetric, bits)
        return low.clone(), high.clone()

    def get_quantization_params(self, symmetric: bool, bits: int) -> tuple[Tensor, Tensor]:
        """Return ``(scale, zero_point)``, float32 and int32, ``[]`` or ``[num_channels]``.

        Args:
            symmetric: codes around zero; the zero point is then 0.
            bits: of a code.

        Raises:
            ValueError: if no data was observed, or NaN or inf (looked for on the CPU only).
        """
        self._require_data()
        low, high = self._choose_range(symmetric, bits)
        scale, zero_point = choose_scale_zero_point(low, high, bits=bits, symmetric=symmetric)
        return scale, torch.zeros_like(scale, dtype=torch.int32) if zero_point is None else zero_point

    @torch.no_grad()
    def reset(self) -> None:
        """Forget what was observed."""
        self._known_observed = False
        self.min_val.fill_(math.inf)
        self.max_val.fill_(-math.inf)

    def forward(self, x: Tensor) -> Tensor:
        """Learn from ``x`` and return it."""
        self.update(x)
        return x

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        self._known_observed = False  # Module.to_empty leaves anything in the buffers
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._known_observed = False
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        """Return what ``print`` shows of it."""
        return f"name={self.name!r}, num_channels={self.num_channels}, axis={self.axis}"


class MinMaxObserver(Observer):
    """The least and the greatest value ever seen (Jacob et al. 2018, arXiv:1712.05877)."""

    def _learn(self, x: Tensor, low: Tensor, high: Tensor) -> None:
        # minimum and maximum keep NaN, so check_finite finds it later where update may not look.
        self.min_val.copy_(torch.minimum(self.min_val, low))
        self.max_val.copy_(torch.maximum(self.max_val, high))


class MovingAverageObserver(Observer):
    """Moving averages of each batch's extremes (Jacob et al. 2018, arXiv:1712.05877, section 3.1).

    Args:
        momentum: from 0 to below 1; ``m * old + (1 - m) * new``. The first batch is taken as it is.
        shared: ``num_channels``, ``axis`` and ``name``, as of :class:`Observer`.

    Attributes:
        averaged: batches of a calibration, which count alike (by the momentum, 8 would be 93 % the first); else None.
    """

    def __init__(self, momentum: float = 0.99, **shared: Any) -> None:
        super().__init__(**shared)
        self.momentum = check_number("momentum", momentum, "a number in [0, 1)", lambda m: 0 <= m < 1)
        self.averaged: int | None = None

    def next_weight(self) -> float:
        """Return what the next batch counts, and count it."""
        if self.averaged is not None:
            self.averaged += 1
        return max(1 - self.momentum, 1 / (self.averaged or math.inf))

    def _learn(self, x: Tensor, low: Tensor, high: Tensor) -> None:
        # The mean of two equal numbers is that number; two products round to another, for the largest to inf.
        weight = self.next_weight()
        if self._known_observed and not torch.compiler.is_compiling():
            self.min_val.lerp_(low, weight)
            self.max_val.lerp_(high, weight)
            return
        first = self._unset()
        self.min_val.copy_(torch.where(first, low, self.min_val.lerp(low, weight)))
        self.max_val.copy_(torch.where(first, high, self.max_val.lerp(high, weight)))


class _HistogramState(MinMaxObserver):
    """An observer with a histogram of each channel and the exact extremes.

    The histogram of two batches equals that of both at once. It takes ``8 * num_bins`` bytes for a
    channel, twice that where the sums are kept.

    Attributes:
        counts: ``[C, num_bins]``, int64; ``C`` is 1 for one range per tensor.
        half_range: ``[C]``, float64: each row covers ``[-half_range, half_range)``. A power of two, or 0
            before the first value that is not zero.
        sums: ``[C, num_bins]``, float64, of the values in each bin; only where ``keeps_sums``.
    """

    counts: Tensor
    half_range: Tensor
    sums: Tensor | None
    keeps_sums: bool = False
    follows_training = False

    def __init__(self, num_bins: int, **shared: Any) -> None:
        super().__init__(**shared)
        if check_int("num_bins", num_bins, 16, 1 << 20) % 2:
            raise ValueError(f"num_bins={num_bins!r} is not allowed; use an even integer, for bins to merge in pairs")
        self.num_bins = num_bins
        rows = self.num_channels or 1
        self.register_buffer("counts", torch.zeros(rows, num_bins, dtype=torch.int64))
        self.register_buffer("half_range", torch.zeros(rows, dtype=torch.float64))
        sums = torch.zeros(rows, num_bins, dtype=torch.float64) if self.keeps_sums else None
        self.register_buffer("sums", sums)

    def _learn(self, x: Tensor, low: Tensor, high: Tensor) -> None:
        super()._learn(x, low, high)
        on_cpu = x.device.type == "cpu" and not torch.compiler.is_compiling()
        magnitude = torch.maximum(-low, high).reshape(-1)
        if not on_cpu:
            # Not looked at yet: NaN and inf are in min_val and max_val, and must not become an index.
            most = torch.finfo(torch.float32).max
            x = x.float().nan_to_num(nan=0.0, posinf=most, neginf=-most)
            magnitude = magnitude.nan_to_num(nan=most, posinf=most)
        half_range = torch.maximum(self.half_range, histogram.covering_power(magnitude))
        shift = histogram.doublings(self.half_range, half_range)
        if not on_cpu or bool(shift.any()):
            self.counts.copy_(histogram.merge_bins(self.counts, shift))
            if self.sums is not None:
                self.sums.copy_(histogram.merge_bins(self.sums, shift))
        self.half_range.copy_(half_range)
        rows = x.reshape(1, -1) if self.num_channels is None else x.movedim(self.axis, 0).reshape(self.num_channels, -1)
        histogram.add_values_(self.counts, self.sums, rows, self.half_range)

    def _choose_range(self, symmetric: bool, bits: int) -> tuple[Tensor, Tensor]:
        extremes = self.min_val.reshape(-1), self.max_val.reshape(-1)
        low, high = self._search(histogram.Histogram(self.counts, self.half_range, *extremes), symmetric, bits)
        return low.reshape(self.min_val.shape), high.reshape(self.max_val.shape)

    def _search(self, seen: histogram.Histogram, symmetric: bool, bits: int) -> tuple[Tensor, Tensor]:
        """Return the range of each row, ``[C]``."""
        raise NotImplementedError

    @torch.no_grad()
    def reset(self) -> None:
        super().reset()
        for buffer in (self.counts, self.half_range, self.sums):
            if buffer is not None:
                buffer.zero_()


class PercentileObserver(_HistogramState):
    """The range between two percentiles (Wu et al. 2020, arXiv:2004.09602, section 4).

    Args:
        percentile: above 50, to 100: the range is from ``100 - percentile`` to ``percentile``. 100 is
            the exact minimum and maximum.
        num_bins: even; percentiles are known to within a bin.
        shared: ``num_channels``, ``axis`` and ``name``, as of :class:`Observer`.
    """

    def __init__(self, percentile: float = 99.99, num_bins: int = 4096, **shared: Any) -> None:
        super().__init__(num_bins, **shared)
        self.percentile = check_number("percentile", percentile, "a number in (50, 100]", lambda p: 50 < p <= 100)

    def _search(self, seen: histogram.Histogram, symmetric: bool, bits: int) -> tuple[Tensor, Tensor]:
        return histogram.percentile_range(seen, self.percentile)


class HistogramObserver(_HistogramState):
    """The range with the least expected squared error, as torch.ao's observer of that name intends.

    Either end is searched by itself; a symmetric grid has one threshold. The error is never more than
    that of the minimum and maximum, as the histogram tells it.

    Args:
        num_bins: even.
        shared: ``num_channels``, ``axis`` and ``name``, as of :class:`Observer`.
    """

    def __init__(self, num_bins: int = 4096, **shared: Any) -> None:
        super().__init__(num_bins, **shared)

    def _search(self, seen: histogram.Histogram, symmetric: bool, bits: int) -> tuple[Tensor, Tensor]:
        return histogram.least_squares_range(seen, symmetric=symmetric, bits=bits)


class MSEObserver(_HistogramState):
    """Minimum and maximum, shrunk together by the factor with the least error.

    The ``mse`` search of GPTQ (Frantar et al. 2023, arXiv:2210.17323) and llm-compressor: the factors
    are ``1 - i / grid * max_shrink`` for ``i`` from 0 to ``grid``, the error ``|x - q| ** norm``.

    Args:
        num_bins: even; the error is taken at the mean of each bin.
        grid: how many factors below 1 are tried.
        max_shrink: from 0 to below 1.
        norm: above 0, to 16.
        shared: ``num_channels``, ``axis`` and ``name``, as of :class:`Observer`.
    """

    sums: Tensor
    keeps_sums = True

    def __init__(
        self,
        num_bins: int = 4096,
        grid: int = 100,
        max_shrink: float = 0.8,
        norm: float = 2.0,
        **shared: Any,
    ) -> None:
        super().__init__(num_bins, **shared)
        self.grid = check_int("grid", grid, 1)
        self.max_shrink = check_number("max_shrink", max_shrink, "a number in [0, 1)", lambda s: 0 <= s < 1)
        self.norm = check_number("norm", norm, "a number in (0, 16]", lambda n: 0 < n <= 16)

    def _search(self, seen: histogram.Histogram, symmetric: bool, bits: int) -> tuple[Tensor, Tensor]:
        factors = tuple(1 - i / self.grid * self.max_shrink for i in range(self.grid + 1))
        return histogram.shrunk_range(seen, self.sums, factors, self.norm, symmetric=symmetric, bits=bits)


#: Name -> how to build it from a momentum and the arguments that all share.
_REGISTRY: dict[str, Callable[..., Observer]] = {
    "min_max": lambda momentum, **shared: MinMaxObserver(**shared),
    "moving_average": lambda momentum, **shared: MovingAverageObserver(momentum, **shared),
    "percentile": lambda momentum, **shared: PercentileObserver(**shared),
    "histogram": lambda momentum, **shared: HistogramObserver(**shared),
    "mse": lambda momentum, **shared: MSEObserver(**shared),
}


def make_observer(
    name: str, *, num_channels: int | None = None, axis: int = 0, momentum: float = 0.99, layer_name: str = ""
) -> Observer:
    """Return a fresh observer.

    Args:
        name: one of ``config.OBSERVER_NAMES``; ``ValueError`` lists them, nearest first.
        num_channels: one range for each index of ``axis``; None is one for the tensor.
        axis: dimension of the channels.
        momentum: of ``"moving_average"``; the others have none.
        layer_name: for messages.
    """
    build = _REGISTRY[check_choice("observer", name, _REGISTRY)]
    return build(momentum, num_channels=num_channels, axis=axis, name=layer_name)

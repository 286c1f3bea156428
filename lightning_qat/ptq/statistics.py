"""What calibration keeps of a layer's input: a Gram matrix, magnitudes per channel, and a range.

The losses of GPTQ, AWQ, clipping and bit allocation are all functions of the Gram matrix of a layer's inputs, so one
streaming pass serves them all and no activation is stored.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lightning_qat.nn.layer import float_type, supported_class

#: Numbers of unfolded inputs that are held at once: 16 MB in float32.
_PIECE = 2**22


@dataclass(frozen=True, eq=False)
class InputStatistics:
    """What was seen of the inputs of one layer, or of several that always have the same input.

    ``K`` is what a row of the weight, ``weight[out].flatten()``, multiplies: the input features of a Linear; of a
    convolution ``in_channels / groups`` times the kernel's area. A grouped convolution has a leading ``[groups]``.

    Args:
        gram: ``[K, K]``, the sum of ``x x^T`` over all inputs ``x``, float32; not divided by ``count``.
        count: how many inputs there were: tokens, or positions of the kernel.
        mean_magnitude: ``[K]``, mean of ``|x|``.
        max_magnitude: ``[K]``, largest ``|x|``.
        low, high: the range of all numbers seen.
    """

    gram: Tensor
    count: int
    mean_magnitude: Tensor
    max_magnitude: Tensor
    low: float
    high: float

    def divided_by(self, scale: Tensor) -> InputStatistics:
        """Return the statistics of the inputs divided by ``scale``, ``[K]``; the range becomes that of the bounds."""
        inverse = scale.double().reciprocal()
        largest = self.max_magnitude / scale
        bound = float(largest.max()) if largest.numel() else 0.0
        return replace(
            self,
            gram=(self.gram.double() * inverse.unsqueeze(-1) * inverse).float(),
            mean_magnitude=self.mean_magnitude / scale,
            max_magnitude=largest,
            low=-bound if self.low < 0 else 0.0,
            high=bound if self.high > 0 else 0.0,
        )

    def ordered(self, order: Tensor) -> InputStatistics:
        """Return the statistics of the inputs with features in this order, int64 ``[K]``."""
        return replace(
            self,
            gram=self.gram[order][:, order],
            mean_magnitude=self.mean_magnitude[order],
            max_magnitude=self.max_magnitude[order],
        )


def has_own_forward(layer: nn.Module) -> bool:
    """Whether the class of the user's layer does not compute as the class that it derives from."""
    kind = float_type(layer)
    base = supported_class(kind)
    return base is not None and kind.forward is not base.forward


def input_geometry(layer: nn.Module) -> tuple[int, int] | None:
    """Return ``(groups, K)`` of a layer that multiplies matrices; None of embeddings and transposed convolutions.

    And of convolutions with a forward of their own, whose weight may slide over something else than the input: that of
    Parakeet's head takes channels last.
    """
    if isinstance(layer, nn.Linear):
        return 1, layer.in_features
    if isinstance(layer, _ConvNd) and not isinstance(layer, _ConvTransposeNd) and not has_own_forward(layer):
        area = 1
        for size in layer.kernel_size:
            area *= size
        return layer.groups, layer.in_channels // layer.groups * area
    return None


def input_rows(layer: nn.Module, x: Tensor) -> Iterator[Tensor]:
    """Yield what the rows of a layer's weight are multiplied with, ``[groups, n, K]``, in pieces of bounded size."""
    if isinstance(layer, _ConvNd):
        yield from _unfolded(layer, x)
        return
    rows = x.reshape(1, -1, x.shape[-1])
    step = max(_PIECE // max(x.shape[-1], 1), 1)
    for start in range(0, rows.shape[1], step):
        yield rows[:, start : start + step]


def _unfolded(conv: _ConvNd, x: Tensor) -> Iterator[Tensor]:
    """Yield the patches that a convolution of one to three dimensions looks at."""
    dims = len(conv.kernel_size)
    if x.dim() == dims + 1:  # without a batch
        x = x.unsqueeze(0)
    padding = conv._reversed_padding_repeated_twice
    if any(padding):
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        x = F.pad(x, padding, mode=mode)
    x = x.contiguous()
    groups, features = conv.groups, x.shape[1] // conv.groups
    sizes = [
        (size - dilation * (kernel - 1) - 1) // stride + 1
        for size, kernel, stride, dilation in zip(
            x.shape[2:], conv.kernel_size, conv.stride, conv.dilation, strict=True
        )
    ]
    sample, channel, *places = x.stride()
    steps = [place * stride for place, stride in zip(places, conv.stride, strict=True)]
    reach = [place * dilation for place, dilation in zip(places, conv.dilation, strict=True)]
    shape = (x.shape[0], groups, features, *conv.kernel_size, *sizes)
    patches = x.as_strided(shape, (sample, channel * features, channel, *reach, *steps))
    # [N, groups, features, *kernel, *output] -> [groups, N, *output, features, *kernel]
    output, kernel = range(3 + dims, 3 + 2 * dims), range(3, 3 + dims)
    patches = patches.permute(1, 0, *output, 2, *kernel)
    k = features
    for size in conv.kernel_size:
        k *= size
    lines = sizes[0]
    per_line = max(groups * k, 1)
    for size in sizes[1:]:
        per_line *= size
    step = max(_PIECE // per_line, 1)
    for n in range(x.shape[0]):
        for start in range(0, lines, step):
            yield patches[:, n, start : start + step].reshape(groups, -1, k)


class StatisticsSum:
    """Adds up the statistics of the inputs of one layer, batch after batch.

    Products of a batch are float32 and their sum is float64: with float32 the millionth batch would be rounded away.

    Args:
        layer: a Linear or a convolution.
        name: for messages.
    """

    def __init__(self, layer: nn.Module, name: str) -> None:
        geometry = input_geometry(layer)
        if geometry is None:
            raise ValueError(f"layer {name!r}, a {type(layer).__name__}, has no Gram matrix")
        self.name = name
        self._layer = layer
        self._groups, k = geometry
        weight: Any = layer.weight  # the projections of an attention have no parameters of their own
        device = weight.device
        self.count = 0
        self._gram = torch.zeros(self._groups, k, k, dtype=torch.float64, device=device)
        self._magnitude = torch.zeros(self._groups, k, dtype=torch.float64, device=device)
        self._largest = torch.zeros(self._groups, k, device=device)
        self._bounds = torch.tensor([torch.inf, -torch.inf], device=device)

    def update(self, x: Tensor) -> None:
        """Take in one input of the layer.

        Raises:
            ValueError: it holds NaN or inf.
        """
        x = x.detach()
        if not x.numel():
            return
        low, high = torch.aminmax(x)
        bounds = torch.stack([low, high]).float()
        if not bool(torch.isfinite(bounds).all()):
            raise ValueError(
                f"the input of layer {self.name!r} holds NaN or inf, or numbers beyond float32, in a calibration "
                "batch; check the data, or compute in a wider dtype"
            )
        self._bounds[0] = torch.minimum(self._bounds[0], bounds[0])
        self._bounds[1] = torch.maximum(self._bounds[1], bounds[1])
        for rows in input_rows(self._layer, x):
            values = rows if rows.dtype == torch.float64 else rows.float()
            magnitude = values.abs()
            self._gram += torch.bmm(values.transpose(1, 2), values)
            self._magnitude += magnitude.sum(1)
            self._largest = torch.maximum(self._largest, magnitude.amax(1).float())
            self.count += rows.shape[1]

    def reduce(self) -> None:
        """Add up the sums of all ranks of ``torch.distributed``; every rank then has the same."""
        count = torch.tensor([float(self.count)], dtype=torch.float64, device=self._gram.device)
        for tensor in (self._gram, self._magnitude, count):
            dist.all_reduce(tensor)
        self._bounds[0] = -self._bounds[0]
        for tensor in (self._largest, self._bounds):
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        self._bounds[0] = -self._bounds[0]
        self.count = int(count)

    def result(self) -> InputStatistics | None:
        """Return what was seen, or None if nothing was.

        Raises:
            ValueError: the sums went beyond float32.
        """
        if not self.count:
            return None
        gram = self._gram.float()
        if not bool(torch.isfinite(gram.diagonal(dim1=-2, dim2=-1)).all()):
            raise ValueError(f"the inputs of layer {self.name!r} are too large: their squares add up beyond float32")
        mean = (self._magnitude / self.count).float()
        parts = (gram, mean, self._largest)
        whole, means, largest = parts if self._groups > 1 else (part[0] for part in parts)
        low, high = self._bounds.tolist()
        return InputStatistics(whole, self.count, means, largest, low, high)

"""Benchmark group ``fake_quantize``: the op against PyTorch's own."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_qat.ops.fake_quantize import fake_quantize

from ._timing import Results, compared


def fake_quantize_group(rounds: int, size: int = 4096) -> Results:
    """Time one float32 weight ``[size, size]`` with a scale per output channel, forward, and with backward.

    Raises:
        RuntimeError: if the two do not give the same numbers.
    """
    x = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    grad = torch.randn(size, size, generator=torch.Generator().manual_seed(1))
    scale = x.abs().amax(dim=1) / 127
    zero_point = torch.zeros(size, dtype=torch.int32)
    weight = x.clone().requires_grad_()

    def ours(values: Tensor) -> Tensor:
        return fake_quantize(values, scale, axis=0)

    def torch_own(values: Tensor) -> Tensor:
        return torch.fake_quantize_per_channel_affine(values, scale, zero_point, 0, -127, 127)

    _verify(x)
    forward = {"torch": lambda: torch_own(x), "lightning_qat": lambda: ours(x)}
    train = {
        "torch": lambda: torch.autograd.grad(torch_own(weight), weight, grad),
        "lightning_qat": lambda: torch.autograd.grad(ours(weight), weight, grad),
    }
    return Results(
        [
            *compared("fake_quantize forward", forward, rounds, baseline="torch"),
            *compared("fake_quantize forward and backward", train, rounds, baseline="torch"),
        ]
    )


def _verify(x: Tensor) -> None:
    """Compare with PyTorch at a power of two as the scale, where its product with the reciprocal is exact."""
    scale = torch.full((len(x),), 2.0**-5)
    zero_point = torch.zeros(len(x), dtype=torch.int32)
    expected = torch.fake_quantize_per_channel_affine(x, scale, zero_point, 0, -127, 127)
    if not torch.equal(fake_quantize(x, scale, axis=0), expected):
        raise RuntimeError("fake_quantize differs from torch.fake_quantize_per_channel_affine; not timed")

"""Time the fake-quantize op against PyTorch's own, side by side in one process."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING

import torch
from rich.console import Console

from lightning_qat.ops.fake_quantize import fake_quantize

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


def fake_quantize_ratios(size: int = 4096, rounds: int = 15) -> dict[str, float]:
    """Return median times in milliseconds and how many times longer PyTorch takes.

    One float32 weight ``[size, size]`` with a scale per output channel, on the CPU. The two alternate,
    so that what else runs on the machine meets both. Results are freed between runs, so that each run
    gets fresh memory, as in training.

    Args:
        size: rows and columns of the weight.
        rounds: runs of each, after one that is not counted.

    Returns:
        ``forward_ms``, ``forward_torch_ms``, ``forward_ratio`` and the same for ``train`` (forward,
        then backward through autograd to the weight).
    """
    x = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    grad = torch.randn(size, size, generator=torch.Generator().manual_seed(1))
    scale = x.abs().amax(dim=1) / 127
    zero_point = torch.zeros(size, dtype=torch.int32)

    def ours(weight: Tensor) -> Tensor:
        return fake_quantize(weight, scale, axis=0)

    def torch_own(weight: Tensor) -> Tensor:
        return torch.fake_quantize_per_channel_affine(weight, scale, zero_point, 0, -127, 127)

    weight = x.clone().requires_grad_()
    cases: dict[str, Callable[[], object]] = {
        "forward_ms": lambda: ours(x),
        "forward_torch_ms": lambda: torch_own(x),
        "train_ms": lambda: torch.autograd.grad(ours(weight), weight, grad),
        "train_torch_ms": lambda: torch.autograd.grad(torch_own(weight), weight, grad),
    }
    medians = median_milliseconds(cases, rounds)
    for name in ("forward", "train"):
        medians[f"{name}_ratio"] = medians[f"{name}_torch_ms"] / medians[f"{name}_ms"]
    return medians


def median_milliseconds(cases: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the median time of each case, run in turn ``rounds`` times after one uncounted round."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds + 1):
        for name, case in cases.items():
            start = time.perf_counter()
            result = case()
            times[name].append((time.perf_counter() - start) * 1e3)
            del result
    return {name: statistics.median(t[1:]) for name, t in times.items()}


if __name__ == "__main__":
    Console().print_json(data=fake_quantize_ratios())

"""What every launcher shares: the tuned configuration as a value, the current device, and numbers of blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor

#: Options without which codes differ from the definition: a fused multiply-add skips a rounding.
EXACT = {"enable_fp_fusion": False}

#: Compute capabilities that kernels are tuned for: A100, H100 and H200, B200.
CAPABILITIES = (80, 90, 100)


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """One configuration of a kernel, complete enough to compile it without a GPU.

    Args:
        kernel: the ``triton.jit`` function.
        signature: argument -> type as Triton writes it, constexprs left out: ``"*bf16"``, ``"i32"``, ``"fp32"``.
            ``":16"`` behind a type says that the address or number is a multiple of 16, as a launch finds out.
        constexprs: argument -> value.
        num_warps: warps of a program.
        num_stages: depth of the software pipeline.
        options: further compiler options.
        capabilities: those on which a launcher chooses this configuration.
    """

    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    options: Mapping[str, Any] = field(default_factory=lambda: dict(EXACT))
    capabilities: tuple[int, ...] = CAPABILITIES


def on_device_of(x: Tensor) -> torch.cuda.device_of:
    """Return a context in which kernels run on the GPU of ``x``; it does nothing for a CPU tensor."""
    return torch.cuda.device_of(x)


def blocks_of(size: int, block: int) -> int:
    """Return how many blocks cover ``size`` elements."""
    return -(-size // block)


def block_up_to(size: int, most: int) -> int:
    """Return the smallest power of two that holds ``size`` elements, or ``most`` (a power of two) if that is less."""
    return int(min(most, triton.next_power_of_2(max(size, 1))))

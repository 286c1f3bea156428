"""What every launcher shares: the tuned configuration as a value, the current device, and numbers of blocks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from triton.compiler import CompiledKernel

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
    return min(most, 1 << (max(size, 1) - 1).bit_length())


#: Compiled kernels by all that decides which one a launch needs. Shapes are few; where they are not, the oldest go.
_COMPILED: OrderedDict[tuple[Any, ...], Any] = OrderedDict()
_MOST_COMPILED = 4096


def launch(
    kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], constexprs: Mapping[str, Any], **options: Any
) -> None:
    """Launch ``kernel``, with less to do where it was launched with the same sizes before.

    Triton finds out at each launch which variant the arguments need, in 50 microseconds of Python and more: as long as
    a tensor of 100 MB takes. What that depends on is the key here.

    Args:
        kernel: the ``triton.jit`` function.
        grid: programs, up to three dimensions.
        arguments: all that are no constexprs, in their order, a tensor first.
        constexprs: the others, which follow them, in their order.
        options: of the compiler.
    """
    found = (
        kernel,
        arguments[0].get_device(),
        *constexprs.values(),
        *options.values(),
        *[(a.dtype, a.data_ptr() % 16) if isinstance(a, Tensor) else a for a in arguments],
    )
    compiled = _COMPILED.get(found)
    if compiled is not None:
        compiled[(*grid, 1, 1)[:3]](*arguments, *constexprs.values())
        return
    compiled = kernel[grid](*arguments, **constexprs, **options)
    if isinstance(compiled, CompiledKernel):  # an interpreted one is none
        _COMPILED[found] = compiled
        if len(_COMPILED) > _MOST_COMPILED:
            _COMPILED.popitem(last=False)

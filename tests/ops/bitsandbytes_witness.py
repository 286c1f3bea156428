"""What the installed bitsandbytes does on a CPU, as the witness of exactness tests (which first prove it right).

Its ``dequantize_4bit`` is wrong for some shapes, so values are computed as ``table[code] * absmax`` from its own table.
"""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

pytest.importorskip("bitsandbytes")
from bitsandbytes import functional

#: What its 4-bit quantizer accepts.
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def table(name: str) -> Tensor:
    """Return the value of every code."""
    if name == "dynamic_tree":
        return functional.create_dynamic_map()
    values: Tensor = functional.get_4bit_type(name, device="cpu")
    return values


def quantize(x: Tensor, name: str, block_size: int) -> tuple[Tensor, Tensor]:
    """Return codes as they are stored, flat, and the absmax of every block."""
    if name == "dynamic_tree":
        codes, state = functional.quantize_blockwise(x, blocksize=block_size)
    else:
        codes, state = functional.quantize_4bit(x, blocksize=block_size, quant_type=name)
    return codes.reshape(-1), state.absmax


def split(packed: Tensor, count: int) -> Tensor:
    """Return the codes of bytes that hold two, one by one in Python."""
    codes = [nibble for byte in packed.tolist() for nibble in (byte // 16, byte % 16)]
    return torch.tensor(codes[:count], dtype=torch.uint8)


def values(codes: Tensor, absmax: Tensor, name: str, block_size: int) -> Tensor:
    """Return the values of flat codes."""
    return table(name)[codes.long()] * absmax.repeat_interleave(block_size)[: len(codes)]


def nest(x: Tensor, name: str, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the nested scales of ``x``: codes, their absmax and the offset."""
    _, state = functional.quantize_4bit(x, blocksize=block_size, quant_type=name, compress_statistics=True)
    return state.absmax, state.state2.absmax, state.offset


def quantize_vectorwise(x: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return codes, absmax of the rows and outlier columns; ``x`` is taken in float16, as its layers do."""
    codes, absmax, columns = functional.int8_vectorwise_quant(x.to(torch.float16, copy=True), threshold=threshold)
    return codes, absmax, columns


def samples(seed: int, count: int, largest: int, dtype: torch.dtype, thresholds: Tensor) -> list[Tensor]:
    """Return flat tensors of 1 to ``largest`` finite elements: ordinary, extreme and degenerate ones, and ties."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        size = draw.choice((draw.randint(1, 9), draw.randint(1, largest), draw.randint(1, largest)))
        x = torch.randn(size, generator=generator)
        kind = draw.choice(("normal", "normal", "scaled", "zeros", "constant", "sparse", "ties", "outlier", "few"))
        if kind == "scaled":
            x = x * 2.0 ** draw.randint(-145, 120)
        elif kind == "zeros":
            x = x * 0.0
        elif kind == "constant":
            x = torch.full_like(x, draw.choice((1.0, -3.0, 1e-30, 7e-41, 3e38)))
        elif kind == "sparse":
            x = x * (torch.rand(size, generator=generator) < 0.1)
        elif kind == "ties":
            x = thresholds[torch.randint(len(thresholds), (size,), generator=generator)]
            x[0] = draw.choice((1.0, -1.0))
            x = x * 2.0 ** draw.randint(-20, 20)
        elif kind == "outlier":
            x[draw.randrange(size)] = draw.choice((100.0, -1e4, 1e30))
        elif kind == "few":
            x = torch.round(x * 2) / 2
        largest_value = torch.finfo(dtype).max
        found.append(x.clamp(-largest_value, largest_value).to(dtype))
    return found

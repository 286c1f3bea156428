"""Products of one or two float32 tokens and packed 4-bit weights, by PyTorch's 4-bit embedding bags on the CPU.

An embedding bag that weighs its rows adds up ``x[k] * table[k]``: with the columns of a weight as the rows of a table,
a group of columns as a bag and the input as the weights of the rows, this is the matrix-vector product of each group,
read at half a byte a weight and summed in float32. The scales of the groups are multiplied afterwards, in float32: the
table's own scale is 1, its offset -8, both exact in the float16 that the kernel has for them.

It is taken where :mod:`lightning_qat.ops.float_linear` has no kernel: without a compiler, or wide vectors.

The kernel runs on the thread that calls it, so the rows of a weight are dealt to as many threads as PyTorch has.
4096 x 4096 in groups of 128, one token, two cores: 1.3 ms where PyTorch's float32 product takes 2.0, its 64 MB in the
cache (``lightning-qat benchmark 'groups=[inference]'``); called again and again 0.8, digits of eight bits
(:mod:`lightning_qat.ops.digit_linear`) 1.7 to 2.3 and float32 1.4.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor

from lightning_qat.ops.threads import in_threads, parts_of

#: Columns that share a scale: of fewer, the sums of the bags are the work; of more, digits are faster.
_LEAST_GROUP, _MOST_GROUP = 32, 255

#: Fewer rows are not worth a thread of their own.
_LEAST_ROWS = 1024

#: Tokens up to which this is faster than digits, which read the weight once for several.
BAG_TOKENS = 2

#: With fewer weights the steps around the product are the time.
_FEWEST_WEIGHTS = 1024 * 1024

#: Codes of the table are 0 to 15 and stand for code - 8.
_MIDDLE = 8


@dataclass(frozen=True)
class BagWeight:
    """A packed weight, a second copy beside the layer's, column by column.

    Attributes:
        tables: uint8 ``[in_features, rows / 2 + 4]`` for each part of the rows.
        scale: ``[groups, out_features]``.
        offset: likewise, what a group's sum of inputs is multiplied by; None for symmetric codes.
    """

    tables: tuple[Tensor, ...]
    scale: Tensor
    offset: Tensor | None


def bags_fit(rows: int, columns: int, bits: int, group_size: int | None) -> bool:
    """Return whether a weight ``[rows, columns]`` can be a table, and is large enough to gain."""
    if bits != 4 or group_size is None or rows % 2 or columns % group_size:
        return False
    return _LEAST_GROUP <= group_size <= _MOST_GROUP and rows * columns >= _FEWEST_WEIGHTS


def pack_bags(codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> BagWeight:
    """Return a weight as :func:`bag_linear` reads it.

    Args:
        codes: -8 to 7, or with ``zero_point`` 0 to 15, ``[out_features, in_features]``.
        scale: ``[out_features, groups]``.
        zero_point: shaped as ``scale``, or None.
    """
    rows, columns = codes.shape
    steps, offset = scale.detach().float().t().contiguous(), None
    if zero_point is not None:
        offset = (_MIDDLE - zero_point.float().t()).mul(steps).contiguous()
    digits = (codes.to(torch.int16) + (_MIDDLE if zero_point is None else 0)).to(torch.uint8).t()
    ends = torch.tensor([1.0, -_MIDDLE], dtype=torch.float16, device="cpu").view(torch.uint8).expand(columns, 4)
    share = -(-rows // (2 * parts_of(rows, _LEAST_ROWS))) * 2
    tables = tuple(torch.cat((p[:, ::2] | p[:, 1::2] << 4, ends), 1) for p in digits.split(share, 1))
    return BagWeight(tables, steps, offset)


def bag_linear(x: Tensor, weight: BagWeight, bias: Tensor | None) -> Tensor:
    """Return ``x @ weight.T + bias`` in the dtype of ``x``, summed in float32.

    Args:
        x: ``[..., in_features]``, floating point up to 32 bits, finite, not empty, a few tokens.
        weight: of :func:`pack_bags`.
        bias: ``[out_features]`` or None.
    """
    groups, rows = weight.scale.shape
    tokens = x.reshape(-1, x.shape[-1]).to(torch.float32).contiguous()
    sums = _bags(weight, tokens.view(-1), groups, len(tokens)).view(len(tokens), groups, rows)
    result = sums.mul_(weight.scale).sum(1)
    if weight.offset is not None:
        result.addmm_(tokens.view(len(tokens), groups, -1).sum(2), weight.offset)
    if bias is not None:
        result.add_(bias)
    return result.to(x.dtype).view(*x.shape[:-1], rows)


def _bags(weight: BagWeight, values: Tensor, groups: int, tokens: int) -> Tensor:
    """Return the sums of all bags of all tokens, ``[tokens * bags, out_features]``."""
    columns = len(weight.tables[0])
    index, starts = _rows_of_bags(columns, columns // groups, tokens)

    def part(table: Tensor) -> Tensor:
        multiply = torch.ops.quantized.embedding_bag_4bit_rowwise_offsets
        sums: Tensor = multiply(table, index, starts, False, 0, False, values, None, True)
        return sums

    sums = in_threads([partial(part, table) for table in weight.tables])
    return sums[0] if len(sums) == 1 else torch.cat(sums, 1)


@lru_cache(maxsize=16)
def _rows_of_bags(columns: int, run: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Return the rows of the table that all bags take, and where each bag begins and the last one ends."""
    index = torch.arange(columns, dtype=torch.int32, device="cpu").repeat(tokens)
    return index, torch.arange(0, columns * tokens + 1, run, dtype=torch.int32, device="cpu")


@lru_cache(maxsize=1)
def bags_are_exact() -> bool:
    """Return whether this machine has the vectorized kernel and it is right; found once, by small exact numbers."""
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return False
    codes = ((torch.arange(16 * 64, device="cpu") * 7) % 16 - 8).reshape(16, 64).to(torch.int8)
    x = (torch.arange(2 * 64, device="cpu") % 5 - 2).reshape(2, 64).float()
    scale = torch.tensor([[0.5, 2.0]], device="cpu").expand(16, 2)
    try:
        result = bag_linear(x, pack_bags(codes, scale, None), None)
    except (AttributeError, RuntimeError):  # a build of PyTorch without this op
        return False
    expected = x.double() @ (codes.double().view(16, 2, 32) * scale.double().unsqueeze(2)).view(16, 64).t()
    return torch.equal(result.double(), expected)

"""The CPU kernels of the codebook formats, equal to the definition bit for bit: compiled ones, or lookups in pieces.

The latter are for machines without a compiler, and for float64. A search among thresholds costs 20 ns an element. There
a ratio becomes the number of one of 65,536 equal cells, which three cheap passes compute, and a table has the code of
each cell. The 8-bit map's CPU rule *is* such a table. With 4 bits the few cells in which a threshold lies are marked,
and what is in them (3 in 10,000 normal values) is searched.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from lightning_qat.native import codebook as native
from lightning_qat.ops.chunks import CHUNK, chunks
from lightning_qat.ops.codebook import (
    EDGE,
    choose_codes,
    codebook_absmax_op,
    codebook_dequantize_op,
    codebook_fake_quantize_backward_op,
    codebook_fake_quantize_op,
    codebook_quantize_op,
    reference_absmax,
    reference_fake_quantize_backward,
)
from lightning_qat.ops.codebook_tables import (
    CODEBOOK_BITS,
    bin_codes,
    divides_last_block,
    dynamic_tree_step_codes,
    least_absmax,
    nan_code,
    thresholds,
    zero_code,
)
from lightning_qat.ops.codebook_tables import (
    codebook as codebook_values,
)
from lightning_qat.ops.layout import empty_result, match_layout
from lightning_qat.ops.lookup_cpu import write_lookups
from lightning_qat.ops.workspace import advise_huge_pages

#: The same where every element is searched for, 20 ns each: there the other threads are worth waiting for.
_SEARCHED_CHUNK = 1024 * 1024

#: Cells to a unit. The product with a power of two is exact, so a cell depends on the ratio alone.
_CELLS = 32768.0
#: The cell of 0.0. That of -1.0 is then 2; NaN goes to cell 0, which is marked.
_ORIGIN = _CELLS + 2
_LAST_CELL = 2 * _CELLS + 3
#: Marks a cell (and the elements in it) whose codes are not all the same, in every byte of a word of 8 codes.
_MARK = 0x80
_WORD_OF_MARKS = -0x7F7F7F7F7F7F7F80
#: Words of 8 codes that are looked through for marks at a time, on the calling thread too.
_SEARCH_WORDS = CHUNK


# --- the kernels ----------------------------------------------------------------------------------


@codebook_absmax_op.register_kernel("cpu")
def codebook_absmax_cpu(x: Tensor, name: str, block_size: int, rule: str) -> Tensor:
    """The definition in small pieces."""
    return _absmax(_flat(x), name, block_size, rule)


@codebook_quantize_op.register_kernel("cpu")
def codebook_quantize_cpu(
    x: Tensor, absmax: Tensor | None, name: str, block_size: int, rule: str
) -> tuple[Tensor, Tensor]:
    """The definition in one pass, or by lookup."""
    flat, given = _flat(x), None if absmax is None else _flat(absmax)
    scale, stored = _floats(-(-x.numel() // block_size)), _empty_codes(x.numel(), name)
    if native.quantize(flat, given, scale, stored, block_size, _rule(name, rule)):
        return stored, scale
    absmax = _absmax(flat, name, block_size, rule) if absmax is None else absmax.reshape(-1).clone()
    codes = _codes(flat, absmax, name, block_size, rule)
    return (_pack(codes, flat.numel()) if CODEBOOK_BITS[name] == 4 else codes), absmax


@codebook_dequantize_op.register_kernel("cpu")
def codebook_dequantize_cpu(
    packed: Tensor, absmax: Tensor, numel: int, name: str, block_size: int, dtype: torch.dtype
) -> Tensor:
    """The definition with two 4-bit codes looked up at once."""
    result = advise_huge_pages(torch.empty(numel, dtype=dtype, device="cpu"))
    _write_values(packed.reshape(-1), absmax.reshape(-1), name, block_size, result)
    return result


@codebook_fake_quantize_op.register_kernel("cpu")
def codebook_fake_quantize_cpu(
    x: Tensor, absmax: Tensor, stored: Tensor | None, name: str, block_size: int, rule: str
) -> Tensor:
    """The definition in one pass, or by way of packed codes, which are the quickest to turn into values."""
    result, flat, scale = empty_result(x, 1), _flat(x), _flat(absmax)
    values = scale if stored is None else _flat(stored)
    if native.fake_quantize(flat, scale, values, result, block_size, _rule(name, rule)):
        return match_layout(result, x)
    packed, scale = codebook_quantize_cpu(x, absmax, name, block_size, rule)
    _write_values(packed, values, name, block_size, result.view(-1))
    _keep_nan(flat, result.view(-1))
    return match_layout(result, x)


@codebook_fake_quantize_backward_op.register_kernel("cpu")
def codebook_fake_quantize_backward_cpu(grad: Tensor, x: Tensor, absmax: Tensor, block_size: int) -> Tensor:
    """The definition without masks."""
    if grad.dtype == torch.float64 or x.numel() == 0:
        return reference_fake_quantize_backward(grad, x, absmax, block_size)
    result = empty_result(x, 1)
    target, values, grads = result.view(-1), _flat(x), _flat(grad)
    limits = (_flat(absmax) * EDGE).unsqueeze(1)
    if native.gradient(grads, values, limits, target, block_size):
        return match_layout(result, x)
    scratch, spare = _floats(CHUNK), _floats(CHUNK if grad.dtype != torch.float32 else 0)
    for part, blocks in chunks(values.numel(), block_size):
        margin = scratch[: part.stop - part.start]
        _copy_abs(values[part], margin)
        rows = margin.view(blocks.stop - blocks.start, -1)
        # The gradient passes where this is above the threshold, so where it is 0; it would at a NaN.
        torch.sub(limits[blocks], rows, out=rows).nan_to_num_(nan=-1.0)
        g = grads[part] if grad.dtype == torch.float32 else spare[: len(margin)].copy_(grads[part])
        out = target[part] if grad.dtype == torch.float32 else g
        torch.ops.aten.threshold_backward.grad_input(g, margin, -(2.0**-149), grad_input=out)
        if grad.dtype != torch.float32:
            target[part].copy_(out)
    return match_layout(result, x)


def drawn_codes(x: Tensor, absmax: Tensor, noise: Tensor, name: str, block_size: int, rule: str) -> Tensor | None:
    """Return codes rounded stochastically, flat, in one pass; None where that takes the definition.

    Args:
        x: floating point, any shape and strides.
        absmax: one for each block.
        noise: one number of 0 to 1 for each value, flat.
        name: of the codebook.
        block_size: consecutive elements that share a scale.
        rule: "cpu" or "cuda".
    """
    codes = advise_huge_pages(torch.empty(x.numel(), dtype=torch.uint8, device="cpu"))
    chosen = _rule(name, rule)
    drawn = native.draw(_flat(x), _flat(absmax), noise, _ordered(name, rule), codes, block_size, chosen)
    return codes if drawn else None


@lru_cache(maxsize=8)
def _ordered(name: str, rule: str) -> Tensor:
    """Return the values of the bins."""
    return codebook_values(name, "cpu")[bin_codes(name, rule, "cpu").long()]


# --- pieces ---------------------------------------------------------------------------------------


def _floats(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.float32, device="cpu")


def _flat(x: Tensor) -> Tensor:
    """Return ``x`` in contiguous order, as it is where that is how it lies."""
    return x.contiguous().view(-1)


def _copy_abs(values: Tensor, out: Tensor) -> None:
    if values.dtype == torch.float32:
        torch.abs(values, out=out)
    else:
        out.copy_(values).abs_()


def _absmax(flat: Tensor, name: str, block_size: int, rule: str) -> Tensor:
    least = least_absmax(name, rule) if divides_last_block(name, rule) else 0.0
    found = _floats(-(-flat.numel() // block_size))
    if native.block_absmax(flat, found, block_size, least):
        return found
    if block_size > CHUNK or not flat.numel():
        return reference_absmax(flat, name, block_size, rule)
    scratch = _floats(CHUNK)
    for part, blocks in chunks(flat.numel(), block_size):
        magnitudes = scratch[: part.stop - part.start]
        _copy_abs(flat[part], magnitudes)
        torch.amax(magnitudes.view(blocks.stop - blocks.start, -1), dim=1, out=found[blocks])
    if flat.numel() % block_size and divides_last_block(name, rule):
        found[-1:].clamp_min_(least)
    return found


# --- codes ----------------------------------------------------------------------------------------


@lru_cache(maxsize=8)
def _rule(name: str, rule: str) -> native.Rule:
    return native.Rule(
        thresholds=thresholds(name, rule, "cpu"),
        codes=bin_codes(name, rule, "cpu"),
        values=codebook_values(name, "cpu"),
        steps=_step_table() if name == "dynamic_tree" and rule == "cpu" else None,
        bits=CODEBOOK_BITS[name],
        nan_code=nan_code(name, rule),
        fill_code=zero_code(name),
        least=least_absmax(name, rule),
        divides=divides_last_block(name, rule),
    )


def _empty_codes(count: int, name: str) -> Tensor:
    size = (count + 1) // 2 if CODEBOOK_BITS[name] == 4 else count
    return advise_huge_pages(torch.empty(size, dtype=torch.uint8, device="cpu"))


@dataclass(frozen=True)
class _Work:
    """One tensor to find codes for."""

    flat: Tensor
    absmax: Tensor
    name: str
    block_size: int
    rule: str

    def ratios(self, part: slice, blocks: slice, out: Tensor) -> Tensor:
        """Write the ratios of one piece into the beginning of ``out`` and return it."""
        divides = part.start >= self._full and divides_last_block(self.name, self.rule)
        divisor = self.absmax[blocks].clamp_min(least_absmax(self.name, self.rule)).unsqueeze(1)
        ratios = out[: part.stop - part.start]
        rows = ratios.view(len(divisor), -1)
        values = self.flat[part].view(rows.shape)
        if values.dtype != torch.float32:
            values = rows.copy_(values)
        if divides:
            torch.div(values, divisor, out=rows)
        else:
            torch.mul(values, 1.0 / divisor, out=rows)
        return ratios

    def ratios_at(self, at: Tensor) -> Tensor:
        """Return the ratios of some elements."""
        values = self.flat.index_select(0, at).to(torch.float32)
        divisor = self.absmax.index_select(0, at // self.block_size).clamp_min(least_absmax(self.name, self.rule))
        if not divides_last_block(self.name, self.rule):
            return values * (1.0 / divisor)
        return torch.where(at >= self._full, values / divisor, values * (1.0 / divisor))

    @property
    def _full(self) -> int:
        return self.flat.numel() // self.block_size * self.block_size


def _codes(flat: Tensor, absmax: Tensor, name: str, block_size: int, rule: str) -> Tensor:
    """Return the codes, with whole words in memory: the last is filled up with the code of 0.0."""
    count = flat.numel()
    memory = torch.empty(-(-count // 8) * 8, dtype=torch.uint8, device="cpu")
    codes = memory[:count]
    memory[count:].fill_(zero_code(name))
    work = _Work(flat, absmax, name, block_size, rule)
    limit = _SEARCHED_CHUNK if name == "dynamic_tree" and rule == "cuda" else CHUNK
    scratch = _floats(min(count, limit))
    for part, blocks in chunks(count, block_size, limit):
        ratios = work.ratios(part, blocks, scratch)
        if CODEBOOK_BITS[name] == 4:
            torch.index_select(_cell_table(name, rule), 0, _cells(ratios), out=codes[part])
        elif rule == "cpu":
            torch.index_select(_step_table(), 0, _steps(ratios), out=codes[part])
        else:
            codes[part] = choose_codes(ratios, name, rule)
    if CODEBOOK_BITS[name] == 4:
        _search_marked(memory, work)
    return codes


def _as_index(numbers: Tensor) -> Tensor:
    """Return float32 ``numbers`` truncated to int32, in their own memory; NaN becomes 0."""
    return numbers.view(torch.int32).copy_(numbers).clamp_min_(0)


def _cells(ratios: Tensor) -> Tensor:
    torch.add(_scalar(_ORIGIN), ratios, alpha=_CELLS, out=ratios)
    return _as_index(ratios.clamp_(0.0, _LAST_CELL))


def _steps(ratios: Tensor) -> Tensor:
    return _as_index(ratios.clamp_(-1.0, 1.0).add_(1.0).mul_(32767.5).add_(0.5))


@lru_cache(maxsize=4)
def _scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32, device="cpu")


@lru_cache(maxsize=1)
def _step_table() -> Tensor:
    return dynamic_tree_step_codes()


@lru_cache(maxsize=4)
def _cell_table(name: str, rule: str) -> Tensor:
    """Return the code of every cell, or :data:`_MARK` where it has several."""
    limits = thresholds(name, rule, "cpu")
    # The largest ratio of the bin below each threshold, and the smallest of the one above.
    below, above = (_cells(t.clone()) for t in (limits, torch.nextafter(limits, _scalar(float("inf")))))
    bins = torch.searchsorted(above, torch.arange(int(_LAST_CELL) + 1, dtype=torch.int32, device="cpu"), right=True)
    table = bin_codes(name, rule, "cpu")[bins]
    table[below[below == above].long()] = _MARK
    table[0] = _MARK
    return table


def _search_marked(memory: Tensor, work: _Work) -> None:
    """Replace marks by codes, found as the definition finds them."""
    words = memory.view(torch.int64)
    found = []
    for start in range(0, len(words), _SEARCH_WORDS):
        marked = (words[start : start + _SEARCH_WORDS] & _WORD_OF_MARKS).nonzero()
        found.append(marked.add_(start))
    if sum(map(len, found)) > len(words) // 16:
        # Many, as with zeros in fp4: quicker all at once than one by one.
        _search_all(memory, work)
        return
    places = []
    for marked in torch.cat(found).split(CHUNK // 8) if found else ():
        at = (marked * 8 + torch.arange(8, device="cpu")).view(-1)
        # Not at[memory[at] == _MARK], here and below: such an index waits for all threads however small it is.
        places.append(at.index_select(0, (memory.index_select(0, at) == _MARK).nonzero().view(-1)))
    if places:
        at = torch.cat(places)
        memory.index_copy_(0, at, choose_codes(work.ratios_at(at), work.name, work.rule))


def _search_all(memory: Tensor, work: _Work) -> None:
    count = work.flat.numel()
    scratch = _floats(min(count, _SEARCHED_CHUNK))
    for part, blocks in chunks(count, work.block_size, _SEARCHED_CHUNK):
        memory[part] = choose_codes(work.ratios(part, blocks, scratch), work.name, work.rule)


def _pack(codes: Tensor, count: int) -> Tensor:
    """Return two codes a byte, the even one in the high nibble. Changes nothing beyond ``codes``' memory."""
    packed = torch.empty((count + 1) // 2, dtype=torch.uint8, device="cpu")
    pairs = codes.as_strided((2 * len(packed),), (1,)).view(torch.int16)
    scratch = torch.empty(min(len(packed), CHUNK), dtype=torch.int16, device="cpu")
    for start in range(0, len(packed), CHUNK):
        pair = pairs[start : start + CHUNK]
        # The low byte of a pair is its first code (memory is little-endian wherever PyTorch has these kernels).
        out = torch.bitwise_right_shift(pair, 8, out=scratch[: len(pair)])
        packed[start : start + CHUNK] = torch.add(out, pair, alpha=16, out=out)
    return packed


# --- values ---------------------------------------------------------------------------------------


def _write_values(stored: Tensor, absmax: Tensor, name: str, block_size: int, result: Tensor) -> None:
    """Write the values of stored codes into one-dimensional ``result``."""
    count, in_pairs = len(result), CODEBOOK_BITS[name] == 4
    if in_pairs and block_size % 2 and count > block_size:
        # Blocks begin in the middle of a byte.
        stored, in_pairs = torch.stack((stored >> 4, stored & 15), dim=1).view(-1)[:count], False
    table = _pair_table(name) if in_pairs else codebook_values(name, "cpu")
    write_lookups(table, stored, absmax, None, block_size, result)


@lru_cache(maxsize=2)
def _pair_table(name: str) -> Tensor:
    """Return both values of every byte of packed codes, as one 8-byte element that is only ever copied."""
    values, byte = codebook_values(name, "cpu"), torch.arange(256, device="cpu")
    return torch.stack((values[byte >> 4], values[byte & 15]), dim=1).view(torch.float64).view(-1)


def _keep_nan(flat: Tensor, result: Tensor) -> None:
    """Write the NaN of ``flat`` into ``result``."""
    dtype = torch.float64 if flat.dtype == torch.float64 else torch.float32
    # Sums show whether there is one in a fraction of the time of a mask. (So would opposite infinities.)
    sums = [piece.sum(dtype=dtype) for piece in flat.split(CHUNK)]
    for chunk in torch.stack(sums).isnan().nonzero().view(-1).tolist() if sums else ():
        part = slice(chunk * CHUNK, (chunk + 1) * CHUNK)
        result[part] = torch.where(flat[part].isnan(), flat[part], result[part])

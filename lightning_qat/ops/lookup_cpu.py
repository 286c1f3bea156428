"""Stored bytes straight to scaled values on the CPU: a table has both values of two 4-bit codes.

Compiled where there is a kernel. Else pieces stay in a core's own cache, and their views are made all at once: cut one
by one they took a quarter of the time. A table for two bytes, of four values, has 1 MB, and the look-ups in it took
longer than twice as many in 2 KB.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from lightning_qat.native import lookup as native
from lightning_qat.ops.chunks import CHUNK
from lightning_qat.ops.threads import in_threads, parts_of, shares

#: Fewer elements are not worth a thread of their own: about 0.5 ms.
_LEAST_ELEMENTS = 512 * 1024


def write_lookups(
    table: Tensor, stored: Tensor, scale: Tensor, zero_point: Tensor | None, run: int, result: Tensor
) -> None:
    """Write ``(table[stored] - zero_point) * scale`` into ``result``, computed in float32.

    Args:
        table: 256 entries: float32, or of two float32 as one float64, which is only ever copied.
        stored: uint8, one-dimensional, for all of ``result``. With two values to a byte, ``run`` is even or there is
            one run.
        scale: float32 ``[runs]``.
        zero_point: float32 like ``scale``, or None for 0.
        run: consecutive elements that share a scale; the last run may be shorter.
        result: one-dimensional, contiguous, floating point.
    """
    count, per_byte = len(result), table.element_size() // 4
    if native.write_lookups(
        table,
        stored.contiguous(),
        scale.contiguous(),
        None if zero_point is None else zero_point.contiguous(),
        run,
        result,
    ):
        return
    stored, scale = stored.detach(), scale.detach().unsqueeze(1)
    zero = None if zero_point is None else zero_point.detach().unsqueeze(1)
    for start, stop, row, runs in _even_stretches(count, run):
        rows = (stop - start) // row
        source = stored[start // per_byte : -(-stop // per_byte)]
        target, factor = result[start:stop].view(rows, row), scale[runs].expand(rows, 1)
        shift = None if zero is None else zero[runs].expand(rows, 1)
        tasks = []
        for part in shares(rows, parts_of(stop - start, _LEAST_ELEMENTS)):
            codes = source[part.start * row // per_byte : -(-part.stop * row // per_byte)]
            own = None if shift is None else shift[part]
            tasks.append(partial(_write_rows, table, codes, factor[part], own, target[part]))
        in_threads(tasks)


def _even_stretches(count: int, run: int) -> list[tuple[int, int, int, slice]]:
    """Return beginning, end, length of rows and runs of stretches that are cut into rows of one scale each."""
    if run <= CHUNK:
        full = count // run
        found = [(0, full * run, run, slice(0, full)), (full * run, count, count - full * run, slice(full, full + 1))]
        return [each for each in found if each[0] < each[1]]
    found = []
    for index, start in enumerate(range(0, count, run)):
        stop = min(count, start + run)
        for a, b, row, _ in _even_stretches(stop - start, CHUNK):
            found.append((start + a, start + b, row, slice(index, index + 1)))
    return found


def _write_rows(table: Tensor, source: Tensor, scale: Tensor, zero: Tensor | None, target: Tensor) -> None:
    """Write rows of at most ``CHUNK`` elements, several at a time."""
    rows, row = target.shape
    step, per_byte = min(rows, CHUNK // row), table.element_size() // 4
    even, size = rows // step * step, -(-step * row // per_byte)
    found = torch.empty(size, dtype=table.dtype, device="cpu")
    index = torch.empty(size, dtype=torch.int32, device="cpu")
    values = found.view(torch.float32)[: step * row].view(step, row)
    whole = even * row // per_byte if even < rows else len(source)
    pieces = zip(
        source[:whole].split(size),
        scale[:even].split(step),
        (None,) * (even // step) if zero is None else zero[:even].split(step),
        target[:even].split(step),
        strict=True,
    )
    for codes, factor, shift, out in pieces:
        torch.index_select(table, 0, index.copy_(codes), out=found)
        if shift is not None:
            values.sub_(shift)
        if out.dtype == torch.float32:
            torch.mul(values, factor, out=out)
        else:
            out.copy_(values.mul_(factor))
    if even < rows:
        _write_rows(table, source[whole:], scale[even:], None if zero is None else zero[even:], target[even:])

"""Small pieces of a flattened tensor for passes on the calling thread, and which scales they take."""

from __future__ import annotations

from collections.abc import Iterator

#: Elements that go through all passes at a time: below 32768 PyTorch runs an op on the calling thread, so there is
#: no barrier (8 ms each while other processes keep the cores busy), and all of it stays in a core's own cache. All
#: passes over 16M elements then take 25 ms; with 8M at a time 40 ms alone and 300 ms beside a busy process.
CHUNK = 32 * 1024 - 64


def chunks(count: int, block_size: int, limit: int = CHUNK) -> Iterator[tuple[slice, slice]]:
    """Yield the elements and the blocks of every piece: several whole blocks, or a part of one.

    Args:
        count: elements of the tensor.
        block_size: consecutive elements that share a scale; the last block may be shorter.
        limit: most elements of a piece.
    """
    full = count // block_size
    if block_size <= limit:
        step = limit // block_size
        for block in range(0, full, step):
            stop = min(full, block + step)
            yield slice(block * block_size, stop * block_size), slice(block, stop)
    first = full if block_size <= limit else 0
    for block in range(first, -(-count // block_size)):
        end = min(count, (block + 1) * block_size)
        for start in range(block * block_size, end, limit):
            yield slice(start, min(end, start + limit)), slice(block, block + 1)

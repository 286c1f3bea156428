"""Memory for results that live for one operation: taken again as soon as nobody holds it.

A fake-quantized input is freed right after the layer has read it, and fresh memory of that size costs a page fault
for each page: more than the arithmetic (:mod:`lightning_qat.ops.layout`). Each thread keeps one piece, or two where
layers ask for that, until :func:`release_workspace`.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

#: Smaller results come from the allocator's own free lists, as fast; larger ones are too much to hold on to.
_LEAST_BYTES, _MOST_BYTES = 2**23, 2**28
#: A result may take memory up to this many times its size.
_MOST_WASTE = 8
#: Pieces kept by a thread, where results pass on to operations that may hold them: with two or three the training step
#: was no faster, and its peak memory 5 to 8 % more.
_PIECES = 1
#: Least bytes and pieces for an input and a weight that live for one product: their page faults took 7 of the 130 ms of
#: a transformer's step.
SHORT_LIVED = (2**18, 2)

_HUGE_PAGE_BYTES = 4 * 1024 * 1024
_MADV_HUGEPAGE = 14


class _Piece:
    """Memory that knows whether anybody else holds it: a tensor that shares it, or its storage."""

    def __init__(self, size: int) -> None:
        self.memory = advise_huge_pages(torch.empty(size, dtype=torch.uint8, device="cpu"))
        self.storage = self.memory.untyped_storage()
        self._alone = self._holders()

    def _holders(self) -> tuple[int, int]:
        return torch._C._storage_Use_Count(self.storage._cdata), sys.getrefcount(self.storage)

    def is_free(self) -> bool:
        return self._holders() == self._alone


class _Workspace(threading.local):
    def __init__(self) -> None:
        #: The least bytes to take and the most pieces to keep; None where nothing is taken.
        self.taking: tuple[int, int] | None = None
        self.pieces: list[_Piece] = []


_WORKSPACE = _Workspace()


class passing_results:  # noqa: N801 - used as a function; made by contextlib it takes three times as long
    """Let results made inside, on this thread, be of memory that is used again once nobody holds them.

    Args:
        rule: the least bytes to take and the most pieces to keep; None is large results, one at a time.
    """

    __slots__ = ("_before", "_rule")

    def __init__(self, rule: tuple[int, int] | None = None) -> None:
        self._rule = (_LEAST_BYTES, _PIECES) if rule is None else rule

    def __enter__(self) -> None:
        self._before, _WORKSPACE.taking = _WORKSPACE.taking, self._rule

    def __exit__(self, *_: object) -> None:
        _WORKSPACE.taking = self._before


def release_workspace() -> None:
    """Give the memory that this thread holds back to the allocator."""
    _WORKSPACE.pieces.clear()


def take(like: Tensor) -> Tensor | None:
    """Return uninitialized CPU memory as ``torch.empty_like(like)``, or None where it should be fresh."""
    rule = _WORKSPACE.taking
    if rule is None or not rule[0] <= like.nbytes <= _MOST_BYTES:
        return None
    if not like.is_contiguous() and not (like.dim() == 4 and like.is_contiguous(memory_format=torch.channels_last)):
        return None
    memory = _free_piece(like.nbytes, rule[1])
    if memory is None:
        return None
    return memory[: like.nbytes].view(like.dtype).as_strided(like.size(), like.stride())


def _free_piece(size: int, most: int) -> Tensor | None:
    pieces = _WORKSPACE.pieces
    for piece in pieces:
        if size <= piece.memory.nbytes <= size * _MOST_WASTE and piece.is_free():
            return piece.memory
    if len(pieces) >= most:
        smallest = min(pieces, key=lambda piece: piece.memory.nbytes)
        if smallest.memory.nbytes >= size or len(pieces) > most:
            return None
        pieces.remove(smallest)
    pieces.append(_Piece(size))
    return pieces[-1].memory


def advise_huge_pages(memory: Tensor) -> Tensor:
    """Ask for huge pages where ``memory`` is large, and return it.

    The page faults of fresh memory otherwise cost more than the arithmetic: 4096 x 4096 float32 on two
    cores took 23 ms, of which 14 ms were faults, and 10 ms with huge pages.
    """
    advise = _madvise()
    if advise is not None and memory.nbytes >= _HUGE_PAGE_BYTES:
        page = 4096
        start = -(-memory.data_ptr() // page) * page
        end = (memory.data_ptr() + memory.nbytes) // page * page
        # Only advice: where the kernel refuses it, the memory is as good as before.
        advise(start, end - start, _MADV_HUGEPAGE)
    return memory


@lru_cache(maxsize=1)
def _madvise() -> Callable[[int, int, int], int] | None:
    """Return ``madvise(2)``, or None on systems without transparent huge pages."""
    if sys.platform != "linux":
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    function.restype = ctypes.c_int
    return function

"""Load compiled families and call their functions with tensors' addresses."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch

from lightning_qat.native.build import BuildError, compiled_library, remember_sources

_LOG = logging.getLogger(__name__)

#: Letters of a signature: an address, integers of 64 and 32 bits, floats of 32 and 64.
_TYPES = {"p": ctypes.c_void_p, "q": ctypes.c_int64, "i": ctypes.c_int32, "f": ctypes.c_float, "d": ctypes.c_double}

#: Elements that are worth another thread: handing work over costs some 5 microseconds.
GRAIN = 16_384


class _Switch(threading.local):
    """Whether compiled kernels may be used by this thread, for tests and comparisons."""

    off = os.environ.get("LIGHTNING_QAT_NATIVE", "1").strip().lower() in ("0", "false", "off")


_SWITCH = _Switch()


@contextlib.contextmanager
def without_native() -> Iterator[None]:
    """Take every op's PyTorch path on this thread."""
    before, _SWITCH.off = _SWITCH.off, True
    try:
        yield
    finally:
        _SWITCH.off = before


#: Registry of name -> family.
FAMILIES: dict[str, Family] = {}


class Family:
    """The functions of one source file, compiled and loaded when first asked for.

    Args:
        name: of the source file.
        signatures: name of each function -> letters of its arguments, see ``_TYPES``; all return nothing.
    """

    def __init__(self, name: str, signatures: dict[str, str]) -> None:
        self.name = name
        self.signatures = signatures
        self._functions: Any = None
        self._lock = threading.Lock()
        #: Why there are no functions, where that is known.
        self.reason: str | None = None
        remember_sources(name)
        FAMILIES[name] = self

    def functions(self) -> Any:
        """Return an object with the functions as attributes, or None where there are none to use.

        A function that this machine's compiler does not make is None. There are none while a mode sees PyTorch's
        operations (``make_fx``, which writes them down): what is written to an address would be missing among them.
        """
        if _SWITCH.off or torch._C._len_torch_dispatch_stack():
            return None
        if self._functions is None and self.reason is None:
            self._load()
        return self._functions

    def _load(self) -> None:
        with self._lock:
            if self._functions is not None or self.reason is not None:
                return
            try:
                library = _loaded(self.name)
            except (BuildError, OSError) as error:
                self.reason = str(error)
                _LOG.info("CPU kernels %r are not used, PyTorch's operations are: %s", self.name, error)
                return
            self._functions = SimpleNamespace(
                **{name: _function(library, name, letters) for name, letters in self.signatures.items()}
            )


def _loaded(name: str) -> ctypes.CDLL:
    """Return the library of a family; one that does not load, as of another machine, is compiled again once.

    Not where the folder lets no program be run (``noexec``): a new one would not load either, at every start.
    """
    path = compiled_library(name)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        if "map segment" in str(error):
            raise
        return ctypes.CDLL(str(compiled_library(name, unusable=str(error))))


def _renew_locks() -> None:
    """Let a forked process compile: it has locks that are held, and not the threads that would give them back."""
    for family in FAMILIES.values():
        family._lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_locks)


class FloatFamily(Family):
    """A family with every function in float32, bfloat16 and, where the compiler has it, float16.

    Args:
        name: of the source file.
        signatures: name of each function, without the dtype it ends in -> letters of its arguments.
        others: those of functions that there are once.
    """

    def __init__(self, name: str, signatures: dict[str, str], others: dict[str, str] | None = None) -> None:
        self._names = {
            (function, dtype): f"{function}_{str(dtype).removeprefix('torch.')}"
            for function in signatures
            for dtype in (torch.float32, torch.bfloat16, torch.float16)
        }
        found = {full: signatures[function] for (function, _), full in self._names.items()}
        super().__init__(name, {**found, **(others or {})})

    def of(self, function: str, dtype: torch.dtype) -> Any:
        """Return a function for ``dtype``, or None where there is none to use."""
        functions, full_name = self.functions(), self._names.get((function, dtype))
        return None if functions is None or full_name is None else getattr(functions, full_name)


def _function(library: ctypes.CDLL, name: str, letters: str) -> Any:
    """Return a function of ``library``; None where it has none of this name, as for dtypes the compiler lacks."""
    function = getattr(library, name, None)
    if function is not None:
        function.argtypes = [_TYPES[letter] for letter in letters]
        function.restype = None
    return function


#: A process forked from this one has none of its threads, and would wait for them.
_PROCESS = os.getpid()


def threads_for(elements: int) -> int:
    """Return how many of PyTorch's threads go over so many elements: all or one; one in a forked process.

    A team of fewer would end the other threads, and the next of all start them again.
    """
    return torch.get_num_threads() if elements >= 2 * GRAIN and os.getpid() == _PROCESS else 1


def why_not_native() -> str | None:
    """Return why this process does not use compiled CPU kernels, or None where it does."""
    if _SWITCH.off:
        return "LIGHTNING_QAT_NATIVE=0"
    return next((family.reason for family in FAMILIES.values() if family.functions() is None), None)

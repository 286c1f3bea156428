"""Compile one family of CPU kernels, or find it compiled: a shared library in a cache folder of this user."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shlex
import shutil
import signal
import stat
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

_LOG = logging.getLogger(__name__)

_SOURCES = Path(__file__).parent

#: What every kernel relies on: no contraction of a product and a sum into one rounding, and none of the liberties of
#: ``-ffast-math``. What is given up is ``errno`` and floating-point exceptions, which nobody reads.
_FLAGS = (
    "-std=c++17", "-O3", "-fPIC", "-fopenmp", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math",
)  # fmt: skip

#: A compiler that hangs must not hold up a training run.
_SECONDS = 120


class BuildError(RuntimeError):
    """There is no compiled library, and the message says why."""


def compiled_library(family: str, *, unusable: str | None = None) -> Path:
    """Return the shared library of ``family``, compiled if this machine has not done so yet.

    Its name holds a digest of the sources, the flags, the compiler and the processor, so that another processor that
    shares the folder, or another version, compiles its own. It is written under a temporary name and renamed: of
    several processes that compile at once, all find a whole file. One that was damaged since is compiled again:
    loading what is cut off would end the process.

    Args:
        family: name of a source file in this folder, without its ending.
        unusable: why the one that is there cannot be used, so that it is compiled again; None if that is not known.

    Raises:
        BuildError: if it cannot be compiled.
    """
    compiler = find_compiler()
    command = (*compiler, *_FLAGS, *_machine_flags())
    source = _SOURCES / f"{family}.cpp"
    target = cache_folder() / f"{family}-{_digest(source, compiler, command)}.so"
    there = target.exists()
    if there and unusable is None and not _is_whole(target):
        unusable = "it is damaged"
    if there and unusable is not None:
        _LOG.warning("CPU kernels %r are compiled again, %s cannot be used: %s", family, target, unusable)
    if not there or unusable is not None:
        _compile(compiler, command, source, target)
    return target


def remember_sources(family: str) -> None:
    """Keep what ``family`` is compiled from, as it is now, while its signatures are imported.

    Where the package is replaced under a running process, functions with other arguments than are handed to them would
    read and write anywhere.
    """
    _texts(_SOURCES / f"{family}.cpp")


@lru_cache(maxsize=64)
def _texts(source: Path) -> dict[str, bytes]:
    """Return the source and all headers by their names, as they were when this was first called."""
    return {path.name: path.read_bytes() for path in (source, *sorted(source.parent.glob("*.h"))) if path.exists()}


def find_compiler() -> tuple[str, ...]:
    """Return the C++ compiler's command: ``$CXX``, which may have words of its own as ``ccache g++`` does, or ``g++``.

    Raises:
        BuildError: if there is none, or the system is not Linux.
    """
    if platform.system() != "Linux":
        raise BuildError(f"compiled CPU kernels are for Linux, and this is {platform.system()}")
    given = os.environ.get("CXX", "").strip() or "g++"
    try:
        first, *words = [given] if shutil.which(given) else shlex.split(given)  # a path may hold spaces
    except ValueError as error:
        raise BuildError(f"CXX={given!r} is no command ({error}); set it to a C++ compiler") from error
    found = shutil.which(first)
    if found is None:
        raise BuildError(f"no C++ compiler {first!r} is installed; install g++, or set CXX to one")
    return found, *words


def cache_folder() -> Path:
    """Return the folder of compiled libraries: ``$LIGHTNING_QAT_CACHE``, or one in the user's cache.

    Raises:
        BuildError: if none can be written, or somebody else could write into it.
    """
    chosen = os.environ.get("LIGHTNING_QAT_CACHE")
    reasons = []
    for candidate in [lambda: Path(chosen)] if chosen else [_users_folder, _temporary_folder]:
        try:
            folder = candidate()
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _check_own(folder)
        except (OSError, RuntimeError) as error:  # the latter from ``Path.home``, of a user without a home
            reasons.append(str(error))
            continue
        return folder
    raise BuildError(f"no folder for compiled kernels ({'; '.join(reasons)}); set LIGHTNING_QAT_CACHE to one")


def _users_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning_qat"


def _temporary_folder() -> Path:
    return Path(tempfile.gettempdir()) / f"lightning_qat-{os.getuid()}"


def _check_own(folder: Path) -> None:
    """Raise where another user could put a library that this process would then load."""
    found = folder.stat()
    others = found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if others or folder.lstat().st_uid != os.getuid():  # whose link it is could let it lead elsewhere
        raise PermissionError(f"{folder} belongs to another user or is writable by others")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{folder} cannot be written")


def _machine_flags() -> tuple[str, ...]:
    if platform.machine() in ("x86_64", "AMD64"):
        return ("-march=native", "-mprefer-vector-width=512")
    return ("-mcpu=native",)


@lru_cache(maxsize=64)
def _digest(source: Path, compiler: tuple[str, ...], command: tuple[str, ...]) -> str:
    parts = [*command, _version(compiler), platform.machine(), _processor()]
    return hashlib.sha256(b"\0".join([*(part.encode() for part in parts), *_texts(source).values()])).hexdigest()[:16]


@lru_cache(maxsize=8)
def _version(compiler: tuple[str, ...]) -> str:
    return _run((*compiler, "--version"))


@lru_cache(maxsize=1)
def _processor() -> str:
    """Return what ``-march=native`` looks at: the model and the instruction sets of the first core."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n", 1)[0].splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(line for line in lines if line.startswith(("model", "cpu family", "flags", "Features", "CPU")))


def _compile(compiler: tuple[str, ...], command: tuple[str, ...], source: Path, target: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=f".{target.stem}-", dir=target.parent) as folder:
        compiled, linked = Path(folder) / "compiled.o", Path(folder) / "linked.so"
        for name, text in _texts(source).items():
            (Path(folder) / name).write_bytes(text)
        _run((*command, "-c", str(Path(folder) / source.name), "-o", str(compiled)))
        # Not linked with OpenMP: its symbols are those of the library that PyTorch has loaded, whose threads these are.
        _run((*compiler, "-shared", str(compiled), "-o", str(linked)))
        with linked.open("ab") as library:  # loaders do not look behind the last section
            library.write(_seal(linked.read_bytes()))
        os.replace(linked, target)


def _seal(contents: bytes) -> bytes:
    return hashlib.sha256(contents).digest()


def _is_whole(library: Path) -> bool:
    """Return whether a library ends in the digest of all before it."""
    try:
        contents = library.read_bytes()
    except OSError:
        return False
    size = len(contents) - hashlib.sha256().digest_size
    return size > 0 and contents[size:] == _seal(contents[:size])


def _run(command: tuple[str, ...]) -> str:
    """Return what ``command`` says; it ends within :data:`_SECONDS`, with all processes that it began."""
    pipes: Any = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    try:
        process = subprocess.Popen(command, **pipes, encoding="utf-8", errors="replace", start_new_session=True)
    except OSError as error:
        raise BuildError(f"{command[0]} failed: {error}") from error
    with process:
        try:
            said, _ = process.communicate(timeout=_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise BuildError(f"{command[0]} failed: {error}") from error
        finally:
            if process.returncode is None:  # also where somebody interrupts: what it began holds the pipes
                os.killpg(process.pid, signal.SIGKILL)
    if process.returncode:
        raise BuildError(f"{' '.join(command)} failed: {said.strip()[-2000:]}")
    return said

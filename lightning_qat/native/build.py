"""Compile one family of CPU kernels, or find it compiled: a shared library in a cache folder of this user."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

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


def compiled_library(family: str) -> Path:
    """Return the shared library of ``family``, compiled if this machine has not done so yet.

    Its name holds a digest of the sources, the flags, the compiler and the processor, so that another processor that
    shares the folder, or another version, compiles its own. It is written under a temporary name and renamed: of
    several processes that compile at once, all find a whole file.

    Args:
        family: name of a source file in this folder, without its ending.

    Raises:
        BuildError: if it cannot be compiled.
    """
    compiler = find_compiler()
    command = (compiler, *_FLAGS, *_machine_flags())
    source = _SOURCES / f"{family}.cpp"
    target = cache_folder() / f"{family}-{_digest(source, command)}.so"
    if not target.exists():
        _compile(command, source, target)
    return target


def find_compiler() -> str:
    """Return the C++ compiler: ``$CXX``, or ``g++``.

    Raises:
        BuildError: if there is none, or the system is not Linux.
    """
    if platform.system() != "Linux":
        raise BuildError(f"compiled CPU kernels are for Linux, and this is {platform.system()}")
    found = shutil.which(os.environ.get("CXX") or "g++")
    if found is None:
        raise BuildError("no C++ compiler is installed; install g++, or set CXX to one")
    return found


def cache_folder() -> Path:
    """Return the folder of compiled libraries: ``$LIGHTNING_QAT_CACHE``, or one in the user's cache.

    Raises:
        BuildError: if none can be written, or somebody else could write into it.
    """
    chosen = os.environ.get("LIGHTNING_QAT_CACHE")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    candidates = [Path(chosen)] if chosen else [home / "lightning_qat", _temporary_folder()]
    reasons = []
    for folder in candidates:
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _check_own(folder)
        except OSError as error:
            reasons.append(str(error))
            continue
        return folder
    raise BuildError(f"no folder for compiled kernels ({'; '.join(reasons)}); set LIGHTNING_QAT_CACHE to one")


def _temporary_folder() -> Path:
    return Path(tempfile.gettempdir()) / f"lightning_qat-{os.getuid()}"


def _check_own(folder: Path) -> None:
    """Raise where another user could put a library that this process would then load."""
    found = folder.stat()
    if found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"{folder} belongs to another user or is writable by others")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{folder} cannot be written")


def _machine_flags() -> tuple[str, ...]:
    if platform.machine() in ("x86_64", "AMD64"):
        return ("-march=native", "-mprefer-vector-width=512")
    return ("-mcpu=native",)


@lru_cache(maxsize=64)
def _digest(source: Path, command: tuple[str, ...]) -> str:
    version = subprocess.run([command[0], "--version"], capture_output=True, text=True, timeout=_SECONDS, check=False)
    parts = [*command, version.stdout, platform.machine(), _processor()]
    texts = [path.read_bytes() for path in (source, *sorted(_SOURCES.glob("*.h")))]
    return hashlib.sha256(b"\0".join([*(part.encode() for part in parts), *texts])).hexdigest()[:16]


@lru_cache(maxsize=1)
def _processor() -> str:
    """Return what ``-march=native`` looks at: the model and the instruction sets of the first core."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n", 1)[0].splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(line for line in lines if line.startswith(("model", "cpu family", "flags", "Features", "CPU")))


def _compile(command: tuple[str, ...], source: Path, target: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=f".{target.stem}-", dir=target.parent) as folder:
        compiled, linked = Path(folder) / "compiled.o", Path(folder) / "linked.so"
        _run([*command, "-c", str(source), "-o", str(compiled)])
        # Not linked with OpenMP: its symbols are those of the library that PyTorch has loaded, whose threads these are.
        _run([command[0], "-shared", str(compiled), "-o", str(linked)])
        os.replace(linked, target)


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} failed: {error}") from error
    if done.returncode:
        raise BuildError(f"{' '.join(command)} failed: {done.stderr.strip()[-2000:]}")

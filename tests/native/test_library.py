from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from lightning_qat.native import build, library, upper_factor
from lightning_qat.native.fake_quantize import quantize
from lightning_qat.native.library import FAMILIES, Family, threads_for, why_not_native, without_native

needs_compiler = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which(os.environ.get("CXX") or "g++") is None, reason="needs a C++ compiler"
)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("LIGHTNING_QAT_CACHE", str(folder))
    return folder


@needs_compiler
def test_a_family_is_compiled_once_and_found_again(cache, monkeypatch):
    first = build.compiled_library("fake_quantize")
    assert first.parent == cache
    assert [path.name for path in cache.iterdir()] == [first.name]  # nothing half-written beside it
    monkeypatch.setattr(build, "_run", lambda command: pytest.fail("compiled again"))
    assert build.compiled_library("fake_quantize") == first


@needs_compiler
def test_the_library_uses_the_threads_of_pytorch(cache):
    library = build.compiled_library("fake_quantize")
    needed = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True, check=False).stdout
    assert "libgomp" not in needed
    code = (
        "import torch; from lightning_qat.native.fake_quantize import quantize\n"
        "torch.set_num_threads(2); x = torch.randn(400, 400); y = torch.empty_like(x)\n"
        "assert quantize(x, y, (1, 1, x.numel()), torch.tensor(0.1), None, -127, 127)\n"
        "loaded = {l.split()[-1] for l in open('/proc/self/maps') if 'gomp' in l}\n"
        "assert len(loaded) == 1, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@needs_compiler
def test_a_source_that_does_not_compile_says_so_and_leaves_nothing(cache, tmp_path, monkeypatch):
    (tmp_path / "broken.cpp").write_text("this is no C++")
    monkeypatch.setattr(build, "_SOURCES", tmp_path)
    with pytest.raises(build.BuildError, match="failed"):
        build.compiled_library("broken")
    assert not list(cache.iterdir())
    family = Family("broken", {})
    assert family.functions() is None
    assert "failed" in str(FAMILIES.pop("broken").reason)


def _cut_off(library: Path) -> None:
    library.write_bytes(library.read_bytes()[: library.stat().st_size // 2])


def _of_another_machine(library: Path) -> None:
    contents = bytearray(library.read_bytes()[: -hashlib.sha256().digest_size])
    contents[18:20] = (0xF3, 0)  # e_machine: RISC-V
    library.write_bytes(bytes(contents) + hashlib.sha256(contents).digest())


_DAMAGES = {
    "empty": lambda library: library.write_bytes(b""),
    "cut off": _cut_off,
    "of another machine": _of_another_machine,
}


def _says_in_a_child(used: bool, log: Path) -> str:
    """Return what is logged where a process loads a family that this one has not, and whether its kernel is right.

    Loading a library that is cut off ends a process.
    """
    child = os.fork()
    if not child:
        signal.alarm(60)
        native = upper_factor._FAMILY
        native._functions = native.reason = None
        logging.basicConfig(filename=log, filemode="w", level=logging.INFO, force=True)
        matrix, order = torch.arange(9.0).view(3, 3), torch.tensor([2, 0, 1])
        made = [upper_factor.gather_upper(matrix, order, None) for _ in range(2)]
        right = matrix[order][:, order].triu().double()
        as_asked = all(torch.equal(x.triu(), right) if used and x is not None else x is None and not used for x in made)
        logging.shutdown()
        os._exit(0 if as_asked else 3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    return log.read_text()


@needs_compiler
@pytest.mark.parametrize("damage", _DAMAGES)
def test_a_damaged_library_is_compiled_again_once(cache, tmp_path, damage):
    library, log = build.compiled_library("upper_factor"), tmp_path / "log"
    size = library.stat().st_size
    _DAMAGES[damage](library)
    said = _says_in_a_child(True, log)
    assert said.count("are compiled again") == said.count(f"{library} cannot be used") == 1
    assert build._is_whole(library)
    assert library.stat().st_size == size
    assert list(cache.iterdir()) == [library]
    assert "again" not in _says_in_a_child(True, log)


@needs_compiler
@pytest.mark.parametrize("damage", _DAMAGES)
def test_where_a_damaged_library_cannot_be_compiled_again_pytorchs_operations_are_used(
    cache, tmp_path, monkeypatch, damage
):
    monkeypatch.setenv("CXX", _script(tmp_path, 'test "$1" = --version || test -z "$BROKEN" || exit 3; exec g++ "$@"'))
    library, log = build.compiled_library("upper_factor"), tmp_path / "log"
    _DAMAGES[damage](library)
    damaged = library.read_bytes()
    monkeypatch.setenv("BROKEN", "1")
    said = _says_in_a_child(False, log)
    assert said.count("are compiled again") == said.count("PyTorch's operations are") == 1
    assert [path.read_bytes() for path in cache.iterdir()] == [damaged]
    monkeypatch.delenv("BROKEN")
    assert "are compiled again" in _says_in_a_child(True, log)


@needs_compiler
def test_a_folder_that_lets_nothing_be_run_is_not_compiled_into_again(cache, tmp_path, monkeypatch, caplog):
    (tmp_path / "some.cpp").write_text('extern "C" void some(int* to) { *to = 1; }')
    monkeypatch.setattr(build, "_SOURCES", tmp_path)
    compiled = Mock(side_effect=build._compile)
    monkeypatch.setattr(build, "_compile", compiled)
    refused = "some.so: failed to map segment from shared object: Operation not permitted"
    monkeypatch.setattr(ctypes, "CDLL", Mock(side_effect=OSError(refused)))
    family = Family("some", {"some": "p"})
    assert family.functions() is None
    assert family.reason == refused
    assert compiled.call_count == 1
    assert "compiled again" not in caplog.text
    del FAMILIES["some"]


@needs_compiler
def test_what_is_compiled_is_what_the_signatures_were_imported_with(cache, tmp_path, monkeypatch):
    """Functions of a package that was replaced meanwhile may take other arguments, and write anywhere."""
    source = tmp_path / "changing.cpp"
    source.write_text('#include "number.h"\nextern "C" void write(int* to) { *to = NUMBER; }')
    (tmp_path / "number.h").write_text("#define NUMBER 1")
    monkeypatch.setattr(build, "_SOURCES", tmp_path)
    family = Family("changing", {"write": "p"})
    monkeypatch.delitem(FAMILIES, "changing")
    source.write_text('extern "C" void write(int* to) { *to = 2; }')
    (tmp_path / "number.h").unlink()
    to = torch.zeros(1, dtype=torch.int32)
    family.functions().write(to.data_ptr())
    assert to.item() == 1


def test_without_a_compiler_there_is_a_reason(cache, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(build.BuildError, match="g\\+\\+|CXX|Linux"):
        build.compiled_library("fake_quantize")


@needs_compiler
def test_a_folder_that_others_can_write_is_refused(cache):
    cache.mkdir()
    cache.chmod(cache.stat().st_mode | stat.S_IWOTH)
    with pytest.raises(build.BuildError, match="writable by others"):
        build.compiled_library("fake_quantize")


@needs_compiler
def test_without_native_nothing_is_written():
    x, out = torch.randn(10), torch.zeros(10)
    with without_native():
        assert not quantize(x, out, (1, 1, 10), torch.tensor(0.1), None, -127, 127)
    assert not out.any()


@needs_compiler
def test_what_is_used_is_known(monkeypatch):
    assert why_not_native() is None
    with without_native():
        assert why_not_native() == "LIGHTNING_QAT_NATIVE=0"
    family = next(iter(FAMILIES.values()))
    monkeypatch.setattr(family, "_functions", None)
    monkeypatch.setattr(family, "reason", "no C++ compiler is installed")
    assert why_not_native() == "no C++ compiler is installed"


@needs_compiler
def test_a_compiler_may_be_more_than_a_word(cache, monkeypatch):
    monkeypatch.setenv("CXX", "env LANG=C g++")
    assert build.find_compiler()[1:] == ("LANG=C", "g++")
    assert build.compiled_library("upper_factor").exists()


def test_what_is_no_command_is_no_compiler(cache, monkeypatch):
    monkeypatch.setattr(build.platform, "system", lambda: "Linux")
    monkeypatch.setenv("CXX", "g++ '")
    with pytest.raises(build.BuildError, match="No closing quotation"):
        build.compiled_library("upper_factor")


def test_a_user_without_a_home_has_the_temporary_folder(tmp_path, monkeypatch):
    def none() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("LIGHTNING_QAT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", none)
    monkeypatch.setattr(build.tempfile, "gettempdir", lambda: str(tmp_path))
    assert build.cache_folder().parent == tmp_path


def test_a_link_of_somebody_else_is_refused(cache, tmp_path, monkeypatch):
    (tmp_path / "own").mkdir(mode=0o700)
    cache.symlink_to(tmp_path / "own")
    assert build.cache_folder() == cache
    found = os.lstat(cache)
    other = os.stat_result((*found[:4], found.st_uid + 1, *found[5:]))
    monkeypatch.setattr(Path, "lstat", lambda self: other if self == cache else os.lstat(self))
    with pytest.raises(build.BuildError, match="belongs to another user"):
        build.cache_folder()


def _script(folder: Path, text: str) -> str:
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o700)
    return str(path)


@needs_compiler
@pytest.mark.parametrize(
    ("text", "reason"),
    [("sleep 60; exit 0", "timed out"), ("printf 'caf\\351'; exit 3", "caf\ufffd"), ("kill -9 $$", "failed")],
    ids=["hangs", "no UTF-8", "dies"],
)
def test_a_compiler_that_hangs_or_fails_holds_nothing_up(cache, tmp_path, monkeypatch, text, reason):
    """A shell's own child has its pipes: it has to end too."""
    monkeypatch.setenv("CXX", _script(tmp_path, text))
    monkeypatch.setattr(build, "_SECONDS", 0.3)
    family, start = Family("upper_factor_of_a_test", {}), time.monotonic()
    monkeypatch.setattr(library, "compiled_library", lambda name: build.compiled_library("upper_factor"))
    assert family.functions() is None
    assert reason in str(FAMILIES.pop(family.name).reason)
    assert time.monotonic() - start < 20


@needs_compiler
def test_a_process_forked_while_another_thread_compiles_compiles_itself(monkeypatch):
    """It inherits the lock, and not the thread that would give it back."""
    family = Family("forked_of_a_test", {})
    monkeypatch.setattr(library, "compiled_library", lambda name: build.compiled_library("upper_factor"))
    with family._lock:
        child = os.fork()
        if not child:
            signal.alarm(20)
            os._exit(0 if family.functions() is not None else 3)
    FAMILIES.pop(family.name)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_small_work_stays_on_one_thread():
    assert threads_for(0) == threads_for(1000) == 1
    assert threads_for(2**30) == torch.get_num_threads()


def test_every_source_has_its_python_file():
    folder = Path(build.__file__).parent
    assert all(path.with_suffix(".py").exists() for path in folder.glob("*.cpp"))

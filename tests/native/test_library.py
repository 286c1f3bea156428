from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_qat.native import build
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


def test_small_work_stays_on_one_thread():
    assert threads_for(0) == threads_for(1000) == 1
    assert threads_for(2**30) == torch.get_num_threads()


def test_every_source_has_its_python_file():
    folder = Path(build.__file__).parent
    assert all(path.with_suffix(".py").exists() for path in folder.glob("*.cpp"))

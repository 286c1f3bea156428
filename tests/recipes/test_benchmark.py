"""The benchmark verifies before it times, and writes what it measured. Nothing here depends on a time."""

import importlib.util
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from rich.console import Console
from torch import nn
from torch.nn import functional as F

from lightning_qat.config import PRESETS
from lightning_qat.recipes import (
    _benchmark_inference,
    _benchmark_train_step,
    _timing,
    benchmark,
)
from lightning_qat.recipes._benchmark_peers import LINEAR_PEERS, NETWORK_PEERS, PACKAGES, Peer, working_peers
from lightning_qat.recipes._errors import ConfigError
from lightning_qat.recipes._provenance import source_commit
from lightning_qat.recipes._timing import Conditions, Gauge, Results, Timing, rated
from lightning_qat.recipes.benchmark import _table


def run(folder, *overrides):
    command = [sys.executable, "-m", "lightning_qat", "benchmark", *overrides]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


def run_here(folder, **settings):
    """Run the recipe in this process."""
    cfg = {"rounds": 1, "threads": None, "size": None, "output_dir": str(folder), **settings}
    return benchmark.benchmark(OmegaConf.create(cfg))


@pytest.mark.parametrize("group", ["convert", "matmul", "gptq"])
@pytest.mark.parametrize(
    ("size", "near"), [(1000, "size=896 or size=1024"), (1, "size=128."), (129, "size=128 or size=256")]
)
def test_a_size_that_groups_of_integers_do_not_divide_is_refused_before_anything_is_measured(
    tmp_path, monkeypatch, group, size, near
):
    monkeypatch.setattr(benchmark, "Gauge", lambda device: pytest.fail("measured"))
    with pytest.raises(ConfigError, match=rf"size={size} is no multiple of 128.* in {group}; use {near}"):
        run_here(tmp_path, groups=["fake_quantize", group], device="cpu", size=size)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [0, -128, 12.5, "large", True])
def test_a_size_that_is_no_side_is_refused(tmp_path, size):
    with pytest.raises(ConfigError, match=f"size={size!r} is no side of a tensor; use a positive integer"):
        run_here(tmp_path, groups=["fake_quantize"], device="cpu", size=size)


def test_fake_quantize_takes_any_size(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "Gauge", lambda device: gauge(10.0))
    monkeypatch.setattr(torch, "compile", lambda function: function)
    found = run_here(tmp_path, groups=["fake_quantize"], device="cpu", size=13)
    assert {timing.name for timing in found.timings} == {"torch", "torch.compile", "lightning_qat"}


def test_the_verb_writes_json_with_machine_and_versions(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")  # it would take half a minute
    done = run(tmp_path, "groups=[fake_quantize]", "rounds=1", "size=256", "device=cpu")
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.rglob("benchmark.json")
    results = json.loads(path.read_text())
    assert results["machine"]["versions"]["torch"] == torch.__version__
    assert results["machine"]["copy_gigabytes_per_second"] > 0
    assert (results["machine"]["device"], results["machine"]["gpu"], results["size"]) == ("cpu", None, 256)
    assert {*PACKAGES, "bitsandbytes", "triton"} <= results["machine"]["versions"].keys()
    assert results["commit"] == source_commit()
    assert results["notes"] == []
    assert "not installed" not in done.stdout  # this group has no such peers
    assert {timing["name"] for timing in results["timings"]} == {"torch", "torch.compile", "lightning_qat"}
    forward, *_, learned = results["timings"]
    assert (forward["moved"], learned["moved"]) == (2 * 256 * 256 * 4, 3 * 256 * 256 * 4)
    assert forward["of_copy"] > 0
    assert "torch 2" in done.stdout


def test_an_unknown_group_is_answered_with_the_nearest(tmp_path):
    done = run(tmp_path, "groups=[train_stop]")
    assert done.returncode == 2
    assert "did you mean 'train_step'" in done.stderr


def test_a_device_that_is_not_there_is_a_clear_error(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="needs a GPU, and PyTorch .* sees none here; use device=cpu"):
        benchmark.chosen_device("cuda")
    with pytest.raises(ConfigError, match="did you mean 'cuda'"):
        benchmark.chosen_device("cudaa")
    assert [benchmark.chosen_device(name).type for name in ("auto", "cpu")] == ["cpu", "cpu"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [benchmark.chosen_device(name).type for name in ("auto", "cpu", "cuda")] == ["cuda", "cpu", "cuda"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_verb_without_a_gpu(tmp_path):
    done = run(tmp_path, "device=cuda")
    assert done.returncode == 2
    assert "use device=cpu or device=auto" in done.stderr
    assert "Traceback" not in done.stderr


def fake_gpu(monkeypatch):
    """Let the benchmark believe in a GPU; nothing is run there."""
    facts = {"name": "NVIDIA H200", "capability": "9.0"}
    monkeypatch.setattr(benchmark, "chosen_device", lambda name: torch.device("cuda"))
    # The first argument is the device.
    monkeypatch.setattr(benchmark, "Gauge", lambda device: gauge(4000.0))
    monkeypatch.setattr(_timing, "gpu_facts", lambda device: facts)
    return facts


def gauge(copied, multiplied=1000.0):
    """Return a gauge of the CPU that finds these rates."""
    made = Gauge(torch.device("cpu"), elements=4, side=2)
    made.copy_rate, made.matrix_rate = lambda medians: copied, lambda medians: multiplied
    return made


def test_json_and_text_name_the_gpu_and_what_stays_on_the_cpu(tmp_path, monkeypatch, capsys):
    facts = fake_gpu(monkeypatch)
    seen = []

    def group(conditions):
        seen.append(conditions)
        cpu = Conditions(1, gauge=conditions.gauge)
        return Results(rated("convert x", {"a": lambda: None}, cpu, baseline="a", moved={"a": 10**8}))

    monkeypatch.setitem(benchmark.GROUPS, "convert", group)
    monkeypatch.setitem(benchmark.GROUPS, "train_step", lambda conditions: Results())
    run_here(tmp_path, groups=["convert", "train_step"], device="auto")
    found = json.loads((tmp_path / "benchmark.json").read_text())
    assert found["machine"]["gpu"] == facts
    assert found["notes"] == ["train_step: on the CPU, with device=cuda too"]
    timing = found["timings"][0]
    assert timing["of_copy"] == timing["gigabytes_per_second"] / 4000
    assert (seen[0].side, seen[0].dtype) == (8192, torch.bfloat16)
    assert "NVIDIA H200 (capability 9.0)" in capsys.readouterr().out


def test_convert_and_matmul_are_written_and_printed_whole(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "Gauge", lambda device: gauge(10.0))
    run_here(tmp_path, groups=["convert", "matmul"], device="cpu", size=128)
    found = json.loads((tmp_path / "benchmark.json").read_text())
    assert {timing["group"].split()[0] for timing in found["timings"]} == {"convert", "matmul"}
    for timing in found["timings"]:
        assert timing["of_copy"] == timing["gigabytes_per_second"] / 10
        assert timing["moved"] > 0
        assert (timing["of_matrix"] is None) == timing["group"].startswith("convert")
    lines = capsys.readouterr().out.splitlines()
    tables = lines[: next(i for i, line in enumerate(lines) if ", torch 2" in line)]
    assert max(map(len, tables)) <= 100
    assert "…" not in "".join(tables)
    assert sum(line.startswith("lightning_qat") for line in tables) == sum(
        timing["name"].startswith("lightning_qat") for timing in found["timings"]
    )


def test_the_clock_of_a_gpu_flushes_launches_and_waits(monkeypatch):
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("record")

        def synchronize(self):
            log.append("synchronize")

        def elapsed_time(self, end):
            return 2.5

    class Flushed:
        def max(self):
            log.append("flush")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch, "zeros", lambda *args, **kwargs: Flushed())
    medians = _timing.interleaved({"a": lambda: log.append("case")}, 1, "", device=torch.device("cuda"))
    turn = ["flush", "record", "case", "record", "synchronize"]
    assert medians == {"a": 2.5}
    assert log == turn * 5  # one that is not counted, and a turn of a short case


def test_rates_are_per_second_and_shares_of_the_devices_own(monkeypatch):
    own = Gauge(torch.device("cpu"), elements=10**6, side=100)
    times = {"a": 2.0, "b": 4.0, **dict(zip(own.cases(), (1.0, 0.01), strict=True))}
    monkeypatch.setattr(_timing, "interleaved", lambda cases, *_, **__: {name: times[name] for name in cases})
    cases = dict.fromkeys("ab", lambda: None)
    moved = {"a": 10**7, "b": 10**6}
    a, b = rated("g", cases, Conditions(1, gauge=own), baseline="b", moved=moved, operations=10**8)
    assert (a.ratio, a.gigabytes_per_second, a.gigaflops) == (2.0, 5.0, 50.0)
    assert (a.of_copy, a.of_matrix) == (5.0 / 8.0, 50.0 / 200.0)  # 8 MB a ms, 2 million operations in 10 us
    assert (b.ratio, b.moved, b.gigabytes_per_second) == (1.0, 10**6, 0.25)
    (plain, _) = rated("g", cases, Conditions(1, gauge=own), baseline="a", moved=moved)
    assert (plain.of_copy, plain.gigaflops, plain.of_matrix) == (5.0 / 8.0, None, None)
    (alone, _) = rated("g", cases, Conditions(1), baseline="a", moved=moved, operations=1)
    assert (alone.of_copy, alone.of_matrix) == (None, None)


def test_tables_fit_100_columns(capsys):
    name = "torchao int8, dynamic per token"
    rates = {"gigabytes_per_second": 810.0, "gigaflops": 81000.0, "of_copy": 81.0, "of_matrix": 81.0}
    timing = Timing("matmul", name, 1234.56, 0.01, sqnr_db=133.3, moved=10**12, operations=10**14, **rates)
    Console(width=100).print(_table("matmul Linear 4096, batch 256", [timing]))
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if name in line and "8100 %" in line]
    assert "…" not in out


def test_the_training_step_has_its_peers_and_keeps_what_float_keeps():
    measured = _benchmark_train_step.train_step_group(1, batch=4, sequences=1).timings
    blocks = {timing.name: timing for timing in measured if "transformer" in timing.group}
    ours = [f"lightning_qat, {form}" for form in ("observing", "observing, own loop", "frozen", "learned scales")]
    assert list(blocks) == ["float", *ours]
    assert blocks["lightning_qat, observing"].kept < 1.05
    timings = {timing.name: timing for timing in measured if "conv" in timing.group}
    assert list(timings) == ["float", *ours, "torch.ao eager", "torch.ao FX"]
    assert timings["float"].kept == timings["float"].peak == 1
    assert timings["lightning_qat, observing"].kept < 1.02
    assert timings["torch.ao FX"].kept > 1.3  # the witness: the measure sees what others keep


def test_the_peak_is_the_running_maximum_of_what_is_allocated():
    class Wasteful(nn.Linear):
        def forward(self, x):
            torch.empty(2**22)  # 16 MB, freed at once
            return super().forward(x)

    torch.manual_seed(0)
    images, labels = torch.randn(64, 8), torch.randint(0, 4, (64,))
    models = [nn.Linear(8, 4), Wasteful(8, 4)]
    for model in models:
        F.cross_entropy(model(images), labels).backward()
    plain, wasteful = (_benchmark_train_step._peak_bytes(model, images, labels) for model in models)
    assert plain >= models[0].weight.nbytes + models[0].bias.nbytes  # the gradients, at least
    assert plain < 2**16
    assert 2**24 <= wasteful < 2**24 + 2**16
    assert models[0].weight.grad is not None


def test_a_training_peer_that_breaks_is_a_note(monkeypatch):
    def broken(images):
        raise AttributeError("gone\nfor good")

    monkeypatch.setattr(_benchmark_train_step, "_torch_ao_fx", broken)
    results = _benchmark_train_step.train_step_group(1, batch=4, sequences=1)
    assert "torch.ao FX" not in {timing.name for timing in results.timings}
    assert results.notes == ["torch.ao FX is not timed: AttributeError: gone"]


def expected_names(presets, peers):
    ours = [f"lightning_qat {name}" for name in presets if name in PRESETS]
    return ["float", *ours, *(peer.name for peer in peers if peer.installed)]


def test_inference_has_float_ours_and_the_installed_peers():
    results = _benchmark_inference.inference_group(1, features=128, batches=(2,))
    groups: dict[str, list[Timing]] = {}
    for timing in results.timings:
        groups.setdefault(timing.group, []).append(timing)
    linear, row, small, large = ([timing.name for timing in timings] for timings in groups.values())
    narrow = ["float bfloat16", "lightning_qat w4a16, bfloat16"]
    assert linear == row == expected_names(_benchmark_inference._LINEAR_PRESETS, LINEAR_PEERS) + narrow
    assert {"lightning_qat int8_weight_only", "lightning_qat w4a16", "torch.ao dynamic, per tensor"} <= set(linear)
    assert small == large == expected_names(_benchmark_inference._NETWORK_PRESETS, NETWORK_PEERS)
    assert results.notes == []
    assert all((timing.sqnr_db is None) == (timing.name == "float") for timing in results.timings)
    in_a_row = 10 * math.log10(_benchmark_inference._LAYERS)  # noise of independent layers adds up
    for timing in results.timings:
        least = 15 - in_a_row * ("in a row" in timing.group)
        assert timing.sqnr_db is None or timing.sqnr_db > least


def test_a_peer_that_fails_is_a_note_and_one_that_is_not_installed_is_left_out():
    def broken(model, samples):
        raise RuntimeError("no such operator\nand a page more")

    model = nn.Linear(4, 4).eval()
    weight = model.weight.clone()

    def wrong(model, samples):
        model.weight.data.zero_()  # a peer may change the model that it is given
        return lambda x: x * 100

    peers = (
        Peer("broken", broken),
        Peer("wrong", wrong),
        Peer("absent", broken, ("no_such_package_is_installed",)),
        Peer("right", lambda model, samples: lambda x: model(x).detach()),
    )
    found, notes = working_peers(peers, model, torch.randn(8, 4))
    assert list(found) == ["right"]
    assert found["right"].sqnr_db == float("inf")
    assert notes[0] == "broken is not timed: RuntimeError: no such operator"
    assert notes[1].startswith("wrong is not timed: its outputs are -")
    assert len(notes) == 2
    assert torch.equal(model.weight, weight)


def test_a_peer_that_does_not_take_a_batch_is_a_note():
    def only_eight(x):
        if len(x) != 8:
            raise ValueError("eight at a time")
        return x

    form = _benchmark_inference.Form
    forms = {"float": form(lambda x: x), "peer": form(only_eight)}
    results = _benchmark_inference._timed("group", forms, torch.zeros(2, 3), 1)
    assert [timing.name for timing in results.timings] == ["float"]
    assert results.notes == ["peer is not timed in group: ValueError: eight at a time"]
    with pytest.raises(ValueError, match="eight"):
        _benchmark_inference._timed("group", {"float": form(only_eight)}, torch.zeros(2, 3), 1)


def test_the_table_has_columns_for_what_was_measured():
    def headings(*timings):
        return [str(column.header) for column in _table("group", list(timings)).columns]

    assert headings(Timing("group", "float", 1.0, 1.0)) == ["who", "ms", "as fast", "time"]
    step = Timing("group", "ours", 1.0, 1.0, kept=1.0, peak=1.1)
    assert headings(Timing("group", "float", 1.0, 1.0), step)[-2:] == ["kept", "peak"]
    assert headings(Timing("group", "ours", 1.0, 1.0, sqnr_db=40.0))[-1] == "SQNR (dB)"


def test_results_add_up():
    timing = Timing("group", "float", 1.0, 1.0)
    both = Results([timing], ["a"]) + Results([timing], ["b"])
    assert both == Results([timing, timing], ["a", "b"])


@pytest.mark.skipif(all(map(importlib.util.find_spec, PACKAGES)), reason="all peers are installed")
def test_what_is_not_installed_is_said_in_one_line(tmp_path, monkeypatch, capsys):
    timing = Timing("inference x", "float", 1, 1)
    monkeypatch.setitem(benchmark.GROUPS, "inference", lambda conditions: Results([timing]))
    run_here(tmp_path, groups=["inference"], device="cpu")
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("not installed: ")]
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    assert line == f"not installed: {', '.join(missing)}"


def git(folder, *words):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *identity, *words], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path) -> Path:
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    (tmp_path / "lightning_qat").mkdir()
    (tmp_path / "lightning_qat" / "__init__.py").touch()
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "lightning-qat"\n')
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    return tmp_path


def test_the_commit_of_a_checkout(checkout, monkeypatch):
    package = checkout / "lightning_qat"
    commit = git(checkout, "rev-parse", "HEAD")
    assert source_commit(package) == commit
    monkeypatch.setenv("GIT_DIR", str(checkout / "elsewhere"))  # as inside a hook of another repository
    assert source_commit(package) == commit
    monkeypatch.delenv("GIT_DIR")
    (package / "__init__.py").write_text("changed = True")
    assert source_commit(package) == f"{commit}-dirty"
    monkeypatch.setenv("PATH", "")
    assert source_commit(package) is None


def test_no_commit_of_another_repository(checkout):
    installed = checkout / "venv" / "site-packages" / "lightning_qat"
    installed.mkdir(parents=True)
    assert source_commit(installed) is None
    # A copy of the sources that another repository holds is not a checkout of its own either.
    shutil.copy(checkout / "pyproject.toml", installed.parent)
    assert source_commit(installed) is None
    (checkout / "pyproject.toml").write_text('[project]\nname = "another"\n')
    assert source_commit(checkout / "lightning_qat") is None

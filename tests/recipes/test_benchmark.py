"""The benchmark verifies before it times, and writes what it measured. Nothing here depends on a time."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_qat.config import PRESETS
from lightning_qat.recipes import _benchmark_fake_quantize, _benchmark_inference, _benchmark_train_step
from lightning_qat.recipes._benchmark_peers import LINEAR_PEERS, NETWORK_PEERS, PACKAGES, Peer, working_peers
from lightning_qat.recipes._provenance import source_commit
from lightning_qat.recipes._timing import Results, Timing
from lightning_qat.recipes.benchmark import _table


def run(folder, *overrides):
    command = [sys.executable, "-m", "lightning_qat", "benchmark", *overrides]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


def test_the_verb_writes_json_with_machine_and_versions(tmp_path):
    done = run(tmp_path, "groups=[fake_quantize]", "rounds=1")
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.rglob("benchmark.json")
    results = json.loads(path.read_text())
    assert results["machine"]["versions"]["torch"] == torch.__version__
    assert results["machine"]["copy_gigabytes_per_second"] > 0
    assert set(PACKAGES) <= results["machine"]["versions"].keys()
    assert results["commit"] == source_commit()
    assert results["notes"] == []
    assert "not installed" not in done.stdout  # only inference has such peers
    assert {timing["name"] for timing in results["timings"]} == {"torch", "lightning_qat"}
    assert "torch 2" in done.stdout


def test_an_unknown_group_is_answered_with_the_nearest(tmp_path):
    done = run(tmp_path, "groups=[train_stop]")
    assert done.returncode == 2
    assert "did you mean 'train_step'" in done.stderr


def test_wrong_numbers_are_not_timed(monkeypatch):
    monkeypatch.setattr(_benchmark_fake_quantize, "fake_quantize", lambda x, scale, axis: x)
    with pytest.raises(RuntimeError, match="differs from torch"):
        _benchmark_fake_quantize.fake_quantize_group(1, size=8)


def test_the_training_step_has_its_peers_and_keeps_what_float_keeps():
    measured = _benchmark_train_step.train_step_group(1, batch=4, sequences=1).timings
    blocks = {timing.name: timing for timing in measured if "transformer" in timing.group}
    assert list(blocks) == ["float", "lightning_qat, observing", "lightning_qat, frozen"]
    assert blocks["lightning_qat, observing"].kept < 1.05
    timings = {timing.name: timing for timing in measured if "conv" in timing.group}
    assert list(timings) == [
        "float",
        "lightning_qat, observing",
        "lightning_qat, frozen",
        "torch.ao eager",
        "torch.ao FX",
    ]
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
    linear, small, large = ([timing.name for timing in timings] for timings in groups.values())
    narrow = ["float bfloat16", "lightning_qat w4a16, bfloat16"]
    assert linear == expected_names(_benchmark_inference._LINEAR_PRESETS, LINEAR_PEERS) + narrow
    assert {"lightning_qat int8_weight_only", "lightning_qat w4a16", "torch.ao dynamic, per tensor"} <= set(linear)
    assert small == large == expected_names(_benchmark_inference._NETWORK_PRESETS, NETWORK_PEERS)
    assert results.notes == []
    assert all((timing.sqnr_db is None) == (timing.name == "float") for timing in results.timings)
    assert all(timing.sqnr_db > 15 for timing in results.timings if timing.sqnr_db is not None)


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
    from omegaconf import OmegaConf

    from lightning_qat.recipes import benchmark

    monkeypatch.setitem(benchmark.GROUPS, "inference", lambda rounds: Results([Timing("inference x", "float", 1, 1)]))
    cfg = {"groups": ["inference"], "rounds": 1, "threads": None, "output_dir": str(tmp_path)}
    benchmark.benchmark(OmegaConf.create(cfg))
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

"""The benchmark verifies before it times, and writes what it measured. Nothing here depends on a time."""

import json
import subprocess
import sys

import pytest
import torch

from lightning_qat.recipes import _benchmark_fake_quantize, _benchmark_inference, _benchmark_train_step


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
    timings = {timing.name: timing for timing in _benchmark_train_step.train_step_group(1, batch=4)}
    assert list(timings) == [
        "float",
        "lightning_qat, observing",
        "lightning_qat, frozen",
        "torch.ao eager",
        "torch.ao FX",
    ]
    assert timings["lightning_qat, observing"].kept < 1.02
    assert timings["torch.ao FX"].kept > 1.3  # the witness: the measure sees what others keep


def test_inference_has_float_ours_and_a_peer():
    timings = _benchmark_inference.inference_group(1, features=32, batches=(2,))
    assert len({timing.group for timing in timings}) == 3
    names = [timing.name for timing in timings[:4]]
    assert names == ["float", "lightning_qat int8", "lightning_qat int8_dynamic", "torch.ao dynamic, per tensor"]

"""Times of 1 and of 64 samples: what is timed, what is left out and why, and the line that says where it does not pay.

Nothing here depends on a time.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import lightning_qat as lq
from lightning_qat.recipes import _latency
from lightning_qat.recipes._latency import Example, Latency, latency

from .conftest import TINY, Run


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_latency, "_ROUNDS", 1)


def pair(plan: str = "int8") -> dict[str, nn.Module]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    prepared = lq.prepare(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)), plan)
    lq.calibrate(prepared, [torch.randn(16, 6)])
    return {"float": model, "converted": lq.convert(prepared)}


@pytest.mark.parametrize(("have", "want"), [(5, 1), (5, 64), (64, 64), (1, 64), (100, 64)])
def test_samples_are_cut_and_repeated(have: int, want: int) -> None:
    x, mask = torch.arange(have * 2.0).view(have, 2), torch.arange(have)
    example = Example.keep("", (x, {"mask": mask}, None), {"scale": 2.0}).of_batch(want)
    expected = torch.arange(want) % have
    assert torch.equal(example.args[0], x[expected])
    assert torch.equal(example.args[1]["mask"], mask[expected])
    assert example.args[2] is None
    assert example.kwargs == {"scale": 2.0}


def test_an_example_is_a_copy() -> None:
    x = torch.zeros(2, 2)
    example = Example.keep("", (x,), {})
    x.add_(1)
    assert not example.args[0].any()


@pytest.mark.parametrize(
    ("args", "why"),
    [
        ((torch.zeros(4, 6), torch.zeros(6, 6)), r"no common dimension 0 \(sizes \[4, 6\]\)"),
        ((torch.zeros(4, 6), torch.tensor(1.0)), "cannot be cut along dimension 0"),
        ((torch.zeros(4, 6).to_sparse(),), "cannot be cut along dimension 0"),
        ((object(),), "takes a object, which cannot be cut"),
        ((torch.zeros(0, 6),), "no common dimension 0"),
        ((), "no common dimension 0"),
    ],
)
def test_what_cannot_be_cut_is_left_out_with_a_note(args: tuple[object, ...], why: str) -> None:
    found = latency(pair(), Example("", args, {}))
    assert found.of("float") == {}
    (note,) = found.lines()
    assert note.startswith("Not timed: ")
    with pytest.raises(ValueError, match=why):
        Example("", args, {}).of_batch(64)


def test_both_are_timed_in_evaluation_and_put_back() -> None:
    modes: list[tuple[bool, bool, int]] = []
    models = pair()
    for model in models.values():
        model.register_forward_hook(
            lambda module, args, _: modes.append((module.training, torch.is_inference_mode_enabled(), len(args[0])))
        )
    models["float"].train()
    models["float"][1].eval()  # type: ignore[index]
    found = latency(models, Example("", (torch.randn(5, 6),), {}))
    assert {batch for _, _, batch in modes} == {1, 64}
    assert {mode[:2] for mode in modes} == {(False, True)}
    assert set(found.of("float")) == set(found.of("converted")) == {1, 64}
    assert models["float"].training
    assert not models["float"][1].training  # type: ignore[index]
    assert sum(found.execution.values()) == 2


def test_a_model_that_refuses_is_left_out_with_its_own_words() -> None:
    class Fixed(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if len(x) > 1:
                raise RuntimeError("one at a time\nplease")
            result: torch.Tensor = self.inner(x)
            return result

    found = latency({name: Fixed(model) for name, model in pair().items()}, Example("", (torch.randn(5, 6),), {}))
    assert set(found.of("converted")) == {1}
    assert found.notes == ("Not timed: a forward pass of batch 64 raised RuntimeError: one at a time",)


def test_a_batch_that_would_take_too_long_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_latency, "interleaved", lambda cases, *_, **__: dict.fromkeys(cases, 1000.0))
    found = latency(pair(), Example("", (torch.randn(5, 6),), {}))
    assert found.of("float") == {1: 1000.0}
    assert found.notes == ("Batch 64 was not timed: it would take about 256 s",)


def test_without_an_example() -> None:
    assert latency(pair(), None).lines()[0].startswith("Not timed: the test calls neither")


def test_the_line_names_batch_factor_and_reason() -> None:
    times = {"float": {1: 1.0, 64: 10.0}, "converted": {1: 1.3, 64: 10.2}}
    (line,) = Latency(times, {"onednn int8": 3}).lines()
    assert line.startswith("The converted model takes 1.30 times the float model's time at batch 1 on this CPU: ")
    assert "all 3 layers compute with integers" in line
    (line,) = Latency(times, {"native int4, weight-only": 3}).lines()
    assert "all 3 layers multiply float inputs by the weight as it is stored" in line
    mixed = {"onednn int8": 1, "reference: weight-only": 4, "reference: 16-bit inputs": 2}
    (line,) = Latency(times, mixed).lines()
    assert "6 of 7 layers compute in float from their codes (weight-only: 4; 16-bit inputs: 2)" in line
    assert "save memory, not time" in line
    both = {"float": {1: 1.0, 64: 10.0}, "converted": {1: 2.0, 64: 15.0}}
    assert (
        "2.00 times the float model's time at batch 1 and 1.50 times the float model's time at batch 64"
        in Latency(both).lines()[0]
    )
    assert Latency({"float": {1: 1.0}, "converted": {1: 0.5}}, mixed).lines() == []


@pytest.mark.parametrize("plan", ["int8_weight_only", "int8_dynamic"])
def test_reasons_of_layers_have_their_hints(plan: str) -> None:
    """The hints hang on the words of QuantizedLayer.execution."""
    conv = lq.prepare(nn.Sequential(nn.Conv2d(1, 2, 3)), plan)
    (execution,) = {layer.execution for layer in lq.convert(conv).children()}
    assert any(execution.startswith(f"reference: {start}") for start in _latency._HINTS), execution


def test_train_and_evaluate_keep_the_times(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run("train", *TINY)
    content = json.loads((folder / "results.json").read_text())
    timed = {row["variant"]: {key for key in row if key.startswith("ms_")} for row in content["variants"]}
    both = {"ms_batch_1", "ms_batch_64"}
    assert timed == {"float": both, "PTQ": set(), "QAT": set(), "converted": both}
    assert content["latency"]["threads"] == torch.get_num_threads()
    assert sum(content["latency"]["layers_by_execution"].values()) == 7
    log = next((folder / "wandb").glob("offline-run-*/*.wandb")).read_bytes()
    assert b"converted/ms_batch_64" in log
    evaluated = run("evaluate", f"model_path={folder}", "layers=true")
    rows = json.loads((Path(evaluated) / "results.json").read_text())["variants"]
    assert all(both <= row.keys() for row in rows)
    printed = capsys.readouterr().out
    assert printed.count("ms for") == 4
    for word in ("computes", "per channel", "model.head", "Conv2d"):
        assert word in printed

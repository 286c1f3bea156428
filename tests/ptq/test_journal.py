"""A run that is killed goes on and ends with the same bytes; another run's blocks are not taken."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import UserDict
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from ptq import interrupted
from ptq_models import Llama, built, tokens
from torch import nn

import lightning_qat as lq
from lightning_qat.ptq.journal import Journal, fingerprint
from lightning_qat.ptq.methods import METHODS

SCRIPT = Path(__file__).parent / "interrupted.py"
PLAN = lq.QuantizationPlan([lq.LayerRule("layers.*", lq.QuantizationConfig("int4", group_size=8))])


@dataclass
class Batch:
    ids: torch.Tensor


def run(*arguments) -> int:
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parent.parent.parent)}
    return subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], env=environment, timeout=240).returncode


def digest(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in ("model.safetensors", "manifest.json")]


def test_killed_and_run_again_is_the_same_to_the_byte(tmp_path: Path) -> None:
    method = "awq+gptq" if "awq+gptq" in METHODS else "gptq"
    interrupted.main(tmp_path / "whole", "", 0, method)  # in this process, and never interrupted
    journal = tmp_path / "journal"
    assert run(tmp_path / "broken", journal, 10, method) == -signal.SIGKILL  # in the second of three blocks
    assert not (tmp_path / "broken").exists()
    assert len(list(journal.glob("*.safetensors"))) == 1
    assert run(tmp_path / "broken", journal, 0, method) == 0
    assert digest(tmp_path / "broken") == digest(tmp_path / "whole")
    assert len(list(journal.glob("*.safetensors"))) == 3
    whole, broken = (torch.load(tmp_path / name / "report.pt") for name in ("whole", "broken"))
    same = ("name", "method", "bits", "loss", "nearest_loss", "damping", "notes")
    assert [[row[key] for key in same] for row in whole] == [[row[key] for key in same] for row in broken]


def test_scales_that_are_kept_at_inputs_survive_a_kill(tmp_path: Path) -> None:
    interrupted.main(tmp_path / "whole", "", 0, "awq", "Bert")
    assert run(tmp_path / "broken", tmp_path / "journal", 3, "awq", "Bert") == -signal.SIGKILL
    assert len(list((tmp_path / "journal").glob("*.safetensors"))) == 1
    assert run(tmp_path / "broken", tmp_path / "journal", 0, "awq", "Bert") == 0
    assert digest(tmp_path / "broken") == digest(tmp_path / "whole")
    assert b'"input_factor"' in digest(tmp_path / "whole")[1]


def quantized(journal: Path, model=None, **changes):
    arguments = {"config": PLAN, "calibration": tokens(), "method": "gptq", **changes}
    return lq.quantize_model(model or built(Llama), journal=journal, **arguments)


def test_finished_blocks_are_not_computed_again(tmp_path: Path) -> None:
    told = []

    class Recorder(lq.PTQObserver):
        def stage_restored(self, name, outcomes):
            told.append((name, len(outcomes)))

        def layer_done(self, outcome):
            told.append(outcome.name)

    first = quantized(tmp_path / "journal", observer=Recorder())
    assert len(told) == 21
    told.clear()
    again = quantized(tmp_path / "journal", observer=Recorder())
    assert told == [("layers.0", 7), ("layers.1", 7), ("layers.2", 7)]
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert [o.loss for o in lq.ptq_report(first).layers] == [o.loss for o in lq.ptq_report(again).layers]


def test_an_unconverted_result_resumes_too(tmp_path: Path) -> None:
    first = quantized(tmp_path / "journal", convert=False)
    again = quantized(tmp_path / "journal", convert=False)
    for name, value in first.state_dict().items():
        assert not isinstance(value, torch.Tensor) or torch.equal(value, again.state_dict()[name]), name
    sizes = [file.stat().st_size for file in (tmp_path / "journal").glob("*.safetensors")]
    assert max(sizes) < 2 * min(sizes)  # a block's file does not hold those before it


@pytest.mark.parametrize(
    ("other", "change"),
    [
        ("calibration", {"calibration": tokens(3)}),
        (
            "plan",
            {"config": lq.QuantizationPlan([lq.LayerRule("layers.*", lq.QuantizationConfig("int4", group_size=4))])},
        ),
        ("options", {"options": lq.PTQOptions(order="blocks")}),
        ("model", {}),
    ],
)
def test_another_run_is_refused(tmp_path: Path, other: str, change: dict) -> None:
    journal = tmp_path / "journal"
    quantized(journal)
    if other == "model":
        change = {"model": built(Llama)}
        change["model"].norm.weight.data[0] += 1e-3
    with pytest.raises(ValueError, match=f"blocks of a run with another {other}"):
        quantized(journal, **change)
    made = quantized(journal, **change, restart=True)
    fresh = quantized(tmp_path / "fresh", **change)
    for name, value in made.state_dict().items():
        assert torch.equal(value, fresh.state_dict()[name]), name


def test_damage_and_other_folders_are_told(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    quantized(journal)
    file = min(journal.glob("*layers.1*.safetensors"))
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(ValueError, match="is damaged.*delete it"):
        quantized(journal)
    file.unlink()
    quantized(journal)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="holds no journal"):
        quantized(tmp_path / "other", restart=True)
    (journal / "fingerprint.json").write_text("{")
    with pytest.raises(ValueError, match="fingerprint.json is damaged"):
        Journal(journal, {})


def test_the_fingerprint_sees_every_part() -> None:
    model, batches = built(Llama), [{"ids": batch, "flag": True} for batch in tokens()]
    known = fingerprint(model, batches, plan=PLAN)
    assert fingerprint(built(Llama), [dict(batch) for batch in batches], plan=PLAN) == known
    batches[2]["ids"] = batches[2]["ids"].clone()
    batches[2]["ids"][0, 0] += 1
    assert fingerprint(model, batches, plan=PLAN)["calibration"] != known["calibration"]
    batches[2]["flag"] = False
    assert fingerprint(model, batches[:2], plan=PLAN)["calibration"] != known["calibration"]
    for kind in (UserDict, Batch, lambda ids: {"ids": ids.numpy()}):  # a tokenizer returns the first
        seen = {fingerprint(model, [kind(ids=torch.zeros(5000) + value)])["calibration"] for value in (0, 0)}
        ids = torch.zeros(5000)
        ids[2500] = 1
        assert len(seen | {fingerprint(model, [kind(ids=ids)])["calibration"]}) == 2
    networks = [nn.Sequential(nn.Linear(4, 4, bias=False), last) for last in (nn.ReLU(), nn.ReLU(), nn.GELU())]
    for network in networks:
        nn.init.ones_(network[0].weight)
    assert [fingerprint(network, []) == fingerprint(networks[0], []) for network in networks] == [True, True, False]
    model.layers[1].q_proj.weight.data[3, 3] = -model.layers[1].q_proj.weight.data[3, 3]
    assert fingerprint(model, [], plan=PLAN)["model"] != known["model"]


def test_a_new_parameter_at_the_place_of_one_that_is_gone_is_written(tmp_path: Path) -> None:
    model = lq.prepare(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)), lq.QuantizationConfig("int4", group_size=8))
    journal = Journal(tmp_path / "journal", {})
    journal.begin(model)
    gone, norm = id(model[0]._parameters.pop("weight")), model[1]  # as a packed layer gives it up
    kept = []
    while id(norm.weight) != gone:
        kept.append(norm.weight)
        norm.weight = nn.Parameter(torch.full((8,), 3.0))
        if len(kept) > 10_000:
            pytest.skip("this Python does not use the place again")
    journal.write("norms", model, [], [])
    norm.weight = nn.Parameter(torch.zeros(8))
    assert journal.restore("norms", model) == []
    assert norm.weight.tolist() == [3.0] * 8

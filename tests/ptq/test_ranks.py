"""Two ranks that each see half of the calibration make one model: that of one process which sees all."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ptq import two_ranks
from ptq_models import Llama, built, tokens

import lightning_qat as lq


def test_two_ranks_are_one(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root = Path(two_ranks.__file__).parent.parent.parent
    both = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "PYTHONPATH": str(root)}
    ranks = [
        subprocess.Popen([sys.executable, two_ranks.__file__, tmp_path], env={**os.environ, **both, "RANK": str(rank)})
        for rank in (0, 1)
    ]
    try:
        assert [process.wait(timeout=240) for process in ranks] == [0, 0]
    finally:
        for process in ranks:
            process.kill()
    (first, report), (second, _) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    expected, whole = two_ranks.quantized(tokens(), across_ranks=False)
    for ours, theirs in zip(report, whole, strict=True):
        # The order of the sums is another one, by which a code or two may differ.
        assert ours["nearest_loss"] == pytest.approx(theirs["nearest_loss"], rel=0.05)
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.2)
    alone = two_ranks.quantized(tokens()[::2], across_ranks=False)[1]
    assert abs(alone[0]["nearest_loss"] / whole[0]["nearest_loss"] - 1) > 0.2  # half of the data is another sum
    for name in (name for name in expected if name.endswith("input_scale")):
        assert torch.equal(first[name], second[name])
    # Experts that only one of the ranks comes to are known to both.
    (first, report), (second, other) = (torch.load(tmp_path / f"{rank}.experts.pt") for rank in (0, 1))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    assert {row["name"]: row["method"] for row in report} == {row["name"]: row["method"] for row in other}
    assert sorted(row["name"] for row in report if row["method"] == "rtn") == [
        f"layers.{block}.experts.3.{part}" for block in (0, 1) for part in (0, 2)
    ]

    # One rank has padding, the other has not: the ranges and losses are those of the sentences alone.
    (first, report), (second, _) = (torch.load(tmp_path / f"{rank}.padded.pt") for rank in (0, 1))
    alone = [sentence for rank in (0, 1) for sentence in two_ranks.sentences_of(rank)[1]]
    expected, whole = two_ranks.with_padding(alone, across_ranks=False)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
        assert not name.endswith("input_scale") or torch.allclose(value, expected[name], rtol=1e-5), name
    for ours, theirs in zip(report, whole, strict=True):
        assert ours["nearest_loss"] == pytest.approx(theirs["nearest_loss"], rel=1e-4)


def test_a_journal_is_of_one_process(tmp_path: Path) -> None:
    options = lq.PTQOptions(across_ranks=True)
    with pytest.raises(ValueError, match="is of one process"):
        lq.quantize_model(built(Llama), two_ranks.PLAN, tokens(), "gptq", options=options, journal=tmp_path / "j")

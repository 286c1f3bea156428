"""Rounding to nearest: ranges of activations are those of all ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ptq_models import built, images
from torch import distributed as dist
from torch import nn

import lightning_qat as lq


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))


def _one_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", world_size=2, rank=rank)
    options = lq.PTQOptions(across_ranks=True)
    made = lq.quantize_model(built(network), "int8", images(4)[rank::2], "rtn", options=options)
    torch.save(made.state_dict(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_all_ranks_get_the_same_model(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_one_rank, (str(tmp_path),), nprocs=2)
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert any(name.endswith("input_scale") for name in one)
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize(("config", "norm", "runs"), [("nf4", False, 0), ("int8", False, 3), ("nf4", True, 3)])
def test_batches_are_run_where_something_is_learned_of_them(config: str, norm: bool, runs: int) -> None:
    layers = [nn.Linear(64, 64), *([nn.BatchNorm1d(64)] if norm else []), nn.Linear(64, 4)]
    model, seen = nn.Sequential(*layers).eval(), []
    model.register_forward_hook(lambda *_: seen.append(1))
    batches = [torch.randn(2, 64) for _ in range(3)]
    made = lq.quantize_model(model, config, batches, "rtn")
    assert len(seen) == runs
    without = lq.quantize_model(model, "nf4")
    if config == "nf4":
        assert all(torch.equal(value, without.state_dict()[name]) for name, value in made.state_dict().items())

"""Measure what this machine does: fake quantization, training step and inference, beside the peers."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from ._benchmark_fake_quantize import fake_quantize_group
from ._benchmark_inference import inference_group
from ._benchmark_train_step import train_step_group
from ._errors import ConfigError, nearest
from ._timing import Timing, machine

logger = logging.getLogger(__name__)

#: Registry of group -> what measures it, given the rounds.
GROUPS: dict[str, Callable[[int], list[Timing]]] = {
    "fake_quantize": fake_quantize_group,
    "train_step": train_step_group,
    "inference": inference_group,
}


def benchmark(cfg: DictConfig) -> list[Timing]:
    """Run the groups one after the other; verify numbers, time, print a table and write ``benchmark.json``."""
    for group in cfg.groups:
        if group not in GROUPS:
            raise ConfigError(f"groups={group!r} is not known{nearest(group, GROUPS)}")
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    facts = machine(cfg.rounds)
    timings = [timing for group in cfg.groups for timing in GROUPS[group](cfg.rounds)]
    path = Path(cfg.output_dir) / "benchmark.json"
    _write(path, {"machine": facts, "rounds": cfg.rounds, "timings": [asdict(timing) for timing in timings]})
    _show(facts, timings, path)
    return timings


def _write(path: Path, results: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(results, indent=1))
    os.replace(temporary, path)


def _show(facts: dict[str, Any], timings: list[Timing], path: Path) -> None:
    console = Console()
    table = Table("measurement", "who", "ms", "times as fast", "time", "kept", title="medians, taken in turn")
    for before, timing in zip([None, *timings], timings, strict=False):
        first = before is None or before.group != timing.group
        kept = "-" if timing.kept is None else f"{timing.kept:.2f}x"
        figures = (f"{timing.milliseconds:.2f}", f"{timing.ratio:.2f}x", f"{1 / timing.ratio:.2f}x", kept)
        table.add_row(timing.group if first else "", timing.name, *figures)
    console.print(table)
    console.print(
        f"{facts['capability']}, {facts['threads']} threads, torch {facts['versions']['torch']}: copies "
        f"{facts['copy_gigabytes_per_second']:.0f} GB/s, multiplies {facts['matrix_gigaflops']:.0f} GFLOP/s (float32)"
    )
    console.print("time: of the first row's. kept: memory that a forward leaves for backward, of the first row's.")
    console.print(f"Everything is in {path}")


@hydra.main(version_base="1.3", config_path="pkg://lightning_qat.conf", config_name="benchmark")
def main(cfg: DictConfig) -> None:
    """Run ``lightning-qat benchmark``."""
    benchmark(cfg)

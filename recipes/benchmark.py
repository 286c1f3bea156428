"""Measure what this machine does: fake quantization, training step and inference, beside the peers."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import DictConfig
from rich import box
from rich.console import Console
from rich.table import Table

from ._benchmark_fake_quantize import fake_quantize_group
from ._benchmark_inference import inference_group
from ._benchmark_peers import PACKAGES as PEER_PACKAGES
from ._benchmark_train_step import train_step_group
from ._errors import ConfigError, nearest
from ._provenance import source_commit
from ._timing import Results, Timing, machine

#: Registry of group -> what measures it, given the rounds.
GROUPS: dict[str, Callable[[int], Results]] = {
    "fake_quantize": fake_quantize_group,
    "train_step": train_step_group,
    "inference": inference_group,
}


def benchmark(cfg: DictConfig) -> Results:
    """Run the groups one after the other; verify numbers, time, print a table and write ``benchmark.json``."""
    for group in cfg.groups:
        if group not in GROUPS:
            raise ConfigError(f"groups={group!r} is not known{nearest(group, GROUPS)}")
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    facts = machine(cfg.rounds, ("lightning-qat", "torch", "lightning", *PEER_PACKAGES))
    results = sum((GROUPS[group](cfg.rounds) for group in cfg.groups), Results())
    path = Path(cfg.output_dir) / "benchmark.json"
    found = {"timings": [asdict(timing) for timing in results.timings], "notes": list(results.notes)}
    _write(path, {"machine": facts, "commit": source_commit(), "rounds": cfg.rounds, **found})
    _show(facts, results, path)
    return results


def _write(path: Path, results: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(results, indent=1))
    os.replace(temporary, path)


def _show(facts: dict[str, Any], results: Results, path: Path) -> None:
    console = Console()
    for group, timings in itertools.groupby(results.timings, key=lambda timing: timing.group):
        console.print(_table(group, list(timings)), "")
    lines = [
        f"{facts['capability']}, {facts['threads']} threads, torch {facts['versions']['torch']}: copies "
        f"{facts['copy_gigabytes_per_second']:.0f} GB/s, multiplies {facts['matrix_gigaflops']:.0f} GFLOP/s (float32)",
        "Medians, taken in turn. As fast, time: of the first row's. kept: memory that a forward leaves for backward; "
        "peak: the most that a forward and a backward have at once; both of the first row's. SQNR: against float.",
        *results.notes,
    ]
    missing = [package for package in PEER_PACKAGES if facts["versions"][package] is None]
    if missing and any(timing.group.startswith("inference") for timing in results.timings):
        lines.append(f"not installed: {', '.join(missing)}")
    for line in [*lines, f"Everything is in {path}"]:
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def _table(group: str, timings: list[Timing]) -> Table:
    """Return the alternatives of one group; a figure that none of them has gets no column."""
    table = Table(title=group, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("who", min_width=32)  # the tables of all groups stand below each other
    columns = {name: [figure(timing) for timing in timings] for name, figure in _FIGURES.items()}
    shown = {name: cells for name, cells in columns.items() if any(cells)}
    for name in shown:
        table.add_column(name, justify="right", no_wrap=True)
    for timing, cells in zip(timings, zip(*shown.values(), strict=True), strict=True):
        table.add_row(timing.name, *(cell or "-" for cell in cells))
    return table


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


#: Registry of column -> its text for one alternative, empty where that was not measured.
_FIGURES: dict[str, Callable[[Timing], str]] = {
    "ms": lambda timing: f"{timing.milliseconds:.2f}",
    "as fast": lambda timing: _times(timing.ratio),
    "time": lambda timing: _times(1 / timing.ratio),
    "kept": lambda timing: _times(timing.kept),
    "peak": lambda timing: _times(timing.peak),
    "SQNR (dB)": lambda timing: "" if timing.sqnr_db is None else f"{timing.sqnr_db:.1f}",
}


@hydra.main(version_base="1.3", config_path="pkg://lightning_qat.conf", config_name="benchmark")
def main(cfg: DictConfig) -> None:
    """Run ``lightning-qat benchmark``."""
    benchmark(cfg)

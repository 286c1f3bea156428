"""Measure what this machine does: kernels, training step and inference, beside the peers."""

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

from ._benchmark_adapters import adapters_group
from ._benchmark_convert import convert_group
from ._benchmark_fake_quantize import fake_quantize_group
from ._benchmark_gptq import PEER as GPTQ_PEER
from ._benchmark_gptq import gptq_group
from ._benchmark_inference import inference_group
from ._benchmark_matmul import matmul_group
from ._benchmark_onnx import onnx_group
from ._benchmark_peers import ONNX_PACKAGES, TENSOR_PACKAGES
from ._benchmark_peers import PACKAGES as PEER_PACKAGES
from ._benchmark_train_step import train_step_group
from ._errors import ConfigError, nearest
from ._provenance import source_commit
from ._timing import CPU, Conditions, Gauge, Results, Timing, machine

#: Registry of group -> what measures it.
GROUPS: dict[str, Callable[[Conditions], Results]] = {
    "fake_quantize": fake_quantize_group,
    "convert": convert_group,
    "matmul": matmul_group,
    "adapters": adapters_group,
    "gptq": gptq_group,
    "train_step": lambda conditions: train_step_group(conditions.rounds),
    "inference": lambda conditions: inference_group(conditions.rounds),
    "onnx": lambda conditions: onnx_group(conditions.rounds),
}

#: Groups that are measured on the CPU wherever the others are.
_ON_CPU = ("train_step", "inference", "onnx")
_DEVICES = ("auto", "cpu", "cuda")

#: Groups that measure integers in groups of so many columns, which have to divide the side of a tensor.
_IN_GROUPS, _COLUMNS = ("convert", "matmul", "adapters", "gptq"), 128

#: Group -> packages that its peers need.
_PEERS = {
    "inference": PEER_PACKAGES,
    "onnx": ONNX_PACKAGES,
    "convert": TENSOR_PACKAGES,
    "matmul": TENSOR_PACKAGES,
    "adapters": TENSOR_PACKAGES,
    "gptq": (GPTQ_PEER,),
}
_PACKAGES = (
    *("lightning-qat", "torch", "lightning", "triton"),
    *dict.fromkeys((*TENSOR_PACKAGES, *PEER_PACKAGES, GPTQ_PEER)),
)

#: Columns of the tables where the output has no width of its own.
_WIDTH = 100


def benchmark(cfg: DictConfig) -> Results:
    """Run the groups one after the other; verify numbers, time, write ``benchmark.json`` after each, print a table."""
    for group in cfg.groups:
        if group not in GROUPS:
            raise ConfigError(f"groups={group!r} is not known{nearest(group, GROUPS)}")
    check_size(cfg.size, list(cfg.groups))
    device = chosen_device(cfg.device)
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    gauge = Gauge(device)
    facts = machine(cfg.rounds, _PACKAGES, gauge)
    conditions = Conditions(cfg.rounds, device, cfg.size, gauge)
    still = [group for group in cfg.groups if group in _ON_CPU and device != CPU]
    notes = [f"{' and '.join(still)}: on the CPU, with device={device.type} too"] if still else []
    path, results, found = Path(cfg.output_dir) / "benchmark.json", Results(), Results(notes=notes)
    about = {"machine": facts, "commit": source_commit(), "rounds": cfg.rounds, "size": cfg.size}
    for group in cfg.groups:  # a later one may fail, or outlast the machine's lease
        results += GROUPS[group](conditions)
        found = Results(results.timings, [*results.notes, *notes])
        _write(path, {**about, "timings": [asdict(t) for t in found.timings], "notes": list(found.notes)})
    _show(facts, found, path)
    return found


def check_size(size: Any, groups: list[str]) -> None:
    """Raise where tensors of this side are none, or do not fit what ``groups`` measure; None is each group's own."""
    if size is None:
        return
    if type(size) is not int or size < 1:
        raise ConfigError(f"size={size!r} is no side of a tensor; use a positive integer, or size=null")
    concerned = [group for group in groups if group in _IN_GROUPS]
    if concerned and size % _COLUMNS:
        below, above = size // _COLUMNS * _COLUMNS, -(-size // _COLUMNS) * _COLUMNS
        near = f"size={below} or size={above}" if below else f"size={above}"
        raise ConfigError(
            f"size={size} is no multiple of {_COLUMNS}, the columns of a group of integers in {', '.join(concerned)}; "
            f"use {near}. groups=[fake_quantize] takes any size"
        )


def chosen_device(name: str) -> torch.device:
    """Return the device that a config names; ``"auto"`` is a GPU where PyTorch sees one."""
    if name not in _DEVICES:
        raise ConfigError(f"device={name!r} is not known{nearest(name, _DEVICES)}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"device='cuda' needs a GPU, and PyTorch {torch.__version__} sees none here; use device=cpu or device=auto"
        )
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _write(path: Path, results: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(results, indent=1))
    os.replace(temporary, path)


def _show(facts: dict[str, Any], results: Results, path: Path) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH)
    groups = {timing.group.split()[0] for timing in results.timings}
    for group, timings in itertools.groupby(results.timings, key=lambda timing: timing.group):
        console.print(_table(group, list(timings)), "")
    lines = [
        f"{_named(facts)}, torch {facts['versions']['torch']}: copies {facts['copy_gigabytes_per_second']:.0f} GB/s, "
        f"multiplies {facts['matrix_gigaflops']:.0f} GFLOP/s ({'bfloat16' if facts['gpu'] else 'float32'})",
        "Medians, taken in turn. As fast, time: of the first row's. kept: memory that a forward leaves for backward; "
        "peak: the most that a forward and a backward have at once; both of the first row's. SQNR: against float.",
    ]
    if any(timing.moved is not None for timing in results.timings):
        lines.append(
            "MB: what has to be read and written, of matmul the weights as they are stored, input and output; GB/s: "
            "that, by the time; copy, matrix: shares of what the machine itself copied and multiplied in turn with "
            "them. More than 100 % is possible: from caches, by reading only, and with integers."
        )
    if facts["no_native_kernels"] is not None:
        lines.append(f"CPU kernels in C++ are not used: {facts['no_native_kernels']}")
    missing = [name for name in _PACKAGES if facts["versions"][name] is None and _concerned(name, groups)]
    if missing:
        lines.append(f"not installed: {', '.join(missing)}")
    for line in [*lines, *results.notes, f"Everything is in {path}"]:
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def _named(facts: dict[str, Any]) -> str:
    gpu = facts["gpu"]
    if gpu is not None:
        return f"{gpu['name']} (capability {gpu['capability']})"
    return f"{facts['capability']}, {facts['threads']} threads"


def _concerned(package: str, groups: set[str]) -> bool:
    return any(package in packages for group, packages in _PEERS.items() if group in groups)


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


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %"


def _number(value: float | None, unit: float = 1.0) -> str:
    return "" if value is None else f"{value / unit:.{0 if value / unit >= 100 else 1}f}"


#: Registry of column -> its text for one alternative, empty where that was not measured. Where there are rates, the
#: time relative to the first row's, which is "as fast" upside down, makes room.
_FIGURES: dict[str, Callable[[Timing], str]] = {
    "ms": lambda timing: f"{timing.milliseconds:.{2 if timing.milliseconds >= 1 else 3}f}",
    "as fast": lambda timing: _times(timing.ratio),
    "time": lambda timing: "" if timing.operations or timing.moved else _times(1 / timing.ratio),
    "kept": lambda timing: _times(timing.kept),
    "peak": lambda timing: _times(timing.peak),
    "SQNR (dB)": lambda timing: "" if timing.sqnr_db is None else f"{timing.sqnr_db:.1f}",
    "MB": lambda timing: "" if timing.operations else _number(timing.moved, 1e6),
    "GB/s": lambda timing: _number(timing.gigabytes_per_second),
    "copy": lambda timing: _share(timing.of_copy),
    "GFLOP/s": lambda timing: _number(timing.gigaflops),
    "matrix": lambda timing: _share(timing.of_matrix),
}


@hydra.main(version_base="1.3", config_path="pkg://lightning_qat.conf", config_name="benchmark")
def main(cfg: DictConfig) -> None:
    """Run ``lightning-qat benchmark``."""
    benchmark(cfg)

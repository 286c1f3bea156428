"""The end of a recipe: the table on the terminal, the same as JSON and as a picture."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from lightning_qat.report import Variant, distance_line, draw_results, results_table, write_results
from lightning_qat.transforms import LayerStatistics, ParityReport

from ._files import PICTURE, RESULTS
from ._latency import Latency

logger = logging.getLogger(__name__)


def show(variants: Sequence[Variant], folder: Path, report: ParityReport | None, times: Latency, **facts: Any) -> None:
    """Print the table, the certificate and where quantization does not pay.

    The same is written as ``results.json`` (with ``facts``) and ``results.png``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    certificate = None if report is None else report.summary()
    write_results(variants, folder / RESULTS, **facts, certificate=certificate, latency=times.facts())
    console = Console()
    try:
        draw_results(variants, folder / PICTURE)
    except ModuleNotFoundError as error:
        logger.warning("no picture: %s", error)
    console.print(results_table(variants))
    distance = distance_line(variants)
    if distance is not None:
        console.print(distance, soft_wrap=True, highlight=False)
    for line in times.lines():
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    console.print(f"Certificate: {certificate or 'none, the model was saved without'}", soft_wrap=True, highlight=False)
    console.print(f"Everything is in {folder}", soft_wrap=True)


def show_layers(layers: Iterable[LayerStatistics]) -> None:
    """Print what :func:`quantization_statistics` found, a row for each layer."""
    Console().print(statistics_table(layers))


def statistics_table(layers: Iterable[LayerStatistics]) -> Table:
    """Return the layers as a table to print; of many scales it has the smallest and the largest."""
    found = list(layers)
    compared = any(layer.sqnr_db is not None for layer in found)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("layer", overflow="fold")
    for heading in ("weight", "scale", "range", *(["SQNR\n(dB)"] if compared else []), "input"):
        table.add_column(heading, no_wrap=True)
    table.add_column("computes")
    for layer in found:
        sqnr_db = [] if not compared else ["-" if layer.sqnr_db is None else f"{layer.sqnr_db:.1f}"]
        table.add_row(
            f"{layer.name}\n{layer.kind}",
            f"{layer.scheme} {layer.bits} bit\nper {layer.granularity}",
            _ends((float(layer.scale.min()), float(layer.scale.max())) if layer.scale.numel() else None),
            _ends(layer.range),
            *sqnr_db,
            _input(layer),
            layer.execution or "fake-quantized",
        )
    return table


def _input(layer: LayerStatistics) -> str:
    if layer.input_bits is None:
        return "float"
    bounds = "at run time" if layer.input_range is None else _ends(layer.input_range, " to ")
    return f"{layer.input_scheme} {layer.input_bits} bit\n{bounds}"


def _ends(values: tuple[float, float] | None, between: str = "\n") -> str:
    if values is None:
        return "-"
    low, high = (f"{value:.3g}" for value in values)
    return low if low == high else f"{low}{between}{high}"

"""The end of a run: one table, the same numbers as JSON, and a picture."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

_MISSING = "-"


@dataclass(frozen=True)
class Variant:
    """One row: a form of the model and how it did.

    Args:
        name: such as ``"float"`` or ``"converted"``.
        metrics: what its test logged.
        bytes_on_disk: of all files needed to load it; None where it is not kept.
        agreement: share of predictions with the float model's top-1; None where unknown.
        sqnr_db: of its outputs against those of the model it was converted from; None where unknown.
        milliseconds: batch -> median time of a forward pass, where that was measured.
        float_sqnr_db: of its outputs against those of the float model; None where unknown.
    """

    name: str
    metrics: Mapping[str, float] = field(default_factory=dict)
    bytes_on_disk: int | None = None
    agreement: float | None = None
    sqnr_db: float | None = None
    milliseconds: Mapping[int, float] = field(default_factory=dict)
    float_sqnr_db: float | None = None

    def row(self) -> dict[str, Any]:
        """Return the row as builtins.

        Numbers that JSON does not have become the strings ``"inf"``, ``"-inf"`` and ``"nan"``.
        """
        row = {
            "variant": self.name,
            **self.metrics,
            "bytes": self.bytes_on_disk,
            "agreement_with_float": self.agreement,
            "sqnr_db": self.sqnr_db,
            "sqnr_with_float_db": self.float_sqnr_db,
            **{f"ms_batch_{batch}": value for batch, value in self.milliseconds.items()},
        }
        return {key: _json_value(value) for key, value in row.items()}


def results_table(variants: Sequence[Variant], *, title: str | None = None) -> Table:
    """Return the variants as a table to print; sizes are compared with the first row's."""
    # Without frames it fits into the 80 columns that a terminal or a log file has.
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0)
    )
    table.add_column("model")
    metrics = _metric_names(variants)
    batches = list(dict.fromkeys(batch for variant in variants for batch in variant.milliseconds))
    headings = [*metrics, "KB on\ndisk", "smaller", "top-1 as\nfloat", "SQNR\n(dB)", *(f"ms for\n{n}" for n in batches)]
    for heading in headings:
        table.add_column(heading, justify="right")
    reference = variants[0].bytes_on_disk if variants else None
    for variant in variants:
        size = variant.bytes_on_disk
        table.add_row(
            variant.name,
            *(_number(variant.metrics.get(name), ".4f") for name in metrics),
            _number(None if size is None else size / 1000, ",.1f"),
            _number(reference / size if reference and size else None, ".2f", "x"),
            _number(None if variant.agreement is None else 100 * variant.agreement, ".2f", " %"),
            _number(variant.sqnr_db, ".1f"),
            *(_number(variant.milliseconds.get(batch), ",.2f") for batch in batches),
        )
    return table


def distance_line(variants: Sequence[Variant]) -> str | None:
    """Return how far the outputs of each variant are from the float model's, or None where that is not known."""
    known = [f"{v.name} {v.float_sqnr_db:.1f} dB" for v in variants if v.float_sqnr_db is not None]
    return f"SQNR of the outputs with float's: {', '.join(known)}" if known else None


def write_results(variants: Sequence[Variant], path: Path, **facts: Any) -> None:
    """Write ``{**facts, "variants": [...]}`` (facts are builtins) as JSON, atomically."""
    content = {key: _json_value(value) for key, value in facts.items()}
    content["variants"] = [variant.row() for variant in variants]
    text = json.dumps(content, indent=2, allow_nan=False)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text + "\n", encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def draw_results(variants: Sequence[Variant], path: Path, *, metric: str | None = None) -> None:
    """Draw the metric and the size of each variant as bars into a PNG file.

    Args:
        variants: the rows.
        path: of the picture.
        metric: which one; None takes the first whose name holds ``acc``, else the first.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ModuleNotFoundError("the picture needs matplotlib; run: pip install matplotlib") from error
    chosen = metric or main_metric(variants)
    panels = [] if chosen is None else [(chosen, {v.name: v.metrics[chosen] for v in variants if chosen in v.metrics})]
    panels.append(("KB on disk", {v.name: v.bytes_on_disk / 1000 for v in variants if v.bytes_on_disk is not None}))
    colors = {variant.name: f"C{index}" for index, variant in enumerate(variants)}
    figure = Figure(figsize=(4.5 * len(panels), 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, values) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        drawn = {name: value for name, value in values.items() if math.isfinite(value)}
        bars = axes.bar(list(drawn), list(drawn.values()), color=[colors[name] for name in drawn])
        axes.bar_label(bars, fmt="%.4g")
        axes.margins(y=0.15)
        axes.set_title(title)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150, format="png")


def main_metric(variants: Sequence[Variant]) -> str | None:
    """Return the metric that speaks for a model: the first with ``acc`` in its name, else the first, else None."""
    names = _metric_names(variants)
    return next((name for name in names if "acc" in name.lower()), names[0] if names else None)


def _metric_names(variants: Sequence[Variant]) -> list[str]:
    return list(dict.fromkeys(name for variant in variants for name in variant.metrics))


def _number(value: float | None, form: str, unit: str = "") -> str:
    return _MISSING if value is None else f"{value:{form}}{unit}"


def _json_value(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value

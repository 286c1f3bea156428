"""What a comparison found: mean and standard deviation over the seeds, and the distance to the float arm."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.table import Table

from lightning_qat.report import Variant, main_metric

from ._arms import SHARED

_MISSING = "-"


def summarize(entries: Sequence[Mapping[str, Any]], arms: Iterable[str], reference: str) -> dict[str, Any]:
    """Return the main metric and, of each arm, its statistics over the seeds.

    Args:
        entries: of the ledger.
        arms: in the order of the rows.
        reference: the arm that differences are taken to, seed by seed.
    """
    metric = main_metric([Variant("all", entry["metrics"]) for entry in entries])
    rows = [_summary(arm, entries, metric, reference) for arm in arms] if metric is not None else []
    return {"metric": metric, "reference": reference, "summary": rows}


def _summary(arm: str, entries: Sequence[Mapping[str, Any]], metric: str, reference: str) -> dict[str, Any]:
    own = [entry for entry in entries if entry["arm"] == arm]
    base = {entry["seed"]: float(entry["metrics"][metric]) for entry in entries if entry["arm"] == reference}
    found = {entry["seed"]: float(entry["metrics"][metric]) for entry in own}
    kept = [float(e["fake_quantized_metrics"][metric]) for e in own if "fake_quantized_metrics" in e]
    same = [entry.get("same_top1_as_fake_quantized") for entry in own]
    return {
        "arm": arm,
        "seeds": list(found),
        "shipped": _spread(list(found.values())),
        "fake_quantized": _spread(kept),
        "difference": _spread([value - base[seed] for seed, value in found.items() if seed in base]),
        "same_top1_as_fake_quantized": min((float(share) for share in same if share is not None), default=None),
        "bytes": max((entry["bytes"] for entry in own), default=None),
        "epochs": own[0]["epochs"] if own else None,
    }


def _spread(values: Sequence[float]) -> dict[str, float | None] | None:
    """Return mean and sample standard deviation, which one value does not have."""
    if not values:
        return None
    return {"mean": statistics.fmean(values), "std": statistics.stdev(values) if len(values) > 1 else None}


def comparison_table(found: Mapping[str, Any]) -> Table:
    """Return the summary as a table to print; shares are in percent and their differences in points."""
    metric = str(found["metric"])
    percent = 100 if "acc" in metric.lower() else 1
    unit, distance = (" (%)", "points") if percent == 100 else ("", "difference")
    seeds = dict.fromkeys(seed for row in found["summary"] for seed in row["seeds"])
    title = f"{metric}{unit}, mean ± standard deviation, seeds {', '.join(map(str, seeds))}"
    table = Table(title=title, title_justify="left")
    table.add_column("arm", no_wrap=True)
    for heading in ("as trained", "shipped", f"{distance} to {found['reference']}", "same top-1", "KB"):
        table.add_column(heading, justify="right")
    for row in found["summary"]:
        same, size = row["same_top1_as_fake_quantized"], row["bytes"]
        table.add_row(
            "(start)" if row["arm"] == SHARED else row["arm"],
            _shown(row["fake_quantized"], percent),
            _shown(row["shipped"], percent),
            _shown(row["difference"], percent, sign="+") if row["arm"] != found["reference"] else _MISSING,
            _MISSING if same is None else f"{100 * same:.2f} %",
            _MISSING if size is None else f"{size / 1000:,.1f}",
        )
    return table


def _shown(spread: Mapping[str, float | None] | None, factor: int, *, sign: str = "") -> str:
    if spread is None or spread["mean"] is None:
        return _MISSING
    digits = 2 if factor == 100 else 4
    mean = f"{factor * spread['mean']:{sign}.{digits}f}"
    return mean if spread["std"] is None else f"{mean} ± {factor * spread['std']:.{digits}f}"

"""What post-training quantization shows: the preflight table, and a row for each layer while it runs."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from types import TracebackType

from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table

from lightning_qat.ptq import LayerOutcome, LayerTask, PTQObserver, PTQReport

#: Layers that stay in sight.
_SHOWN = 14
#: Preflight rows that are alike but for their names are one row, if there are more than this.
_MANY = 40


def show_tasks(tasks: Sequence[LayerTask], console: Console | None = None) -> None:
    """Print what will be done to each layer; many alike are one row."""
    (console or Console()).print(tasks_table(tasks))


def tasks_table(tasks: Sequence[LayerTask]) -> Table:
    """Return the preflight as a table."""
    table = _table()
    for heading in ("layer", "kind", "weight", "method", "bits", "scales", "why"):
        table.add_column(heading, overflow="fold" if heading in ("layer", "why") else "ellipsis")
    for names, task in _alike(tasks) if len(tasks) > _MANY else [([task.name], task) for task in tasks]:
        name = names[0] if len(names) == 1 else f"{names[0]}\nand {len(names) - 1} more alike"
        shape = "x".join(map(str, task.shape))
        bits = "" if task.bits is None else str(task.bits)
        table.add_row(name, task.kind, shape, task.method, bits, task.scales, task.reason)
    return table


def _alike(tasks: Sequence[LayerTask]) -> Iterable[tuple[list[str], LayerTask]]:
    found: dict[tuple[object, ...], tuple[list[str], LayerTask]] = {}
    for task in tasks:
        reason = task.reason.replace(repr(task.name), "")
        last = task.name.rpartition(".")[2]
        key = (last, task.kind, task.shape, task.method, task.bits, task.scales, reason)
        found.setdefault(key, ([], task))[0].append(task.name)
    return found.values()


class LiveTable(PTQObserver):
    """Draws the latest layers on a terminal; elsewhere it prints a line for each block.

    Args:
        console: where to; None is the terminal.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console()
        self._live = Live(console=self._console, auto_refresh=False) if self._console.is_terminal else None
        self._latest: deque[LayerOutcome] = deque(maxlen=_SHOWN)
        self._stage: list[LayerOutcome] = []
        self._title = ""

    def __enter__(self) -> LiveTable:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end_stage()
        if self._live is not None:
            self._live.stop()

    def stage_started(self, name: str, index: int, stages: int) -> None:
        """Begin another block."""
        self._end_stage()
        self._title = f"{name} ({index} of {stages})"

    def layer_done(self, outcome: LayerOutcome) -> None:
        """Add a row."""
        self._latest.append(outcome)
        self._stage.append(outcome)
        if self._live is not None:
            self._live.update(outcomes_table(self._latest, self._title), refresh=True)

    def stage_restored(self, name: str, outcomes: Sequence[LayerOutcome]) -> None:
        """Say that nothing is to be done."""
        self._console.print(f"{self._title}: read from the journal", highlight=False, markup=False)

    def finished(self, report: PTQReport) -> None:
        """Say how the whole came out."""
        self._end_stage()
        for line in summary(report):
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _end_stage(self) -> None:
        known = [outcome for outcome in self._stage if outcome.relative_loss is not None]
        if self._live is None and self._title and known:
            share = sum(outcome.relative_loss or 0.0 for outcome in known) / len(known)
            seconds = sum(outcome.seconds for outcome in self._stage)
            memory = _megabytes(self._stage[-1].memory)
            text = f"{self._title}: {100 * share:.0f} % of the nearest codes' loss, {seconds:.1f} s, {memory} MB"
            self._console.print(text, highlight=False, markup=False)
        self._stage = []


def outcomes_table(outcomes: Iterable[LayerOutcome], title: str = "") -> Table:
    """Return layers that are done as a table."""
    table = _table(title)
    table.add_column("layer", overflow="fold")
    for heading in ("method", "bits", "loss", "of\nnearest", "damping", "s", "MB"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("notes", overflow="fold")
    for outcome in outcomes:
        share = outcome.relative_loss
        table.add_row(
            outcome.name,
            outcome.method,
            str(outcome.bits),
            "-" if outcome.loss is None else f"{outcome.loss:.3g}",
            "-" if share is None else f"{100 * share:.0f} %",
            f"{outcome.damping:g}" if outcome.damping else "-",
            f"{outcome.seconds:.2f}",
            _megabytes(outcome.memory),
            "; ".join(outcome.notes),
        )
    return table


def summary(report: PTQReport) -> list[str]:
    """Return how the layers came out, in a few lines."""
    methods = Counter(outcome.method for outcome in report.layers)
    counted = ", ".join(f"{count} by {method}" for method, count in methods.items())
    lines = [f"{len(report.layers)} layers quantized in {report.seconds:.0f} s: {counted}"]
    known = [outcome for outcome in report.layers if outcome.relative_loss is not None]
    if known:
        mean = sum(outcome.relative_loss or 0.0 for outcome in known) / len(known)
        worst = max(known, key=lambda outcome: outcome.relative_loss or 0.0)
        lines.append(
            f"Loss as a share of the nearest codes': {100 * mean:.0f} % on average, most at {worst.name!r} with "
            f"{100 * (worst.relative_loss or 0.0):.0f} %"
        )
    return [*lines, *report.notes]


def _table(title: str = "") -> Table:
    return Table(
        title=title or None, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False,
        padding=(0, 1, 0, 0),
    )  # fmt: skip


def _megabytes(memory: int | None) -> str:
    return "-" if memory is None else f"{memory / 1e6:.0f}"

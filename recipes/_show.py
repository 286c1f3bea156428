"""The end of a recipe: the table on the terminal, the same as JSON and as a picture."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from lightning_qat.report import Variant, draw_results, results_table, write_results
from lightning_qat.transforms import ParityReport

from ._files import PICTURE, RESULTS

logger = logging.getLogger(__name__)


def show(variants: Sequence[Variant], folder: Path, report: ParityReport | None, **facts: Any) -> None:
    """Print the table and the certificate, and write them as ``results.json`` (with ``facts``) and ``results.png``."""
    folder.mkdir(parents=True, exist_ok=True)
    certificate = None if report is None else report.summary()
    write_results(variants, folder / RESULTS, **facts, certificate=certificate)
    console = Console()
    try:
        draw_results(variants, folder / PICTURE)
    except ModuleNotFoundError as error:
        logger.warning("no picture: %s", error)
    console.print(results_table(variants))
    console.print(f"Certificate: {certificate or 'none, the model was saved without'}", soft_wrap=True, highlight=False)
    console.print(f"Everything is in {folder}", soft_wrap=True)

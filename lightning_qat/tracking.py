"""Where a run's numbers go: nowhere, CSV files, or Weights & Biases. The only file that imports wandb."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger

if TYPE_CHECKING:
    import wandb


def log_table(logger: Logger, name: str, rows: Sequence[Mapping[str, Any]], step: int) -> None:
    """Keep a table where ``logger`` can: in W&B, as text in TensorBoard, as ``<name>.csv`` beside ``metrics.csv``.

    Other loggers get nothing.

    Args:
        logger: of a Trainer; called on rank 0.
        name: of the table.
        rows: dicts with the same keys, whose values are numbers, strings or None.
        step: that the numbers belong to.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    data = [[row.get(column) for column in columns] for row in rows]
    # By what they offer, not by class: they may be loggers of ``pytorch_lightning``.
    if hasattr(logger, "log_table"):
        logger.log_table(key=name, columns=columns, data=data)
        return
    experiment = getattr(logger, "experiment", None)
    metrics_file = getattr(experiment, "metrics_file_path", None)
    if metrics_file is not None and "://" not in metrics_file:
        path = Path(metrics_file).with_name(f"{name.replace('/', '_')}.csv")
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([columns, *data])
    elif experiment is not None and hasattr(experiment, "add_text"):
        lines: list[list[Any]] = [columns, ["---"] * len(columns), *data]
        text = "\n".join(f"| {' | '.join(_shown(value) for value in line)} |" for line in lines)
        experiment.add_text(name, text, step)


def _shown(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


class Tracker:
    """Keeps nothing; what a recipe calls in the course of a run.

    A tracker is made before the run and does nothing until :meth:`start`. Several runs may follow each other
    in one process, each with its own tracker.
    """

    def start(self, config: Mapping[str, Any]) -> None:
        """Begin a run that was set up by ``config``, a dict of builtins."""

    def logger(self, stage: str) -> Logger | bool:
        """Return the Lightning logger of one fit (``"float"`` or ``"qat"``), or False for none."""
        return False

    def log_results(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Keep the final table: one dict for each variant of the model, with the same keys."""

    def log_model(self, folder: Path, metadata: Mapping[str, Any]) -> None:
        """Keep the saved quantized model."""

    def finish(self, *, failed: bool = False) -> None:
        """End the run; what was logged is on disk afterwards."""


class CSVTracker(Tracker):
    """``<save_dir>/<stage>/metrics.csv`` for each fit.

    Args:
        save_dir: a folder.
    """

    def __init__(self, save_dir: str | Path) -> None:
        self.save_dir = Path(save_dir)
        self._loggers: list[CSVLogger] = []

    def logger(self, stage: str) -> Logger:
        """Return a CSV logger of its own for ``stage``."""
        logger = CSVLogger(self.save_dir, name="", version=stage)
        self._loggers.append(logger)
        return logger

    def finish(self, *, failed: bool = False) -> None:
        """Write what is still held back."""
        for logger in self._loggers:
            logger.save()
        self._loggers.clear()


class WandbTracker(Tracker):
    """One Weights & Biases run with both fits, the final table and the quantized model as an artifact.

    Args:
        save_dir: the folder that gets ``wandb/``.
        project: of the run.
        name: of the run; None lets wandb choose.
        offline: write to ``save_dir`` only. No account is needed and nothing is sent; ``wandb sync`` can upload
            the run later.
        **options: more arguments of ``wandb.init``, such as ``entity``, ``group`` or ``tags``.
    """

    def __init__(
        self,
        save_dir: str | Path,
        project: str = "lightning-qat",
        name: str | None = None,
        *,
        offline: bool = True,
        **options: Any,
    ) -> None:
        self.save_dir = Path(save_dir)
        self.offline = offline
        self._options = {"project": project, "name": name, **options}
        self._run: wandb.Run | None = None

    def start(self, config: Mapping[str, Any]) -> None:
        """Open the run."""
        if self.offline:
            # wandb reports its own crashes over the network, offline too, unless told before it is imported.
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        self.save_dir.mkdir(parents=True, exist_ok=True)
        # Without console="off" every redrawing of a progress bar becomes a line of the run's log.
        settings = wandb.Settings(console="off", quiet=True)
        self._run = wandb.init(
            dir=str(self.save_dir),
            mode="offline" if self.offline else "online",
            config=dict(config),
            reinit="create_new",
            settings=settings,
            **self._options,
        )

    def logger(self, stage: str) -> Logger:
        """Return a logger whose metrics are called ``<stage>-...`` in the run."""
        return WandbLogger(experiment=self._opened(), prefix=stage, log_model=False)

    def log_results(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Log the table, and each of its numbers in the run's summary as ``<variant>/<column>``."""
        import wandb

        run = self._opened()
        columns: list[str | int] = list(dict.fromkeys(key for row in rows for key in row))
        run.log({"results": wandb.Table(columns=columns, data=[[row.get(str(c)) for c in columns] for row in rows])})
        for row in rows:
            numbers = {k: v for k, v in row.items() if isinstance(v, (int, float))}
            run.summary.update({f"{row['variant']}/{key}": value for key, value in numbers.items()})

    def log_model(self, folder: Path, metadata: Mapping[str, Any]) -> None:
        """Add the folder as an artifact of type ``model``."""
        import wandb

        run = self._opened()
        artifact = wandb.Artifact(f"quantized-model-{run.id}", type="model", metadata=dict(metadata))
        artifact.add_dir(str(folder))
        run.log_artifact(artifact)

    def finish(self, *, failed: bool = False) -> None:
        """Close the run."""
        if self._run is not None:
            self._run.finish(exit_code=int(failed))
            self._run = None

    def _opened(self) -> wandb.Run:
        if self._run is None:
            raise RuntimeError("the W&B run is not open; call start(config) first")
        return self._run

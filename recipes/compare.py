"""Compare arms that go on from one shared float checkpoint, over several seeds; it can be stopped at any time."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from lightning_qat.tracking import Tracker

from ._arm_run import forget_progress, has_weights, open_folder, run_arm, run_shared
from ._arm_table import comparison_table, summarize
from ._arms import SHARED, Arm, check_comparison, shared_config, train_config
from ._build import build, make, make_data
from ._files import RESULTS
from ._ledger import Ledger, code_digest, config_digest, data_digest

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """One entry of the comparison: an arm of a seed, or (``arm`` is None) the float fit that its arms share."""

    seed: int
    arm: Arm | None
    config: DictConfig
    fingerprint: Mapping[str, str]
    folder: Path

    @property
    def name(self) -> str:
        return SHARED if self.arm is None else self.arm.name

    @property
    def source(self) -> str | None:
        """Return whose weights it begins with."""
        return None if self.arm is None else self.arm.after or SHARED


def compare(cfg: DictConfig) -> dict[str, Any]:
    """Run what is not measured yet, write every result at once, and return the statistics over the seeds."""
    runs = plan(cfg)  # a wrong config stops here, before anything is trained
    ledger = Ledger(Path(cfg.output_dir) / RESULTS)
    todo = pending(runs, ledger)
    logger.info("%d of %d entries are to be measured", len(todo), len(runs))
    with _tracked(cfg, todo) as tracker:
        for count, run in enumerate(todo, 1):
            entry = execute(run, tracker)
            ledger.add(entry)
            found = _write(ledger, runs, cfg.reference)
            forget_progress(run.folder / run.name)
            told = (run.name, run.seed, entry["metrics"].get(found["metric"]), entry["seconds"], count, len(todo))
            logger.info("%s, seed %d: %s, %.0f s (%d of %d)", *told)
        found = _write(ledger, runs, cfg.reference)
        tracker.log_results([_flat(row) for row in found["summary"]])
    console = Console()
    console.print(comparison_table(found))
    console.print(
        "(start): the float checkpoint that the arms go on from. as trained: fake-quantized. shipped: float weights "
        "or converted integers. same top-1: of these two on the whole test, the least of all seeds."
    )
    console.print(f"Everything is in {ledger.path.parent.absolute()}", soft_wrap=True)
    return found


def plan(cfg: DictConfig) -> list[Run]:
    """Return everything that the comparison consists of, what others begin with first.

    Raises:
        ConfigError: the config cannot be run.
    """
    arms = check_comparison(cfg)
    facts = {"data": data_digest(make_data(cfg.data)), "code": code_digest()}
    runs = []
    for seed in cfg.seeds:
        folder = Path(cfg.output_dir) / f"seed_{seed}"
        shared = shared_config(cfg, seed)
        configs = {name: train_config(cfg, arm, seed, str(folder / name)) for name, arm in arms.items()}
        runs.append(Run(seed, None, configs[cfg.reference], {"config": config_digest(shared), **facts}, folder))
        for name, arm in arms.items():
            source = shared if arm.after is None else configs[arm.after]
            fingerprint = {"config": config_digest(source, configs[name]), **facts}
            runs.append(Run(seed, arm, configs[name], fingerprint, folder))
    return runs


def pending(runs: Sequence[Run], ledger: Ledger) -> list[Run]:
    """Return the runs that are not measured, and those whose weights they need and do not find."""
    found: list[Run] = []
    needed: set[tuple[int, str | None]] = set()
    for run in reversed(runs):
        known = ledger.get(run.seed, run.name)
        changed = [] if known is None else [k for k, v in run.fingerprint.items() if known["fingerprint"].get(k) != v]
        if changed:
            logger.warning("%s, seed %d: measured with other %s, again", run.name, run.seed, " and ".join(changed))
        missing = (run.seed, run.name) in needed and not has_weights(run.folder, run.name, run.fingerprint)
        if known is None or changed or missing:
            found.insert(0, run)
            needed.add((run.seed, run.source))
    return found


def execute(run: Run, tracker: Tracker) -> dict[str, Any]:
    """Train and measure one entry; one that was interrupted goes on from the end of its last whole epoch."""
    start = time.monotonic()
    open_folder(run.folder / run.name, run.fingerprint)
    parts = build(run.config)
    stage = tracker.logger(f"seed_{run.seed}_{run.name.strip('_')}")
    for trainer in (parts.float_trainer, parts.qat_trainer):
        trainer.loggers = [] if isinstance(stage, bool) else [stage]
    result = run_shared(parts, run.folder) if run.arm is None else run_arm(parts, run.arm, run.folder)
    seconds = round(time.monotonic() - start, 1)
    return {"seed": run.seed, "arm": run.name, "fingerprint": dict(run.fingerprint), **result, "seconds": seconds}


def _write(ledger: Ledger, runs: Sequence[Run], reference: str) -> dict[str, Any]:
    """Write the ledger with the statistics of what the comparison consists of now; return those."""
    entries = [entry for run in runs if (entry := ledger.get(run.seed, run.name)) is not None]
    found = summarize(entries, dict.fromkeys(run.name for run in runs), reference)
    ledger.write(**found)
    return found


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of the statistics without dicts in it, called as a tracker wants it."""
    flat: dict[str, Any] = {"variant": row["arm"]}
    for key, value in row.items():
        if isinstance(value, Mapping):
            flat.update({f"{key}_{part}": number for part, number in value.items()})
        elif not isinstance(value, list):
            flat[key] = value
    return flat


@contextmanager
def _tracked(cfg: DictConfig, todo: Sequence[Run]) -> Iterator[Tracker]:
    """Give the tracker of a comparison that has something to do."""
    tracker = make(cfg.logger, "logger") if todo else Tracker()
    settings = OmegaConf.to_container(cfg, resolve=True)
    tracker.start({str(key): value for key, value in settings.items()} if isinstance(settings, dict) else {})
    failed = True
    try:
        yield tracker
        failed = False
    finally:
        tracker.finish(failed=failed)


@hydra.main(version_base="1.3", config_path="pkg://lightning_qat.conf", config_name="compare")
def main(cfg: DictConfig) -> None:
    """Run ``lightning-qat compare``."""
    if HydraConfig.get().mode is RunMode.MULTIRUN:
        # An ordinary exception would only end the first job.
        raise SystemExit("compare takes no -m: write what is to be compared as arms (see conf/arms)")
    compare(cfg)

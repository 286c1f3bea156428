"""A sweep is checked as a whole before its first job trains."""

from __future__ import annotations

from pathlib import Path

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import OmegaConf

from ._build import check
from ._errors import ConfigError


def check_sweep() -> None:
    """In the first job of ``-m``, check the configs of all jobs.

    Raises:
        SystemExit: one of them is wrong; the message says which. After any other exception Hydra would go on
            with the next job.
    """
    this = HydraConfig.get()
    if this.mode is not RunMode.MULTIRUN or this.job.num != 0:
        return
    if not this.sweeper._target_.endswith(BasicSweeper.__name__):
        return  # other sweepers choose the later jobs by the results of the earlier
    sweep = OmegaConf.load(Path(this.sweep.dir) / "multirun.yaml")
    overrides = OverridesParser.create().parse_overrides(list(sweep.hydra.overrides.task))
    for batch in BasicSweeper.split_arguments(overrides, None):
        for job in batch:
            try:
                check(hydra.compose(this.job.config_name, job))
            except ConfigError as error:
                raise SystemExit(f"job {' '.join(job)}: {error}") from error

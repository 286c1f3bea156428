"""What a recipe leaves out of its output: notices that say nothing about the run."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_MEANINGLESS = (
    r".*does not have many workers.*",  # the images are in memory
    r".*sampler has shuffling enabled.*",  # calibration reads the shuffled training loader on purpose
    r".*`isinstance\(treespec, LeafSpec\)` is deprecated.*",  # between Lightning and PyTorch
)


_NOTICES = (
    "lightning.pytorch.utilities.rank_zero",
    "lightning.pytorch.trainer.connectors.checkpoint_connector",  # speaks of `weights_only` where nothing is loaded
)

#: Which tell each step of an export: only their warnings are shown.
_CHATTY = ("onnx_ir", "onnxscript")


class _EachOnce(logging.Filter):
    """Lets each notice through once: a recipe has four Trainers on the same devices. Advertisements never."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        new = message not in self._seen and "Tip:" not in message and "weights_only" not in message
        self._seen.add(message)
        return new or record.levelno >= logging.WARNING


@contextmanager
def quiet() -> Iterator[None]:
    """Hold back what is meaningless, for as long as the context lasts."""
    notices = [logging.getLogger(name) for name in _NOTICES]
    each_once = _EachOnce()
    for notice in notices:
        notice.addFilter(each_once)
    chatty = {logger: logger.level for logger in map(logging.getLogger, _CHATTY)}
    for logger in chatty:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            for message in _MEANINGLESS:
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        for notice in notices:
            notice.removeFilter(each_once)
        for logger, level in chatty.items():
            logger.setLevel(level)

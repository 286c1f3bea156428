"""What fake quantization costs the validation metrics."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils._pytree import tree_map

from lightning_qat.callbacks.both_lightnings import in_both, serve_both
from lightning_qat.callbacks.calibration_run import _with_own_iterator, generators_kept, state_kept
from lightning_qat.callbacks.parity_gate import _loggers_silent
from lightning_qat.config import check_int
from lightning_qat.transforms.phase import float_forward
from lightning_qat.transforms.prepare import qat_layers


class QuantizationGap(pl.Callback):
    """Log the validation metrics with fake quantization beside those of the same weights in float.

    After a validation of the quantized phase the Trainer's validation loop runs once more with fake quantization
    switched off, so validation takes about twice as long. For each metric two numbers are logged:
    ``quantization_gap/<metric>``, quantized minus float, and ``quantization_gap/<metric>/float``. They are in
    ``trainer.callback_metrics`` too, for callbacks that come later in the list and for ``ModelCheckpoint``.

    Random state, metrics, logs, buffers and attributes of the module and the loaders' generators are as they were
    afterwards. The module's own validation hooks run in the second pass too; other callbacks do not see it.

    Args:
        monitor: a metric that validation logs, or several; None is all of them.
        every_n_epochs: measure after the validations of every n-th epoch.
        limit_batches: of each validation loader at most so many; the quantized model is then run on these again, to
            compare like with like. None is all that the Trainer validates on.

    Raises:
        ValueError: for settings that are not allowed, and in training for a ``monitor`` that validation does not log.
    """

    def __init__(
        self,
        monitor: str | Sequence[str] | None = None,
        *,
        every_n_epochs: int = 1,
        limit_batches: int | None = None,
    ) -> None:
        serve_both(QuantizationGap)
        super().__init__()
        self.monitor = (monitor,) if isinstance(monitor, str) else None if monitor is None else tuple(monitor)
        self.every_n_epochs = check_int("every_n_epochs", every_n_epochs, 1)
        self.limit_batches = None if limit_batches is None else check_int("limit_batches", limit_batches, 1)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking or not _quantizes(pl_module):
            return
        if (trainer.current_epoch + 1) % self.every_n_epochs:
            return
        quantized = dict(trainer.callback_metrics) if self.limit_batches is None else self._validate(trainer, pl_module)
        with float_forward(pl_module):
            in_float = self._validate(trainer, pl_module)
        names = [name for name in in_float if name in quantized] if self.monitor is None else self.monitor
        found: dict[str, Tensor] = {}
        for name in names:
            if name not in in_float:
                known = ", ".join(repr(key) for key in in_float) or "nothing"
                raise ValueError(f"QuantizationGap(monitor={name!r}): validation does not log it; it logs {known}")
            found[f"quantization_gap/{name}"] = quantized[name] - in_float[name]
            found[f"quantization_gap/{name}/float"] = in_float[name]
        trainer.callback_metrics.update(found)
        trainer._logger_connector.log_metrics(found)

    def _validate(self, trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Tensor]:
        """Return the metrics of one more validation."""
        current = trainer.fit_loop.epoch_loop.val_loop
        with contextlib.ExitStack() as stack:
            stack.enter_context(isolate_rng())
            stack.enter_context(generators_kept(current._combined_loader.iterables))  # type: ignore[union-attr]
            stack.enter_context(state_kept(module))
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(_loggers_silent(trainer))
            loop = stack.enter_context(_own_loop(trainer, self.limit_batches))
            loop.run()
            return {name: value.clone() for name, value in trainer.callback_metrics.items()}


serve_both(QuantizationGap)  # LightningCLI looks at the class before there is an instance


def _quantizes(module: pl.LightningModule) -> bool:
    return any(layer.weight_quantizer.quantizing for _, layer in qat_layers(module))


@contextlib.contextmanager
def _own_loop(trainer: pl.Trainer, limit: int | None) -> Iterator[Any]:
    """Let the Trainer have, inside, a validation loop, logged values and callbacks of their own.

    Lightning's own loop gathers metrics over batches, loaders and ranks as the validation before did. Callbacks that
    swap averaged weights in for a validation stay, to compare the same weights.
    """
    epoch_loop, current = trainer.fit_loop.epoch_loop, trainer.fit_loop.epoch_loop.val_loop
    callbacks, connector = trainer.callbacks, trainer._logger_connector  # type: ignore[attr-defined]
    loader: Any = current._combined_loader
    # Of the classes that there are: the Trainer may be one of ``pytorch_lightning``.
    loop = type(current)(
        trainer, current._trainer_fn, current._stage, verbose=False, inference_mode=current.inference_mode
    )
    loop._combined_loader = type(loader)(tree_map(_with_own_iterator, loader.iterables), loader._mode)
    loop._max_batches = [min(batches, math.inf if limit is None else limit) for batches in current._max_batches]
    loop._last_val_dl_reload_epoch = trainer.current_epoch  # these loaders are of this epoch
    epoch_loop.val_loop = loop
    averaging = in_both("callbacks.WeightAveraging")
    trainer.callbacks = [c for c in callbacks if isinstance(c, averaging)]  # type: ignore[attr-defined]
    trainer._logger_connector = type(connector)(trainer)
    try:
        yield loop
    finally:
        loop.teardown()
        trainer.callbacks, trainer._logger_connector = callbacks, connector  # type: ignore[attr-defined]
        epoch_loop.val_loop = current

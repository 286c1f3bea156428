"""How fake quantization is doing, layer by layer, while a model trains."""

from __future__ import annotations

import contextlib
import math
import statistics
import sys
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_qat.callbacks.both_lightnings import serve_both
from lightning_qat.callbacks.calibration_run import call_step, without_effects
from lightning_qat.callbacks.layer_sample import LayerSample, sampling
from lightning_qat.callbacks.parity_gate import is_sharded
from lightning_qat.config import check_int
from lightning_qat.tracking import log_table
from lightning_qat.transforms.param_groups import learned_scales
from lightning_qat.transforms.prepare import qat_layers

#: Column -> which end is the worst.
_SUMMARIES = {
    "weight_clip_rate": max,
    "weight_zero_fraction": max,
    "weight_sqnr_db": min,
    "weight_scale_drift": max,
    "input_clip_rate": max,
    "input_sqnr_db": min,
    "input_scale_drift": max,
}
#: Durations of steps whose median is the step time: breaks for validation and checkpoints do not move it.
_REMEMBERED_STEPS = 32


class QuantizationMonitor(pl.Callback):
    """Watch clipping, zeros, scales and signal-to-noise ratios of every quantized layer.

    Sampled layers tell, for the weight and for the input:

    - ``clip_rate``: share of the numbers beyond the ends of the grid, from 0 to 1
    - ``zero_fraction``: share of the numbers that become zero
    - ``sqnr_db``: signal-to-quantization-noise ratio
    - ``scale``, its mean, and ``scale_drift``, by which share that moved since the last sample, and
      ``scale_drift_total``, since the first

    Each sample goes to all loggers as ``quantization/<what>/mean`` and ``.../worst`` over the layers; the last one
    stays in :attr:`table` and, at the end of training, goes as a table to W&B, TensorBoard or, with ``CSVLogger``, to
    ``quantization_layers.csv``. In a phase of float training the numbers say what quantization would do.

    Training is the same with and without: a sample looks at one training step, through hooks that are there in this
    step only. Hooks would make a compiled module compile again, so there the step's batch is run once more, eagerly,
    without gradients and without a trace (on one rank; on more, only weights are sampled). Rank 0 samples its own
    batch.

    Args:
        every_n_steps: optimizer steps between samples, at least.
        most_share: of the training time that sampling may take; the interval grows until it takes no more. The first
            sample, of the first step, is taken in any case. None is no limit.

    Attributes:
        table: rows of the last sample, one dict for each layer.

    Raises:
        ValueError: for settings that are not allowed.
    """

    def __init__(self, every_n_steps: int = 50, *, most_share: float | None = 0.01) -> None:
        serve_both(QuantizationMonitor)
        super().__init__()
        self.every_n_steps = check_int("every_n_steps", every_n_steps, 1)
        if most_share is not None and not 0 < most_share <= 1:
            raise ValueError(f"most_share={most_share!r} is not allowed; use a share above 0 and at most 1, or None")
        self.most_share = most_share
        self.table: list[dict[str, Any]] = []
        #: Seconds that the last sample took.
        self.sample_seconds: float | None = None
        self._last_step: int | None = None
        self._first_scales: dict[str, dict[str, float]] = {}
        self._scales: dict[str, dict[str, float]] = {}
        self._durations: deque[float] = deque(maxlen=_REMEMBERED_STEPS)
        self._started: float | None = None
        self._sample: LayerSample | None = None
        self._active = True

    @property
    def step_seconds(self) -> float | None:
        """Median duration of a training batch without a sample; None before two were seen."""
        return statistics.median(self._durations) if self._durations else None

    @property
    def interval(self) -> int:
        """Optimizer steps between samples, by what they were measured to cost."""
        cost, step = self.sample_seconds, self.step_seconds
        if self.most_share is None or cost is None or not step:
            return self.every_n_steps
        return max(self.every_n_steps, math.ceil(cost / (step * self.most_share)))

    def state_dict(self) -> dict[str, Any]:
        return {"last_step": self._last_step, "first_scales": self._first_scales, "scales": self._scales}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._last_step = state_dict["last_step"]
        self._first_scales, self._scales = dict(state_dict["first_scales"]), dict(state_dict["scales"])

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._started = None
        self._durations.clear()
        if trainer.global_step == 0:
            self._last_step, self._first_scales, self._scales, self.table = None, {}, {}, []
        sharded = is_sharded(trainer)
        if sharded:
            rank_zero_warn("QuantizationMonitor samples nothing: each rank holds a part of the weights only")
        self._active = trainer.is_global_zero and not sharded

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        now = time.perf_counter()
        if self._started is not None:
            self._durations.append(now - self._started)
        self._started = now
        if self._active and self._is_due(trainer.global_step):
            self._sample = LayerSample(dict(qat_layers(pl_module)))
            self._last_step = trainer.global_step
            if not _compiled(pl_module):
                self._sample.start()
            self._sample.seconds += time.perf_counter() - now

    def _is_due(self, step: int) -> bool:
        if self._last_step is None:
            return True
        unknown = self.most_share is not None and self.step_seconds is None  # after a resume, or a first sample
        return not unknown and step >= self._last_step + self.interval

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._sample is None:
            return
        sample, self._sample = self._sample, None
        sample.stop()
        self._started = None  # a step with a sample does not count
        _wait_for_device(pl_module)  # else the step's own kernels would count as the sample's
        if any(bool(learned.wrong_values()) for learned in learned_scales(pl_module)):
            return  # there is no grid to measure with; what is done of it is for others, such as a roll-back
        started = time.perf_counter()
        if _compiled(pl_module) and trainer.world_size == 1:
            self._run_once_more(trainer, pl_module, sample, batch, batch_idx)
        self.table = self._rows(sample.measure())
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        for logger in trainer.loggers:
            logger.log_metrics(self._summary(), step=step)
        self.sample_seconds = sample.seconds + time.perf_counter() - started

    @staticmethod
    def _run_once_more(
        trainer: pl.Trainer, module: pl.LightningModule, sample: LayerSample, batch: Any, batch_idx: int
    ) -> None:
        """Run the step on ``batch`` where hooks are seen."""
        with _without_trace(trainer, module), sampling(sample):
            call_step(module.training_step, batch, batch_idx)

    def _rows(self, measured: dict[str, dict[str, float | None]]) -> list[dict[str, Any]]:
        rows = []
        for name, numbers in measured.items():
            scales = {kind: value for kind in ("weight", "input") if (value := numbers[f"{kind}_scale"]) is not None}
            first = self._first_scales.setdefault(name, {})
            for kind in ("weight", "input"):
                scale = scales.get(kind)
                numbers[f"{kind}_scale_drift"] = _drift(self._scales.get(name, {}).get(kind), scale)
                numbers[f"{kind}_scale_drift_total"] = _drift(first.get(kind), scale)
            self._first_scales[name] = scales | first
            self._scales[name] = scales
            rows.append({"layer": name, "step": self._last_step, **numbers})
        return rows

    def _summary(self) -> dict[str, float]:
        found = {}
        for column, worst in _SUMMARIES.items():
            seen = [row[column] for row in self.table if row[column] is not None and not math.isnan(row[column])]
            finite = [value for value in seen if math.isfinite(value)]
            if finite:
                found[f"quantization/{column}/mean"] = sum(finite) / len(finite)
                found[f"quantization/{column}/worst"] = worst(seen)
        return found

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop()
        if self.table and trainer.is_global_zero:
            for logger in trainer.loggers:
                log_table(logger, "quantization_layers", self.table, trainer.global_step)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._sample is not None:
            self._sample.stop()
            self._sample = None

    def explain(self) -> str:
        """Return, as text, the last sample: a line for each layer, the worst input or weight first."""
        columns = ("weight_sqnr_db", "input_sqnr_db", "weight_clip_rate", "input_clip_rate", "weight_zero_fraction")
        if not self.table:
            return "Quantization of the layers: no sample yet"
        width = max(len("layer"), *(len(row["layer"]) for row in self.table))
        worst = sorted(self.table, key=lambda row: min(_or_inf(row["weight_sqnr_db"]), _or_inf(row["input_sqnr_db"])))
        lines = [f"Quantization of the layers at step {self._last_step}"]
        lines.append(f"  {'layer':<{width}}  " + "  ".join(columns))
        for row in worst:
            cells = ("-" if row[c] is None else f"{row[c]:.4g}" for c in columns)
            lines.append(
                f"  {row['layer']:<{width}}  "
                + "  ".join(f"{x:>{len(c)}}" for x, c in zip(cells, columns, strict=True))
            )
        return "\n".join(lines)


serve_both(QuantizationMonitor)  # LightningCLI looks at the class before there is an instance


def _or_inf(value: float | None) -> float:
    return math.inf if value is None else value


def _drift(before: float | None, now: float | None) -> float | None:
    return None if now is None or not before else abs(now - before) / before


def _compiled(module: pl.LightningModule) -> bool:
    """Return whether ``module``, a part of it or one of its methods is compiled."""

    def marked(value: Any) -> bool:
        return hasattr(value, "_torchdynamo_orig_callable") or isinstance(value, torch._dynamo.OptimizedModule)

    if "torch._dynamo" not in sys.modules:
        return False  # nothing is
    if getattr(module, "_compiler_ctx", None) is not None:
        return True
    return any(
        marked(part)
        or part._compiled_call_impl is not None
        or any(marked(value) for value in (*vars(part).values(), *vars(type(part)).values()))
        for part in module.modules()
    )


def _wait_for_device(module: pl.LightningModule) -> None:
    if module.device.type != "cpu":
        torch.accelerator.synchronize(module.device)


@contextlib.contextmanager
def _without_trace(trainer: pl.Trainer, module: pl.LightningModule) -> Iterator[None]:
    """Let a training step run in evaluation mode, eagerly, and leave nothing behind."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(isolate_rng())
        stack.enter_context(without_effects(module))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(trainer.precision_plugin.train_step_context())
        stack.enter_context(torch.no_grad())
        modes = {child: child.training for child in module.modules()}
        module.eval()  # observers and BatchNorm then learn nothing
        try:
            yield
        finally:
            for child, training in modes.items():
                child.training = training

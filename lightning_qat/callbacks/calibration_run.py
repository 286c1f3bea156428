"""Running a module's own training steps to observe ranges, leaving no trace of it."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map
from torchmetrics import Metric

from lightning_qat.quantizers.state import QuantizationState
from lightning_qat.transforms.calibrate import calibrating
from lightning_qat.transforms.fuse import watch_folds
from lightning_qat.transforms.phase import float_forward
from lightning_qat.transforms.ranges import agree_on_structure, deferred_ranges, update_ranges
from lightning_qat.transforms.readers import watch_readers


class _InertOptimizer:
    """Stands for an optimizer or a learning rate scheduler in ``training_step``; takes no step."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)

    def step(self, *_: Any, **__: Any) -> None:
        return None

    def zero_grad(self, *_: Any, **__: Any) -> None:
        return None

    @contextlib.contextmanager
    def toggle_model(self, *_: Any, **__: Any) -> Iterator[None]:
        yield


def _inert(*_: Any, **__: Any) -> None:
    return None


@contextlib.contextmanager
def inert_steps(module: pl.LightningModule) -> Iterator[None]:
    """Let the module's steps run without logging and optimizing."""
    optimizers = module.optimizers()
    inert = [_InertOptimizer(o) for o in optimizers] if isinstance(optimizers, list) else _InertOptimizer(optimizers)
    quiet: dict[str, Callable[..., Any]] = dict.fromkeys(
        ("log", "log_dict", "manual_backward", "toggle_optimizer", "untoggle_optimizer", "clip_gradients"), _inert
    )
    quiet["optimizers"] = lambda *_, **__: inert
    schedulers = module.lr_schedulers()
    still = [_InertOptimizer(s) for s in schedulers] if isinstance(schedulers, list) else schedulers
    quiet["lr_schedulers"] = lambda: still if still is None or isinstance(still, list) else _InertOptimizer(still)
    before = {name: module.__dict__[name] for name in quiet if name in module.__dict__}
    module.__dict__.update(quiet)
    try:
        yield
    finally:
        for name in quiet:
            del module.__dict__[name]
        module.__dict__.update(before)


@contextlib.contextmanager
def without_effects(module: pl.LightningModule) -> Iterator[None]:
    """Let the module's steps run without logging, optimizing, counting in metrics or changing anything on the side."""
    with state_kept(module), inert_steps(module):
        yield


@contextlib.contextmanager
def state_kept(module: pl.LightningModule) -> Iterator[None]:
    """Put back, on leaving, metrics, buffers and attributes of the module; logging and optimizing stay as they are."""
    state = _module_state(module)
    metrics = [(m, m._copy_state_dict(), m._update_count) for m in module.modules() if isinstance(m, Metric)]
    try:
        yield
    finally:
        for before in state:
            before.put_back()
        for metric, kept, count in metrics:
            for name, value in kept.items():
                setattr(metric, name, value)
            metric._update_count = count
            metric._computed = None


@dataclass
class _Before:
    """What one module held: which objects, and what was in those that change in place."""

    part: nn.Module
    buffers: dict[str, torch.Tensor | None]
    attributes: dict[str, Any]
    contents: list[tuple[Any, Any]]

    @classmethod
    def of(cls, part: nn.Module) -> _Before:
        buffers = dict(part._buffers)
        attributes = {name: value for name, value in part.__dict__.items() if not name.startswith("_")}
        contents: list[tuple[Any, Any]] = []
        for value in [*buffers.values(), *attributes.values()]:
            if isinstance(value, torch.Tensor) and not value.requires_grad:
                contents.append((value, value.clone()))
            elif isinstance(value, (list, dict)):
                contents.append((value, value.copy()))
        return cls(part, buffers, attributes, contents)

    @torch.no_grad()
    def put_back(self) -> None:
        self.part._buffers.clear()
        self.part._buffers.update(self.buffers)
        for name in [name for name in self.part.__dict__ if not name.startswith("_")]:
            del self.part.__dict__[name]
        self.part.__dict__.update(self.attributes)
        for value, kept in self.contents:
            if isinstance(value, torch.Tensor):
                value.copy_(kept)
            else:
                value.clear()
                (value.extend if isinstance(value, list) else value.update)(kept)


def _module_state(module: nn.Module) -> list[_Before]:
    """Return what a ``training_step`` may change on the side: buffers and attributes, of all but our own modules.

    Objects inside lists and dicts are not copied.
    """
    return [_Before.of(part) for part in module.modules() if not isinstance(part, (QuantizationState, Metric))]


@contextlib.contextmanager
def generators_kept(loaders: Any) -> Iterator[None]:
    """Put back the generators that the loaders and their samplers draw from."""
    owners = list(tree_leaves(loaders))
    for loader in list(owners):
        batches = getattr(loader, "batch_sampler", None)
        owners += [getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None)]
    found = [getattr(owner, "generator", None) for owner in owners]
    states = [(generator, generator.get_state()) for generator in found if isinstance(generator, torch.Generator)]
    try:
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)


def _with_own_iterator(loader: Any) -> Any:
    """Return ``loader``, or a twin where it keeps an iterator that the Trainer has begun.

    That is so where workers persist, and in a loader with a state, which a checkpoint is about to hold.
    """
    if not getattr(loader, "persistent_workers", False) and getattr(loader, "_iterator", None) is None:
        return loader
    twin = copy.copy(loader)
    twin.__dict__.update(_iterator=None)
    twin.__dict__["persistent_workers"] = False
    return twin


def batches_of(trainer: pl.Trainer, combined: CombinedLoader, count: int) -> Iterator[tuple[Any, int]]:
    """Yield the first ``count`` batches of the Trainer's loader, on the device, with their index."""
    loader = CombinedLoader(tree_map(_with_own_iterator, combined.iterables), combined._mode)
    module = trainer.lightning_module
    for batch, index, _ in itertools.islice(iter(loader), count):
        batch = trainer.precision_plugin.convert_input(batch)
        batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
        yield trainer.strategy.batch_to_device(batch, dataloader_idx=0), index


def call_step(step: Callable[..., Any], batch: Any, index: int) -> Any:
    """Call a module's own step with the arguments that it takes; several loaders are one to it."""
    if not is_param_in_hook_signature(step, "batch_idx", min_args=2):
        return step(batch)
    several = is_param_in_hook_signature(step, "dataloader_idx", explicit=True)
    return step(batch, index, 0) if several else step(batch, index)


def _step(module: pl.LightningModule, batch: Any, index: int) -> None:
    try:
        call_step(module.training_step, batch, index)
    except RuntimeError as error:
        if "does not require grad" not in str(error):
            raise
        raise RuntimeError(
            "calibration runs training_step without gradients, and this one takes gradients itself; use "
            "self.manual_backward(loss) in place of loss.backward(), or say what to run with "
            "ObserverCalibration(forward=lambda module, batch: ...)"
        ) from error


def run_calibration(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    batches: int,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    *,
    observe: bool = True,
) -> int:
    """Run training batches through ``module`` before training, in evaluation mode and without gradients.

    The random state, the loaders' generators, metrics, logs, optimizers and BatchNorm statistics are as
    they were afterwards. Ranks learn from all their batches, as one would. Returns the number of batches.

    Args:
        trainer: between the start of training and the first batch.
        module: prepared.
        batches: at most this many.
        forward: called as ``forward(module, batch)`` instead of ``training_step``.
        observe: learn ranges; False only decides which BatchNorm is folded.
    """
    done, across_ranks = 0, trainer.world_size > 1
    with contextlib.ExitStack() as stack:
        stack.enter_context(isolate_rng())
        stack.enter_context(generators_kept(trainer.train_dataloader))
        stack.enter_context(without_effects(module))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(deferred_ranges(module))
        stack.enter_context(calibrating(module, across_ranks=across_ranks) if observe else _evaluating(module))
        stack.enter_context(trainer.precision_plugin.train_step_context())
        loaders: Any = trainer.fit_loop._combined_loader
        for batch, index in batches_of(trainer, loaders, int(min(batches, trainer.num_training_batches))):
            with watch_readers(module), watch_folds(module):
                _step(module, batch, index) if forward is None else forward(module, batch)
            update_ranges(module, across_ranks=across_ranks)
            done += 1
        if across_ranks:
            agree_on_structure(module)
    if observe and not done:
        raise ValueError("ObserverCalibration got no batch from the training loader; check limit_train_batches")
    return done


@contextlib.contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    modes = {child: child.training for child in module.modules()}
    module.eval()
    try:
        with torch.no_grad(), float_forward(module):  # there may be no ranges yet
            yield
    finally:
        for child, training in modes.items():
            child.training = training

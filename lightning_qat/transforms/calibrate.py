"""Learning activation ranges from batches, without gradients and without training anything."""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qat.quantizers.batch_range import merge_histograms
from lightning_qat.quantizers.fake_quantizer import ActivationQuantizer
from lightning_qat.quantizers.observers import MovingAverageObserver
from lightning_qat.transforms.fuse import watch_folds
from lightning_qat.transforms.padding import Padding
from lightning_qat.transforms.prepare import qat_layers
from lightning_qat.transforms.ranges import deferred_ranges, share_of_samples, static_quantizers, update_ranges
from lightning_qat.transforms.readers import watch_readers

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def calibrating(model: nn.Module, *, across_ranks: bool = False) -> Iterator[None]:
    """Observe every forward run inside, in evaluation mode; ranges are set on leaving.

    Ranges learned before are forgotten, unless it fails. The training mode of every module is put back.
    With ``across_ranks`` they are those of all ranks, provided that each calls ``update_ranges`` after each batch.
    """
    quantizers = static_quantizers(model)
    modes = {module: module.training for module in model.modules()}
    weights = [layer.weight_quantizer for _, layer in qat_layers(model)]
    quantized = [quantizer.quantizing for quantizer in weights]
    before = [copy.deepcopy(quantizer.state_dict()) for quantizer in quantizers]
    try:
        model.eval()
        for quantizer in quantizers:
            quantizer.reset()
            quantizer.calibrating = True
            _count_batches(quantizer, 0)
            most = share_of_samples(quantizer.config.calibration_samples, across_ranks=across_ranks)
            quantizer.samples.most = most
        for quantizer_ in weights:
            quantizer_.quantizing = False
        with torch.no_grad():
            yield
        if across_ranks:
            merge_histograms([quantizer.observer for quantizer in quantizers if quantizer.observer is not None])
        for quantizer in quantizers:
            if quantizer.calibrated:
                quantizer.refresh()
    except BaseException:
        for quantizer, state in zip(quantizers, before, strict=True):
            quantizer.load_state_dict(state)
        raise
    finally:
        for quantizer in quantizers:
            quantizer.calibrating = False
            _count_batches(quantizer, None)
        for quantizer_, flag in zip(weights, quantized, strict=True):
            quantizer_.quantizing = flag
        for module, training in modes.items():
            module.training = training
    unseen = [quantizer.name for quantizer in quantizers if not quantizer.calibrated]
    if unseen:
        logger.warning("calibration never reached these layers, which have no range yet: %s", ", ".join(unseen))


def _count_batches(quantizer: ActivationQuantizer, count: int | None) -> None:
    """Let a moving average weigh the batches from here on alike, or let it move as in training."""
    if isinstance(quantizer.observer, MovingAverageObserver):
        quantizer.observer.averaged = count


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Tensor):
        return model(batch)
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)):
        return model(*batch)
    raise ValueError(
        f"a calibration batch of type {type(batch).__name__} cannot be passed to the model; "
        "use a tensor, a tuple, a dict, or say how with forward=lambda model, batch: ..."
    )


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    forward: Callable[[nn.Module, Any], Any] | None = None,
    *,
    across_ranks: bool = False,
) -> nn.Module:
    """Set the activation ranges of a prepared model from batches of data.

    The model runs in float, in evaluation mode and without gradients; its parameters, BatchNorm
    statistics and training mode stay as they are. Where a batch has an ``attention_mask``, ``[batch, length]`` of 0 and
    1, padded positions do not count in the inputs of the Linears that they are rows of, see
    :mod:`lightning_qat.transforms.padding`.

    Args:
        model: a prepared model.
        batches: an iterable of tensors, tuples of positional or dicts of keyword arguments.
        forward: called as ``forward(model, batch)`` instead, for anything else.
        across_ranks: every rank of ``torch.distributed`` calls this with as many batches of its own, and all get
            the same ranges. A Trainer's calibration does so by itself.

    Returns:
        ``model``.

    Raises:
        ValueError: if the model is not prepared, ``batches`` is empty, or a batch holds NaN or inf.
    """
    if not any(True for _ in qat_layers(model)):
        raise ValueError(f"{type(model).__name__} has no prepared layer to calibrate; call prepare(model, plan) first")
    padding = Padding(model, forward or _call)
    iterator = iter(batches)
    first = list(itertools.islice(iterator, 1))
    if not first:  # found out before the ranges learned earlier are forgotten
        raise ValueError("calibration got no batch; give calibrate(model, batches) at least one")
    learning = deferred_ranges(model) if across_ranks else contextlib.nullcontext()
    observing = calibrating(model, across_ranks=across_ranks)
    with torch.compiler.set_stance("force_eager"), learning, observing, padding.left_out():
        for batch in itertools.chain(first, iterator):
            padding.look(batch, across_ranks=across_ranks)
            with watch_readers(model), watch_folds(model):
                padding.run(batch)
            if across_ranks:
                update_ranges(model, across_ranks=True)
    return model

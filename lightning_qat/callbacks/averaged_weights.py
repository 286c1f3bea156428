"""Together with callbacks that average weights: latent weights are averaged, scales never are.

``WeightAveraging`` averages every buffer and swaps them with the module's to evaluate; an average of scales and of
zero points is no grid that anything was trained on. So the average model gets the quantizers of the module as they
are, and weight scales that stand still are derived from the averaged weights again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
from torch import nn

from lightning_qat.callbacks.both_lightnings import in_both
from lightning_qat.nn import QATLayer
from lightning_qat.transforms.phase import follow_weights
from lightning_qat.transforms.prepare import qat_layers

_QUANTIZERS = ("weight_quantizer", "input_quantizer")


def _averaging(trainer: pl.Trainer, *names: str) -> list[Any]:
    classes = tuple(known for name in names for known in in_both(f"callbacks.{name}"))
    return [callback for callback in trainer.callbacks if isinstance(callback, classes)]  # type: ignore[attr-defined]


def put_averaging_first(trainer: pl.Trainer, first: pl.Callback) -> None:
    """Let callbacks that average weights come before ``first`` at every hook after ``setup``.

    What they do at a hook is then done when the quantization callbacks look at the weights.
    """
    averaging = _averaging(trainer, "WeightAveraging", "StochasticWeightAveraging")
    callbacks = list(trainer.callbacks)  # type: ignore[attr-defined]
    place = callbacks.index(first)
    late = [callback for callback in averaging if callbacks.index(callback) > place]
    if late:
        kept = [callback for callback in callbacks if callback not in late]
        trainer.callbacks = [*kept[:place], *late, *kept[place:]]  # type: ignore[attr-defined]


def copy_prepared(trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
    """Let the averaging callbacks copy ``module`` again: what they copied in ``setup`` was not prepared yet."""
    for callback in _averaging(trainer, "WeightAveraging", "StochasticWeightAveraging"):
        callback.setup(trainer, module, stage)


def _averages(trainer: pl.Trainer) -> Iterator[nn.Module]:
    for callback in _averaging(trainer, "WeightAveraging"):
        if callback._average_model is not None:
            yield callback._average_model.module


def keep_quantizers(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Give the average models the quantizers of ``module`` as they are now."""
    for average in _averages(trainer):
        for (_, layer), (_, copy) in zip(qat_layers(module), qat_layers(average), strict=True):
            for name in _QUANTIZERS:
                quantizer = getattr(layer, name)
                if quantizer is not None:
                    getattr(copy, name).load_state_dict(quantizer.state_dict())
        follow_weights(average)


def save_quantizers(trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
    """Put the quantizers into the averaged weights of a checkpoint that ``WeightAveraging`` has made."""
    if "averaging_state" not in checkpoint:
        return
    keep_quantizers(trainer, module)
    for average in _averages(trainer):
        prefixes = tuple(f"{name}.{part}." for name, layer in _named(average) for part in _QUANTIZERS)
        state = average.state_dict()
        checkpoint["state_dict"].update({key: value for key, value in state.items() if key.startswith(prefixes)})


def _named(model: nn.Module) -> Iterator[tuple[str, QATLayer]]:
    for name, module in model.named_modules(remove_duplicate=False):  # a layer of two names is saved under both
        if isinstance(module, QATLayer):
            yield name, module


def averaged_for_good(trainer: pl.Trainer) -> bool:
    """Whether ``StochasticWeightAveraging`` has put the average into the module, to measure BatchNorm for it."""
    found = _averaging(trainer, "StochasticWeightAveraging")
    return any(callback._initialized and trainer.current_epoch > callback.swa_end for callback in found)


def averages_weights(trainer: pl.Trainer) -> bool:
    """Whether a callback of ``trainer`` averages weights."""
    return bool(_averaging(trainer, "WeightAveraging", "StochasticWeightAveraging"))

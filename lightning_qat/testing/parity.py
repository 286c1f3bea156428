"""Is the converted model the one that trained?"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from lightning_qat.config import PlanLike
from lightning_qat.transforms.calibrate import calibrate
from lightning_qat.transforms.certificate import ParityReport
from lightning_qat.transforms.convert import convert
from lightning_qat.transforms.parity import check_parity
from lightning_qat.transforms.phase import Phase, apply_phase
from lightning_qat.transforms.prepare import copy_model, prepare, qat_layers


def prepared_copy(
    module: nn.Module, batches: list[Any], config: PlanLike, forward: Callable[[nn.Module, Any], Any] | None
) -> nn.Module:
    """Return a copy of ``module`` that quantizes: as it was prepared, or prepared and calibrated now."""
    model = copy_model(module)
    model.__dict__.pop("_trainer", None)
    if not any(True for _ in qat_layers(model)):
        prepare(model, config)
        calibrate(model, batches, forward)
    return model


def assert_convert_parity(
    module: nn.Module,
    batches: Iterable[Any],
    forward: Callable[[nn.Module, Any], Any] | None = None,
    *,
    config: PlanLike = "int8",
) -> ParityReport:
    """Assert that every layer of the converted module computes what it computed in training.

    Args:
        module: prepared and trained; a float one is copied, prepared and calibrated on ``batches`` first. It stays as
            it is.
        batches: tensors, tuples of positional or dicts of keyword arguments.
        forward: called as ``forward(module, batch)`` instead, for anything else.
        config: what a float module is prepared with.

    Returns:
        The report of the comparison.

    Raises:
        AssertionError: naming the worst layer.
    """
    kept = list(batches)
    model = prepared_copy(module, kept, config, forward)
    for _, layer in qat_layers(model):
        if not layer.weight_quantizer.quantizing:
            apply_phase(model, Phase(observing=False))  # of a run that ended in its float phase
            break
    report = check_parity(model, convert(model), kept, forward)
    if not report.passed:
        raise AssertionError(f"converted, {type(module).__name__} is not the module that trained: {report.failure()}")
    return report

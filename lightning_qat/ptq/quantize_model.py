"""Post-training quantization in one call."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from torch import nn

from lightning_qat.config import PlanLike
from lightning_qat.nn import QATLayer
from lightning_qat.transforms.calibrate import calibrate
from lightning_qat.transforms.convert import convert
from lightning_qat.transforms.prepare import copy_model, prepare, prepared_plan, qat_layers
from lightning_qat.validation import check_choice

ModelT = TypeVar("ModelT", bound=nn.Module)

#: How codes are chosen.
METHODS = ("rtn",)


def quantize_model(
    model: ModelT,
    config: PlanLike = "int8",
    calibration: Iterable[Any] | None = None,
    method: str = "rtn",
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    verify: bool = False,
) -> ModelT:
    """Return a new, converted model: prepare, calibrate and convert in one call.

    Args:
        model: a float ``nn.Module`` or ``LightningModule``; it stays as it is, and no second copy of its weights is
            made on the way.
        config: a plan, a :class:`QATConfig`, a :class:`QuantizationConfig` (weight-only) or a preset's name.
        calibration: batches, as :func:`calibrate` takes them; needed where activations have calibrated ranges. They
            also show which BatchNorm directly follows a layer.
        method: ``"rtn"``, every weight to the nearest code.
        forward: called as ``forward(model, batch)`` to run a batch otherwise.
        verify: compare the result with the fake-quantized model on the calibration batches, which then have to be a
            collection; saving writes the certificate.

    Returns:
        A converted model of the same class, in evaluation mode.

    Raises:
        ValueError: if the method is unknown, calibration is missing, or the config does not fit the model.
        ParityError: with ``verify``, if the result is not what was fake-quantized.
    """
    check_choice("method", method, METHODS)
    original: ModelT = getattr(model, "_orig_mod", model)  # of torch.compile
    if prepared_plan(original) is not None or any(isinstance(module, QATLayer) for module in original.modules()):
        raise ValueError(f"{type(original).__name__} is prepared; call calibrate(model, batches) and convert(model)")
    if verify and calibration is None:
        raise ValueError("verify=True needs calibration batches to compare on; give calibration=[...]")
    # Weights are shared; buffers, which a forward may write, are not.
    replica = copy_model(original, {id(tensor): tensor for tensor in original.parameters()}).eval()
    prepare(replica, config)
    if calibration is not None:
        batches = list(calibration) if verify else calibration
        calibrate(replica, batches, forward)
        return convert(replica, verify=batches if verify else None, forward=forward)
    waiting = [
        name for name, layer in qat_layers(replica) if layer.input_quantizer and not layer.input_quantizer.calibrated
    ]
    if waiting:
        raise ValueError(
            f"the inputs of {len(waiting)} layers, such as {waiting[0]!r}, need calibrated ranges; give "
            "calibration=batches, or a config without them, such as 'int8_dynamic' or 'int8_weight_only'"
        )
    return convert(replica)

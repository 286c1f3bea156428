"""Looking at what quantizers do, one call after the other: a callback on each, and a log.

With the environment variable ``LIGHTNING_QAT_DEBUG=1`` every quantizer of a prepared model writes what it did to the
logger ``lightning_qat.debug``: at its first call, the second, the fourth and so on. Each line reads values back from
the device, so training is slower meanwhile.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lightning_qat.schemes import TensorFormat

if TYPE_CHECKING:
    from lightning_qat.quantizers.fake_quantizer import FakeQuantizer

logger = logging.getLogger("lightning_qat.debug")

#: Set to anything but 0 to have every quantizer logged.
VARIABLE = "LIGHTNING_QAT_DEBUG"


@dataclass(frozen=True, eq=False)
class QuantizationEvent:
    """One tensor that was fake-quantized. The tensors are not copies: do not change them, and clone what is kept.

    Args:
        layer: name of the layer.
        tensor: ``"weight"`` or ``"input"``.
        format: how it was quantized.
        scale: that it was quantized with.
        zero_point: the same.
        before: the float values.
        after: the fake-quantized ones.
        call: how many times this quantizer has been called, from 1.
    """

    layer: str
    tensor: str
    format: TensorFormat
    scale: Tensor = field(repr=False)
    zero_point: Tensor | None = field(repr=False)
    before: Tensor = field(repr=False)
    after: Tensor = field(repr=False)
    call: int

    @property
    def sqnr_db(self) -> float:
        """Signal-to-quantization-noise ratio in dB; inf where nothing was lost."""
        signal = float(self.before.double().square().sum())
        noise = float((self.before.double() - self.after.double()).square().sum())
        return math.inf if noise == 0 else (10 * math.log10(signal / noise) if signal else -math.inf)

    @property
    def largest_error(self) -> float:
        """Largest difference between before and after."""
        return float((self.before.double() - self.after.double()).abs().max()) if self.before.numel() else 0.0

    def __str__(self) -> str:
        fmt, shape, scale = self.format, tuple(self.before.shape), self.scale.detach()
        ends = f"{float(scale.min()):.4g} to {float(scale.max()):.4g}" if scale.numel() else "none"
        span = "no values"
        if self.before.numel():
            low, high = (float(end) for end in torch.aminmax(self.before.detach()))
            span = f"values {low:.4g} to {high:.4g}"
        return (
            f"{self.layer} {self.tensor} {shape}, call {self.call}: {fmt.scheme} {fmt.bits} bits, {span}, scale {ends}"
            f", SQNR {self.sqnr_db:.1f} dB, largest error {self.largest_error:.4g}"
        )


#: Gets every :class:`QuantizationEvent` of a quantizer.
DebugCallback = Callable[[QuantizationEvent], None]


def _log(event: QuantizationEvent) -> None:
    if event.call & (event.call - 1) == 0:
        logger.info("%s", event)


def callback_of_environment() -> DebugCallback | None:
    """Return what logs where ``LIGHTNING_QAT_DEBUG`` is set, or None."""
    if os.environ.get(VARIABLE, "0") in ("", "0"):
        return None
    if not logger.handlers and logger.getEffectiveLevel() > logging.INFO:  # nobody set logging up: be seen anyway
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    return _log


@torch.no_grad()
def tell(
    quantizer: FakeQuantizer, before: Tensor, after: Tensor, parameters: tuple[Tensor, Tensor | None, TensorFormat]
) -> None:
    """Call the debug callback of ``quantizer``, which has one, with what it just did."""
    if torch.compiler.is_compiling() or quantizer.debug_callback is None:
        return
    quantizer.debug_calls += 1
    scale, zero_point, fmt = parameters
    zero = None if fmt.symmetric else zero_point
    quantizer.debug_callback(
        QuantizationEvent(
            quantizer.name,
            quantizer.quantizes,
            fmt,
            scale,
            zero,
            before.detach(),
            after.detach(),
            quantizer.debug_calls,
        )
    )


class DebugHandle:
    """Takes debug callbacks off again; also at the end of a ``with`` block."""

    def __init__(self, before: list[tuple[FakeQuantizer, DebugCallback | None]]) -> None:
        self._before = before

    def remove(self) -> None:
        """Give the quantizers back what they had."""
        for quantizer, callback in self._before:
            quantizer.debug_callback = callback
        self._before = []

    def __enter__(self) -> DebugHandle:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def debug_quantizers(model: nn.Module, callback: DebugCallback | None = None) -> DebugHandle:
    """Let ``callback`` see everything that the quantizers of a prepared model do; None logs it.

    Args:
        model: prepared.
        callback: called with a :class:`QuantizationEvent`, in the forward pass.

    Returns:
        What takes it off: ``handle.remove()``, or ``with debug_quantizers(model, callback): ...``.

    Raises:
        ValueError: if the model has no quantizer.
    """
    from lightning_qat.quantizers.fake_quantizer import FakeQuantizer  # which imports this

    quantizers = [module for module in model.modules() if isinstance(module, FakeQuantizer)]
    if not quantizers:
        raise ValueError(f"{type(model).__name__} has no quantizer; call prepare(model, plan) first")
    handle = DebugHandle([(quantizer, quantizer.debug_callback) for quantizer in quantizers])
    for quantizer in quantizers:
        quantizer.debug_callback, quantizer.debug_calls = callback or _log, 0
    return handle

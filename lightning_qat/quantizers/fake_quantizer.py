"""Modules that hold the quantization state of a weight or an activation while a model trains.

The phase (observing, quantizing, frozen) and the bits are Python attributes, saved as extra state: a
tensor flag read in ``forward`` would break ``torch.compile(fullgraph=True)`` and synchronize a GPU.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_qat.config import QuantizationConfig
from lightning_qat.quantizers.batch_range import BatchRange
from lightning_qat.quantizers.debug import callback_of_environment, tell
from lightning_qat.quantizers.dynamic_range import dynamic_parameters
from lightning_qat.quantizers.observers import make_observer
from lightning_qat.quantizers.state import QuantizationState, check_same_format
from lightning_qat.schemes import Scheme, TensorFormat, get_scheme, input_format

if TYPE_CHECKING:
    from collections.abc import Callable


def _in_backward() -> bool:
    """Whether a backward pass is running: activation checkpointing then repeats a forward."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class FakeQuantizer(QuantizationState):
    """What the quantizers of weights and activations share: phase, bits, format.

    Attributes:
        name: of the layer, for messages.
        observing: learn the range from training batches.
        quantizing: fake-quantize; otherwise the value passes through in float.
        frozen: the scale stands still.
    """

    scale: Tensor
    zero_point: Tensor
    #: What is fake-quantized, for messages.
    quantizes: str = "input"

    def __init__(self, config: QuantizationConfig, name: str, scale_shape: tuple[int, ...], fmt: TensorFormat) -> None:
        super().__init__()
        self.config = config
        self.name = name
        self.observing = True
        self.quantizing = True
        self.frozen = False
        #: Sees every call, see ``quantizers/debug.py``.
        self.debug_callback = callback_of_environment()
        self.debug_calls = 0
        self._format = fmt
        self.register_buffer("scale", torch.ones(scale_shape, dtype=torch.float32))
        self.register_buffer("zero_point", torch.zeros(scale_shape, dtype=torch.int32))

    @property
    def scheme(self) -> Scheme:
        """The number format's implementation."""
        return get_scheme(self._format.scheme)

    @property
    def format(self) -> TensorFormat:
        """How codes made now are to be read."""
        return self._format

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return self._format.bits

    def _set_bits(self, bits: int) -> None:
        self._format = replace(self._format, bits=self.scheme.check_bits(bits, self._format))

    def get_extra_state(self) -> dict[str, Any]:
        return {
            "bits": self.bits,
            "observing": self.observing,
            "quantizing": self.quantizing,
            "frozen": self.frozen,
            "format": self._format.to_dict(),
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        check_same_format(f"{type(self).__name__} of layer {self.name!r}", state.get("format"), self._format.to_dict())
        self._set_bits(int(state["bits"]))
        self.observing = bool(state["observing"])
        self.quantizing = bool(state["quantizing"])
        self.frozen = bool(state["frozen"])

    def _unchanging(self, scale: Tensor, zero_point: Tensor) -> tuple[Tensor, Tensor]:
        """Return both as they are now: a backward pass may come after the buffers are written again."""
        if scale is self.scale and torch.is_grad_enabled():
            return scale.clone(), zero_point.clone()
        return scale, zero_point

    def parameters_now(self, x: Tensor) -> tuple[Tensor, Tensor, TensorFormat] | None:
        """Return what ``x`` is fake-quantized with, or None if it stays in float; learn from it, if it is time."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` fake-quantized, or as it is."""
        parameters = self.parameters_now(x)
        if parameters is None:
            return x
        result = self.scheme.fake_quantize(x, *parameters)
        if self.debug_callback is not None:
            tell(self, x, result, parameters)
        return result

    def _store(self, scale: Tensor, zero_point: Tensor) -> None:
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)

    def extra_repr(self) -> str:
        fmt = self._format
        parts = [fmt.scheme, f"bits={fmt.bits}", "symmetric" if fmt.symmetric else "asymmetric"]
        if fmt.axis is not None:
            parts.append(f"axis={fmt.axis}")
        if fmt.group_size is not None:
            parts.append(f"group_size={fmt.group_size}")
        if fmt.block_size is not None:
            parts.append(f"block_size={fmt.block_size}" + (", nested" if fmt.nested else ""))
        return ", ".join(parts)


class ActivationQuantizer(FakeQuantizer):
    """Fake-quantizes the input of a layer with an observed range, or with ranges found at run time.

    Args:
        config: how to quantize.
        name: of the layer.
        spatial_dims: of a convolution's input; its dynamic ranges are per sample. None is per token.
    """

    def __init__(self, config: QuantizationConfig, name: str, spatial_dims: int | None = None) -> None:
        if config.per_channel or config.group_size is not None:
            raise ValueError(
                f"per_channel and group_size are for weights (input of layer {name!r}); "
                "use a per-tensor config, or QuantizationConfig('dynamic') for per-token ranges"
            )
        fmt = input_format(config, name)
        super().__init__(config, name, (), fmt)
        self.spatial_dims = spatial_dims
        self.calibrating = False
        self.calibrated = fmt.dynamic
        #: Ranges are learned after each batch and hold for the next, see ``transforms/ranges.py``.
        self.deferred = False
        self.batch_range = BatchRange(self.scale.device)
        #: What calibration may look at; None is everything.
        self.most_samples = config.calibration_samples
        self._samples = 0
        self.observer = None
        if not fmt.dynamic:
            self.observer = make_observer(
                config.observer or "moving_average", momentum=config.observer_momentum, layer_name=name
            )

    def get_extra_state(self) -> dict[str, Any]:
        # A checkpoint may be written in the middle of a batch.
        return {**super().get_extra_state(), "calibrated": self.calibrated, "batch_range": self.batch_range.state()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        super().set_extra_state(state)
        self.calibrated = bool(state["calibrated"])
        self.batch_range.load_state(state.get("batch_range"))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)
        if self.batch_range.low.device != self.scale.device:
            self.batch_range = BatchRange(self.scale.device)
        return self

    def set_bits(self, bits: int) -> None:
        """Change the bits and derive the scale from the observed range again."""
        if bits != self.bits:
            self._set_bits(bits)
            if self.observer is not None and self.calibrated:
                self.refresh()

    @torch.no_grad()
    def refresh(self) -> tuple[Tensor, Tensor]:
        """Set scale and zero point from the observed range; return them as fresh tensors."""
        observer: Any = self.observer  # only called where there is one
        scale, zero_point = observer.get_quantization_params(self._format.symmetric, self._format.bits)
        self._store(scale, zero_point)
        return scale, zero_point

    def reset(self) -> None:
        """Forget what was observed."""
        if self.observer is not None:
            self.observer.reset()
            self.batch_range.clear()
            self.calibrated = False
            self._samples = 0

    def _within_samples(self, x: Tensor) -> Tensor:
        """Return what of ``x`` calibration may still look at; samples lie along dimension 0."""
        most = self.most_samples
        if most is None or not self.calibrating or not x.dim():
            return x
        kept = x[: max(most - self._samples, 0)]
        self._samples += len(kept)
        return kept

    def _observes_now(self) -> bool:
        if self.observer is None:
            return False
        if self.calibrating:
            return True
        return self._learns and self.training and not _in_backward()

    @property
    def _learns(self) -> bool:
        """Whether the phase, not the forward pass, lets the range move."""
        if self.observer is None or self.frozen or not self.observing:
            return False
        return self.observer.follows_training or not self.calibrated

    @property
    def learns_after_batch(self) -> bool:
        """Whether there is a range to move after a batch. Equal on all ranks."""
        return self.deferred and (self.calibrating or self._learns)

    def parameters_now(self, x: Tensor) -> tuple[Tensor, Tensor, TensorFormat] | None:
        scale, zero_point, fmt = self.scale, self.zero_point, self._format
        if self._observes_now():
            seen, observer = self._within_samples(x), self.observer
            if self.deferred and seen.numel():
                self.batch_range.collect(seen, observer)  # type: ignore[arg-type]
            elif seen.numel():
                observer.update(seen)  # type: ignore[union-attr]
                # Fresh tensors go to the op: the buffers may be written again before backward runs
                # (a layer used twice), which autograd would refuse.
                self.calibrated = True
                if not self.calibrating:
                    scale, zero_point = self.refresh()
        if not self.quantizing or self.calibrating:
            return None
        if not self.calibrated and self.deferred and self.training:
            return None  # its first batch: every rank stays in float until all agree on a range
        if not self.calibrated:
            raise RuntimeError(
                f"the input of layer {self.name!r} was never observed, so it has no range to quantize with; "
                "run calibrate(model, batches) or train before evaluating"
            )
        if fmt.dynamic and x.numel():
            scale, zero_point, fmt = dynamic_parameters(x, fmt, self.spatial_dims)
        return *self._unchanging(scale, zero_point), fmt

    def codes(self, x: Tensor) -> Tensor:
        """Return the integer codes of ``x`` with the calibrated range."""
        return self.scheme.quantize(x.detach(), self.scale, self.zero_point, self._format)

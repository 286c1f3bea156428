"""Modules that hold the quantization state of a weight or an activation while a model trains.

The phase (observing, quantizing, frozen) and the bits are Python attributes, saved as extra state: a
tensor flag read in ``forward`` would break ``torch.compile(fullgraph=True)`` and synchronize a GPU.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_qat.config import QuantizationConfig
from lightning_qat.ops.fake_quantize import quant_range
from lightning_qat.ops.observe import ONE_PASS_DEVICES, observe_fake_quantize_through
from lightning_qat.ops.transformed import is_transformed
from lightning_qat.quantizers.batch_range import BatchRange
from lightning_qat.quantizers.calibration_samples import CalibrationSamples
from lightning_qat.quantizers.clipping import LearnedClipping
from lightning_qat.quantizers.debug import callback_of_environment, tell
from lightning_qat.quantizers.dynamic_range import dynamic_parameters
from lightning_qat.quantizers.learned_scale import LearnedScale, gradient_factor, of_observed_range
from lightning_qat.quantizers.observers import make_observer
from lightning_qat.quantizers.state import QuantizationState, check_same_format, in_backward
from lightning_qat.schemes import Scheme, TensorFormat, get_scheme, input_format
from lightning_qat.schemes.integer import IntegerScheme

if TYPE_CHECKING:
    from collections.abc import Callable


class FakeQuantizer(QuantizationState):
    """What the quantizers of weights and activations share: phase, bits, format.

    Attributes:
        name: of the layer, for messages.
        observing: learn the range from training batches.
        quantizing: fake-quantize; otherwise the value passes through in float.
        frozen: the scale stands still.
    """

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
        if config.learnable:
            if not self.scheme.learns_scales:
                raise ValueError(
                    f"learnable=True is not allowed with scheme={str(fmt.scheme)!r}, whose grid is given "
                    f"({self.quantizes} of layer {name!r}); use int8 or int4, or learnable=False"
                )
            whose = f"{self.quantizes} of layer {name!r}"
            if config.pact_decay is None:
                learned = LearnedScale(scale_shape, symmetric=fmt.symmetric, name=whose)
            else:
                learned = self._clipping(config.pact_decay, fmt, whose)
            self._modules["learned"] = learned  # ``register_module`` takes no name that the class has
            return
        # Not by ``register_buffer``, which takes no name that the class has.
        self._buffers["scale"] = torch.ones(scale_shape, dtype=torch.float32)
        self._buffers["zero_point"] = torch.zeros(scale_shape, dtype=torch.int32)

    def _clipping(self, decay: float, fmt: TensorFormat, whose: str) -> LearnedScale:
        raise ValueError(f"pact_decay={decay} is for activations, not the {whose}; leave it out for LSQ")

    @property
    def learned(self) -> LearnedScale | None:
        """The parameters of the scale where it is learned by gradient, or None."""
        return self._modules.get("learned")  # type: ignore[return-value]

    @property
    def scale(self) -> Tensor:
        """The scale as it is now: a buffer, or what the learned parameters stand for."""
        return self._buffers["scale"] if self.learned is None else self.learned.scale()  # type: ignore[return-value]

    @property
    def zero_point(self) -> Tensor:
        """The zero point as it is now, int32."""
        if self.learned is not None:
            return self.learned.zero_point(self.bits)
        return self._buffers["zero_point"]  # type: ignore[return-value]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "debug_callback": None}  # it belongs to who looks, not to copies and files

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

    def _scale_and_zero(self) -> tuple[Tensor, Tensor]:
        return (self.scale, self.zero_point) if self.learned is None else self.learned.parameters_now(self.bits)

    def _unchanging(self, scale: Tensor, zero_point: Tensor) -> tuple[Tensor, Tensor]:
        """Return both as they are now: a backward pass may come after the buffers are written again."""
        if self.learned is None and scale is self.scale and torch.is_grad_enabled():
            return scale.clone(), zero_point.clone()
        return scale, zero_point

    def parameters_now(self, x: Tensor) -> tuple[Tensor, Tensor, TensorFormat] | None:
        """Return what ``x`` is fake-quantized with, or None if it stays in float; learn from it, if it is time."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` fake-quantized, or as it is."""
        parameters = self.parameters_now(x)
        x = self.joined(x)
        if parameters is None:
            return x
        result = self.fake_quantize(x, parameters)
        if self.debug_callback is not None:
            tell(self, x, result, parameters)
        return result

    @property
    def learns_now(self) -> bool:
        """Whether a call now has a gradient for the scale."""
        return self.learned is not None and self.quantizing and not self.frozen and torch.is_grad_enabled()

    def learns_from(self, x: Tensor) -> bool:
        """Return whether a learned scale has a gradient from ``x``."""
        return self.learned is not None

    def joined(self, x: Tensor) -> Tensor:
        """Return ``x``, with the parameters in its graph where ranks wait for them and nothing else uses them."""
        return x if self.learned is None or self.learns_now else self.learned.joined(x)

    def gradient_factor(self, x: Tensor) -> float:
        """Return LSQ's factor for the gradients of what is learned from ``x``."""
        return gradient_factor(x, math.prod(self.learned.shape) if self.learned else 1, self._format, samples=False)

    def fake_quantize(self, x: Tensor, parameters: tuple[Tensor, Tensor, TensorFormat]) -> Tensor:
        """Return ``x`` fake-quantized with what :meth:`parameters_now` returned, by ops that trace."""
        if self.learned is None or not self.learns_now:
            return self.scheme.fake_quantize(x, *parameters)
        return self.learned.fake_quantized(x, self.gradient_factor(x), self.scheme, self._format)

    def fake_quantize_through(
        self, x: Tensor, parameters: tuple[Tensor, Tensor, TensorFormat], made: list[Tensor], *, covered: bool = False
    ) -> Tensor:
        """Return what :meth:`fake_quantize` does, for an ordinary tensor in eager mode.

        Where :attr:`learns_now`, the backward pass takes the values out of ``made`` if it finds them there.
        """
        if self.learned is None or not self.learns_now:
            return self.scheme.fake_quantize_through(x, *parameters, covered=covered)
        if type(self.scheme).fake_quantize is not IntegerScheme.fake_quantize:
            return self.fake_quantize(x, parameters)  # a custom scheme computes otherwise
        return self.learned.applied(x, *parameters, self.gradient_factor(x), made)

    def _store(self, scale: Tensor, zero_point: Tensor) -> None:
        if self.learned is not None:
            self.learned.store(scale, zero_point, self.bits)
            return
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)

    def extra_repr(self) -> str:
        return self._format.described()


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
        #: Learn a scale by gradient from inputs that need none themselves: the data. See ``LearnedScales``.
        self.learns_of_data = True
        self.calibrated = fmt.dynamic
        #: Ranges are learned after each batch and hold for the next, see ``transforms/ranges.py``.
        self.deferred = False
        self.batch_range = BatchRange(self.device)
        #: The extremes of the input are still to be found, by the pass that fake-quantizes it.
        self._unseen = False
        self.samples = CalibrationSamples(config.calibration_samples)
        self.observer = None
        if not fmt.dynamic:
            # A learned scale begins where the squared error is least, and follows gradients from then on.
            kind = "mse" if config.learnable else config.observer or "moving_average"
            self.observer = make_observer(kind, momentum=config.observer_momentum, layer_name=name)

    def _clipping(self, decay: float, fmt: TensorFormat, whose: str) -> LearnedScale:
        return LearnedClipping((), symmetric=fmt.symmetric, name=whose, decay=decay)

    def learns_from(self, x: Tensor) -> bool:
        return self.learned is not None and (self.learns_of_data or x.requires_grad)

    def get_extra_state(self) -> dict[str, Any]:
        # A checkpoint may be written in the middle of a batch.
        return {**super().get_extra_state(), "calibrated": self.calibrated, "batch_range": self.batch_range.state()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        super().set_extra_state(state)
        self.calibrated = bool(state["calibrated"])
        self.batch_range.load_state(state.get("batch_range"))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)
        if self.batch_range.low.device != self.device:
            self.batch_range = BatchRange(self.device)
        return self

    def set_bits(self, bits: int) -> None:
        """Change the bits and derive the scale from the observed range again."""
        if bits == self.bits:
            return
        self.scheme.check_bits(bits, self._format)  # before anything moves
        learned, observer = self.learned, self.observer
        if learned is not None and observer is not None and self.calibrated:
            # What was learned stays: the scale moves as that of least error does from the old bits to the new.
            before, _ = of_observed_range(observer, self.bits, self._format.symmetric)
            after, _ = of_observed_range(observer, bits, self._format.symmetric)
            learned.store(learned.scale() * (after / before), learned.zero_point(self.bits), self.bits)
            learned.renewed = True
        self._set_bits(bits)
        if learned is None and observer is not None and self.calibrated:
            self.refresh()

    def refresh(self) -> tuple[Tensor, Tensor]:
        """Set scale and zero point from the observed range; return them as fresh tensors."""
        observer: Any = self.observer  # only called where there is one
        if not self.scheme.searches_ranges:
            scale, zero_point = self.scheme.parameters_of_range(observer.min_val, observer.max_val, self._format)
        elif self.learned is not None:
            scale, zero_point = of_observed_range(observer, self.bits, self._format.symmetric)
        else:
            scale, zero_point = observer.get_quantization_params(self._format.symmetric, self._format.bits)
        self._store(scale, zero_point)
        return (scale, zero_point) if self.learned is None else self._scale_and_zero()

    def gradient_factor(self, x: Tensor) -> float:
        return gradient_factor(x, 1, self._format, samples=True)

    @property
    def learns_now(self) -> bool:
        return super().learns_now and self.calibrated and not self.calibrating

    def reset(self) -> None:
        """Forget what was observed."""
        if self.observer is not None:
            self.observer.reset()
            self.batch_range.clear()
            self.calibrated = False
            self.samples.seen = 0

    def _observes_now(self) -> bool:
        if self.observer is None:
            return False
        if self.calibrating:
            return True
        return self._learns and self.training and not in_backward()

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
        fmt, fresh, learned = self._format, None, self.learned
        if learned is not None and self.calibrated and not self.calibrating:  # nothing is observed any more
            return (*learned.parameters_now(fmt.bits), fmt) if self.quantizing else None
        observes = self._observes_now()
        if observes and is_transformed():
            raise RuntimeError(
                f"layer {self.name!r} observes the range of its input, which it cannot keep from inside torch.func or "
                "forward mode; call model.eval() or apply_phase(model, Phase(observing=False)) before"
            )
        # Modules look through all they have at every attribute that is set.
        self.__dict__["_unseen"] = unseen = observes and self._sees_while_quantizing(x)
        if observes and not unseen:
            seen, observer = self.samples.of(x) if self.calibrating else x, self.observer
            if self.deferred and seen.numel():
                self.batch_range.collect(seen, observer)  # type: ignore[arg-type]
            elif seen.numel():
                observer.update(seen)  # type: ignore[union-attr]
                # Fresh tensors go to the op: the buffers may be written again before backward runs
                # (a layer used twice), which autograd would refuse.
                self.calibrated = True
                if not self.calibrating:
                    fresh = self.refresh()
        if not self.quantizing or self.calibrating:
            return None
        if not self.calibrated and self.deferred and self.training:
            return None  # its first batch: every rank stays in float until all agree on a range
        if not self.calibrated:
            raise RuntimeError(
                f"the input of layer {self.name!r} was never observed, so it has no range to quantize with; "
                "run calibrate(model, batches) or train before evaluating"
            )
        scale, zero_point = self._scale_and_zero() if fresh is None else fresh
        if fmt.dynamic and x.numel():
            scale, zero_point, fmt = dynamic_parameters(x, fmt, self.spatial_dims)
        return *self._unchanging(scale, zero_point), fmt

    def _sees_while_quantizing(self, x: Tensor) -> bool:
        """Whether one pass can both find the extremes of ``x``, for the next batch, and fake-quantize it."""
        if x.device.type not in ONE_PASS_DEVICES or not self.deferred or not self.calibrated or self.calibrating:
            return False
        if not self.quantizing or not x.numel() or torch.compiler.is_compiling():
            return False
        return type(self.scheme) is IntegerScheme and bool(self.observer and self.observer.follows_training)

    def fake_quantize(self, x: Tensor, parameters: tuple[Tensor, Tensor, TensorFormat]) -> Tensor:
        if self.sees_next():
            self.batch_range.collect(x, self.observer)  # type: ignore[arg-type]
        return super().fake_quantize(x, parameters)

    def fake_quantize_through(
        self, x: Tensor, parameters: tuple[Tensor, Tensor, TensorFormat], made: list[Tensor], *, covered: bool = False
    ) -> Tensor:
        if not self.sees_next():
            return super().fake_quantize_through(x, parameters, made, covered=covered)
        scale, zero_point, fmt = parameters
        zero = None if fmt.symmetric else zero_point
        values, low, high = observe_fake_quantize_through(x, scale, zero, *quant_range(fmt.bits, fmt.symmetric))
        self.saw(x, low, high)
        return values

    def sees_next(self) -> bool:
        """Return whether whoever fake-quantizes now is to tell the extremes to :meth:`saw`; asked once."""
        unseen = self._unseen
        self.__dict__["_unseen"] = False
        return unseen

    def saw(self, x: Tensor, low: Tensor | float, high: Tensor | float) -> None:
        """Take the extremes of ``x`` into the batch; ``ValueError`` where ``x`` is on the CPU and holds NaN or inf."""
        if isinstance(low, float) and not math.isfinite(low + high) and self.observer is not None:
            self.observer.batch_extremes(x)  # says what it found, if it was no overflow
        self.batch_range.widen(low, high)

    def codes(self, x: Tensor) -> Tensor:
        """Return the integer codes of ``x`` with the calibrated range."""
        return self.scheme.quantize(x.detach(), self.scale, self.zero_point, self._format)

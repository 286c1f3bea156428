"""Modules that hold the quantization state of a weight or an activation while a model trains.

The phase (observing, quantizing, frozen) and the bits are Python attributes, saved as extra state: a
tensor flag read in ``forward`` would break ``torch.compile(fullgraph=True)`` and synchronize a GPU.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_qat.config import QuantizationConfig, check_int
from lightning_qat.quantizers.batch_range import BatchRange
from lightning_qat.quantizers.dynamic_range import dynamic_parameters
from lightning_qat.quantizers.kept_weight import KeptWeight
from lightning_qat.quantizers.observers import make_observer
from lightning_qat.quantizers.sharded import check_whole, whole_weight
from lightning_qat.quantizers.state import QuantizationState, check_same_format
from lightning_qat.schemes import Scheme, TensorFormat, get_scheme

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

    def __init__(self, config: QuantizationConfig, name: str, scale_shape: tuple[int, ...], fmt: TensorFormat) -> None:
        super().__init__()
        self.config = config
        self.name = name
        self.observing = True
        self.quantizing = True
        self.frozen = False
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
        self._format = replace(self._format, bits=check_int("bits", bits, 2, 16))

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
        return x if parameters is None else self.scheme.fake_quantize(x, *parameters)

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
        return ", ".join(parts)


class WeightQuantizer(FakeQuantizer):
    """Fake-quantizes a weight, its scale a function of the weight until frozen.

    A scale that is a pure function of the weight needs no history: evaluation and conversion see the
    scale of the weight as it is, and a resumed run cannot differ. Freezing writes the scale of that
    moment into the buffers; from then on they are the scale.

    Args:
        config: how to quantize.
        weight: the weight, of any shape.
        name: of the layer.
        axis: dimension of the output channels.
    """

    def __init__(self, config: QuantizationConfig, weight: Tensor, name: str, axis: int = 0) -> None:
        rows = weight.numel() // max(weight.shape[0], 1)
        shape: tuple[int, ...] = ()
        if config.group_size is not None:
            self._check_group(config.group_size, rows, axis, name)
            shape = (weight.shape[0], rows // config.group_size)
        elif config.per_channel:
            shape = (weight.shape[axis],)
        fmt = TensorFormat(
            scheme=str(config.scheme),
            bits=int(config.bits or 8),
            symmetric=config.symmetric,
            axis=axis if config.per_channel and config.group_size is None else None,
            group_size=config.group_size,
        )
        super().__init__(config, name, shape, fmt)
        #: Name of the BatchNorm this layer is folded into: None is undecided, "" is none.
        self.folded_norm: str | None = None
        #: Whether one prepared layer alone reads this layer's output, see ``transforms/fuse.py``. None is undecided.
        self.feeds_one_layer: bool | None = None
        #: Holds the fake-quantized weight while nobody changes the weight, see ``transforms/phase.py``.
        self.kept: KeptWeight | None = None
        self._shape = weight.shape
        self.to(weight.device)
        if not weight.is_meta:
            self._store(*self._derive(whole_weight(weight, weight.shape, name)))

    @staticmethod
    def _check_group(group_size: int, row: int, axis: int, name: str) -> None:
        if axis != 0:
            raise ValueError(
                f"group_size={group_size} is not available for transposed convolutions (layer {name!r}); "
                "use per_channel=True"
            )
        if row % group_size:
            divisors = [d for d in range(min(group_size, row), 0, -1) if row % d == 0][:2]
            ways = " or ".join(str(d) for d in divisors)
            raise ValueError(
                f"group_size must divide in_features: {row} % {group_size} != 0 (layer {name!r}); use group_size={ways}"
            )

    def get_extra_state(self) -> dict[str, Any]:
        return {
            **super().get_extra_state(),
            "folded_norm": self.folded_norm,
            "feeds_one_layer": self.feeds_one_layer,
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        super().set_extra_state(state)
        self.folded_norm = state["folded_norm"]
        self.feeds_one_layer = state.get("feeds_one_layer", False)  # checkpoints before it existed

    def _rows(self, weight: Tensor) -> Tensor:
        """Return ``weight`` as ``[number of scales, elements that share one]``."""
        fmt = self._format
        if fmt.group_size is not None:
            return weight.reshape(-1, fmt.group_size)
        if fmt.axis is None:
            return weight.reshape(1, -1)
        return weight.movedim(fmt.axis, 0).reshape(weight.shape[fmt.axis], -1)

    @torch.no_grad()
    def _derive(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        check_whole(weight, self.name)
        rows = self._rows(weight)
        # Rows gathered from an embedding are fewer than the table's.
        by_row = self.scale.dim() and self._format.axis != 1
        shape = (weight.shape[0], *self.scale.shape[1:]) if by_row else self.scale.shape
        if (self.config.observer or "min_max") != "min_max":
            observer = make_observer(str(self.config.observer), num_channels=rows.shape[0], layer_name=self.name)
            observer.to(rows.device).update(rows)
            scale, zero_point = observer.get_quantization_params(self._format.symmetric, self._format.bits)
            return scale.reshape(shape), zero_point.reshape(shape)
        if rows.dtype == torch.float64:
            rows = rows.float()
        # 4096 x 4096: 3 ms, the largest magnitude by vector_norm or aminmax along a dimension 20 to 25.
        bounds = torch.aminmax(rows) if rows.shape[0] == 1 else (rows.amin(1), rows.amax(1))
        low, high = (bound.float().reshape(shape) for bound in bounds)
        if self._format.symmetric:
            high = torch.maximum(high, -low)  # NaN and inf come out as they are
            low = -high
        return self.scheme.parameters(low, high, self._format)

    @property
    def covers_weight(self) -> bool:
        """Whether the range holds every element of the weight, as that of its extremes does until frozen."""
        return not self.frozen and (self.config.observer or "min_max") == "min_max"

    def parameters_for(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``(scale, zero_point)`` that ``weight`` is quantized with now."""
        return (self.scale, self.zero_point) if self.frozen else self._derive(weight)

    def codes(self, weight: Tensor) -> Tensor:
        """Return the integer codes of ``weight``, in its shape: what conversion stores."""
        weight = whole_weight(weight.detach(), self._shape, self.name)
        return self.scheme.quantize(weight, *self.parameters_for(weight), self._format)

    def set_bits(self, bits: int, weight: Tensor) -> None:
        """Change the bits and derive the scale again, also when frozen."""
        if bits != self.bits:
            self._set_bits(bits)
            self._store(*self._derive(whole_weight(weight, self._shape, self.name)))

    def set_frozen(self, frozen: bool, weight: Tensor) -> None:
        """Let the scale stand still at that of ``weight``, or follow the weight again."""
        if frozen and not self.frozen:
            self._store(*self._derive(whole_weight(weight, self._shape, self.name)))
        self.frozen = frozen

    def fake_quantize_rows(self, rows: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """Fake-quantize rows gathered from ``weight``: an embedding touches few of its rows.

        Args:
            rows: ``[*index.shape, features]``.
            index: which rows of ``weight`` they are.
            weight: the whole table.
        """
        if not self.quantizing or not rows.numel():
            return rows
        fmt, flat = self._format, rows.reshape(-1, rows.shape[-1])
        if fmt.axis is None and fmt.group_size is None:
            scale, zero_point = self.parameters_for(weight)
        elif self.frozen:
            scale, zero_point = self.scale[index.reshape(-1)], self.zero_point[index.reshape(-1)]
        else:
            scale, zero_point = self._derive(flat)
        return self.scheme.fake_quantize(flat, scale, zero_point, fmt).reshape(rows.shape)

    def parameters_now(self, x: Tensor) -> tuple[Tensor, Tensor, TensorFormat] | None:
        return (*self._unchanging(*self.parameters_for(x)), self._format) if self.quantizing else None


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
        fmt = TensorFormat(
            str(config.scheme),
            int(config.bits or 8),
            config.symmetric,
            dynamic=config.dynamic,
            dynamic_range=config.dynamic_range,
        )
        super().__init__(config, name, (), fmt)
        self.spatial_dims = spatial_dims
        self.calibrating = False
        self.calibrated = config.dynamic
        #: Ranges are learned after each batch and hold for the next, see ``transforms/ranges.py``.
        self.deferred = False
        self.batch_range = BatchRange(self.scale.device)
        #: What calibration may look at; None is everything.
        self.most_samples = config.calibration_samples
        self._samples = 0
        self.observer = None
        if not config.dynamic:
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

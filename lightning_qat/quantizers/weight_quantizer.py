"""The quantization state of a weight while a model trains."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_qat.config import QuantizationConfig
from lightning_qat.quantizers.debug import tell
from lightning_qat.quantizers.fake_quantizer import FakeQuantizer
from lightning_qat.quantizers.input_arrangement import ARRANGEMENT, arranged
from lightning_qat.quantizers.kept_weight import KeptWeight
from lightning_qat.quantizers.learned_scale import least_error_parameters
from lightning_qat.quantizers.observers import make_observer
from lightning_qat.quantizers.sharded import check_whole, whole_weight
from lightning_qat.schemes import TensorFormat, rows_of, rows_of_scale, scale_shape, weight_format


class WeightQuantizer(FakeQuantizer):
    """Fake-quantizes a weight, its scale a function of the weight until frozen.

    A scale that is a pure function of the weight needs no history: evaluation and conversion see the
    scale of the weight as it is, and a resumed run cannot differ. Freezing writes the scale of that
    moment into the buffers; from then on they are the scale.

    A learned scale is a parameter. It begins where the squared error of the weight is least, at the moment that it
    first quantizes (not when it is prepared: weights may be loaded or trained in between), and freezing ends
    its gradient.

    Args:
        config: how to quantize.
        weight: the weight, of any shape.
        name: of the layer.
        axis: dimension of the output channels.
    """

    quantizes = "weight"
    #: What is done to the layer's input, see :func:`arranged`; set by :meth:`arrange_input`.
    input_order: Tensor | None
    input_factor: Tensor | None

    def __init__(self, config: QuantizationConfig, weight: Tensor, name: str, axis: int = 0) -> None:
        fmt = weight_format(config, weight.shape, axis, name)
        super().__init__(config, name, scale_shape(weight.shape, fmt), fmt)
        #: Name of the BatchNorm this layer is folded into: None is undecided, "" is none.
        self.folded_norm: str | None = None
        #: Whether one prepared layer alone reads this layer's output, see ``transforms/fuse.py``. None is undecided.
        self.feeds_one_layer: bool | None = None
        #: Holds the fake-quantized weight while nobody changes the weight, see ``transforms/phase.py``.
        self.kept: KeptWeight | None = None
        self._shape = weight.shape
        for name in ARRANGEMENT:
            self.register_buffer(name, None)
        self.to(weight.device)
        if not weight.is_meta:
            self._store(*self._derive(whole_weight(weight, weight.shape, name)))

    def leave_meta(self, weight: Tensor) -> None:
        """Be as made from ``weight`` if it was made from one on the meta device; else nothing is done."""
        if self.device.type == "meta":
            self.to_empty(device=weight.device)
            self._store(*self._derive(whole_weight(weight.detach(), weight.shape, self.name)))

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

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # Some tensors alone, such as learned scales, say nothing of the arrangement.
        if any(prefix + name in state_dict for name in (*ARRANGEMENT, "_extra_state")):
            for name in ARRANGEMENT:
                tensor = state_dict.get(prefix + name)
                self._buffers[name] = None if tensor is None else torch.empty_like(tensor, device=self.device)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def arrange_input(self, order: Tensor | None, factor: Tensor | None) -> None:
        """Let the layer's input be arranged so from now on; whoever does this arranges the weight's columns too.

        Args:
            order: int64 ``[in_features]``, see :func:`arranged`.
            factor: float32 ``[in_features]``, likewise.
        """
        self._buffers.update(zip(ARRANGEMENT, (order, factor), strict=True))

    def arranged(self, x: Tensor) -> Tensor:
        """Return the layer's input as its weight multiplies it, before it is quantized."""
        return arranged(x, self.input_order, self.input_factor)

    def _derive(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        weight = weight.detach()
        check_whole(weight, self.name)
        if self.learned is not None:
            return least_error_parameters(weight, self.scheme, self._format)
        if (self.config.observer or "min_max") == "min_max":
            return self.scheme.parameters_of(weight, self._format)
        # Rows gathered from an embedding are fewer than the table's.
        rows, shape = rows_of(weight, self._format), scale_shape(weight.shape, self._format)
        observer = make_observer(str(self.config.observer), num_channels=rows.shape[0], layer_name=self.name)
        observer.to(rows.device).update(rows)
        scale, zero_point = observer.get_quantization_params(self._format.symmetric, self._format.bits)
        return scale.reshape(shape), zero_point.reshape(shape)

    @property
    def covers_weight(self) -> bool:
        """Whether the range holds every element of the weight, as that of its extremes does until frozen."""
        return self.learned is None and not self.frozen and (self.config.observer or "min_max") == "min_max"

    def parameters_for(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``(scale, zero_point)`` that ``weight`` is quantized with now."""
        if self.learned is not None:
            if not self.learned.ready and not self.quantizing:
                return self._derive(weight)  # what it would begin with
            self.begin_learning(weight)
            return self._scale_and_zero()
        return (self.scale, self.zero_point) if self.frozen else self._derive(weight)

    def begin_learning(self, weight: Tensor) -> None:
        """Let a learned scale begin at that of ``weight``, the first time that this is called."""
        learned = self.learned
        if learned is None or learned.ready:
            return
        if not torch.compiler.is_compiling():  # a search has no place in a graph: that of ``prepare`` holds there
            self._store(*self._derive(whole_weight(weight.detach(), weight.shape, self.name)))
        learned.ready = True

    def codes(self, weight: Tensor) -> Tensor:
        """Return the integer codes of ``weight``, in its shape: what conversion stores."""
        weight = whole_weight(weight.detach(), self._shape, self.name)
        return self.scheme.quantize(weight, *self.parameters_for(weight), self._format)

    def set_bits(self, bits: int, weight: Tensor) -> None:
        """Change the bits and derive the scale again, also when frozen."""
        if bits != self.bits:
            self._set_bits(bits)
            self._store(*self._derive(whole_weight(weight, self._shape, self.name)))
            if self.learned is not None:
                self.learned.renewed = True

    def set_frozen(self, frozen: bool, weight: Tensor) -> None:
        """Let the scale stand still at that of ``weight``, or follow the weight again."""
        if frozen and self.learned is not None:
            self.begin_learning(weight)
        elif frozen and not self.frozen:
            self._store(*self._derive(whole_weight(weight, self._shape, self.name)))
        self.frozen = frozen

    def fix(self, scale: Tensor, zero_point: Tensor | None) -> tuple[Tensor, Tensor]:
        """Let the scale stand still at one that was chosen elsewhere; return it as it is kept.

        A learned scale goes on learning from there, and keeps it to the precision of its parameters.
        """
        zero = torch.zeros_like(scale, dtype=torch.int32) if zero_point is None else zero_point
        self._store(scale, zero)
        if self.learned is not None:
            self.learned.ready = True
        else:
            self.frozen = True
        return self.scale, self.zero_point

    def fake_quantize_rows(self, rows: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """Fake-quantize rows gathered from ``weight``: an embedding touches few of its rows.

        Args:
            rows: ``[*index.shape, features]``.
            index: which rows of ``weight`` they are.
            weight: the whole table.
        """
        rows = self.joined(rows)
        if not self.quantizing or not rows.numel():
            return rows
        fmt, flat = self._format, rows.reshape(-1, rows.shape[-1])
        zero_point: Tensor | None
        if self.learned is not None:
            scale, zero_point = self._learned_of_rows(index, weight)
        elif not self.scale.dim():
            scale, zero_point = self.parameters_for(weight)
        elif self.frozen:
            scale, zero_point = rows_of_scale(self.scale, self.zero_point, index, fmt, weight.shape)
        else:
            scale, zero_point = self._derive(flat)
        result = self.scheme.fake_quantize(flat, scale, zero_point, fmt).reshape(rows.shape)
        if self.debug_callback is not None:
            tell(self, rows, result, (scale, zero_point, fmt))
        return result

    def _learned_of_rows(self, index: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        scale, zero_point = self.parameters_for(weight)
        learned: Any = self.learned
        if self.learns_now:
            scale, zero_point = learned.with_gradient(self.gradient_factor(weight), self.bits)
        if not scale.dim():
            return scale, zero_point
        return rows_of_scale(scale, zero_point, index, self._format, weight.shape)

    def parameters_now(self, x: Tensor) -> tuple[Tensor, Tensor, TensorFormat] | None:
        return (*self._unchanging(*self.parameters_for(x)), self._format) if self.quantizing else None

    def extra_repr(self) -> str:
        kept = [name for name in ARRANGEMENT if self._buffers[name] is not None]
        return ", ".join([super().extra_repr(), *kept])

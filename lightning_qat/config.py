"""What to quantize and how: frozen, keyword-only values, checked when they are made."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import TYPE_CHECKING, TypeAlias, Union

from torch import nn

from lightning_qat.validation import (
    Step,
    check_bool,
    check_choice,
    check_dynamic,
    check_fraction,
    check_int,
    check_number,
    check_pact_decay,
    check_scheme_bits,
    check_step,
)
from lightning_qat.validation import epochs_of as epochs_of  # for who has the configs already
from lightning_qat.validation import nearest_first as nearest_first

if TYPE_CHECKING or sys.version_info < (3, 11):
    from enum import Enum

    class StrEnum(str, Enum):
        """``enum.StrEnum`` for Python 3.10."""

        __str__ = str.__str__
else:
    from enum import StrEnum


class QuantizationScheme(StrEnum):
    """The number formats that come with the library. Custom ones are plain strings."""

    INT8 = "int8"
    INT4 = "int4"
    NF4 = "nf4"
    FP4 = "fp4"
    LLM_INT8 = "llm_int8"
    DYNAMIC_TREE = "dynamic_tree"
    DYNAMIC = "dynamic"
    GPTQ = "gptq"
    AWQ = "awq"


#: What one range found at run time covers: a token (a sample, for convolutions) or the whole input.
DYNAMIC_RANGES = ("token", "tensor")
OBSERVER_NAMES = ("min_max", "moving_average", "percentile", "histogram", "mse")

#: Of bitsandbytes: elements that share a scale.
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
#: Schemes whose grid is given, and what shares a scale.
_FIXED_GRIDS = {"nf4": "blocks", "fp4": "blocks", "dynamic_tree": "blocks", "llm_int8": "rows"}


class _Unset(int):
    """An ``int`` that tells a default from the same number given by the user."""


_DEFAULT_BITS = _Unset(8)


@dataclass(frozen=True, kw_only=True)
class BitsAndBytesConfig:
    """How bitsandbytes quantizes one tensor.

    Args:
        bits: 8 or 4.
        dynamic_tree: use the 8-bit dynamic map, block-wise, instead of vector-wise int8.
        block_size: elements that share one absmax; a power of two from 32 to 4096.
        stochastic: round stochastically.
        outlier_threshold: which columns stay in 16 bit (LLM.int8()). Up to 1 a quantile of the columns' largest
            magnitudes, so that 0.99 keeps the largest hundredth of them; above 1 a magnitude, as bitsandbytes'
            ``llm_int8_threshold=6.0``; 0 keeps none.
        nested_quantization: quantize the scales too.
        quant_type: ``"nf4"`` or ``"fp4"``, the 4-bit map.
        rule: ``"cpu"`` or ``"cuda"``: which code a value between two gets, where bitsandbytes decides otherwise on a
            CPU than on a GPU (``"fp4"``, the 8-bit map and so nested scales). Ours is the same on both.
    """

    bits: int = 8
    dynamic_tree: bool = False
    block_size: int = 256
    stochastic: bool = False
    outlier_threshold: float = 0.99
    nested_quantization: bool = False
    quant_type: str = "nf4"
    rule: str = "cpu"

    def __post_init__(self) -> None:
        if self.bits not in (4, 8) or isinstance(self.bits, bool):
            raise ValueError(f"bits={self.bits!r} is not allowed; bitsandbytes has 4 and 8")
        if self.block_size not in BLOCK_SIZES:
            raise ValueError(f"block_size={self.block_size!r} is not allowed; use a power of two from 32 to 4096")
        for name in ("dynamic_tree", "stochastic", "nested_quantization"):
            check_bool(name, getattr(self, name))
        use = "a quantile from 0 to 1 or a magnitude above 1"
        check_number("outlier_threshold", self.outlier_threshold, use, lambda value: value >= 0)
        check_choice("quant_type", self.quant_type, ("nf4", "fp4"))
        check_choice("rule", self.rule, ("cpu", "cuda"))


@dataclass(frozen=True)
class QuantizationConfig:
    """How one tensor is quantized.

    Args:
        scheme: a :class:`QuantizationScheme` or the name of a custom one. ``"dynamic"`` finds ranges at run time.
        bits: 2 to 16 for integers; None means the scheme's own.
        symmetric: codes around zero; asymmetric ones are ``0 .. 2**bits - 1`` with an integer zero point.
        per_channel: one scale for each output channel instead of one for the tensor.
        group_size: one scale for each run of this many weights of an output channel; of ``"nf4"``, ``"fp4"`` and
            ``"dynamic_tree"`` the block size, which need not divide anything (64, 64 and 256 if neither this nor
            ``bnb`` says).
        calibration_samples: how many samples calibration looks at; None means all it is given.
        bnb: block size, rule, nesting, rounding and outliers of the bitsandbytes formats; the format is ``scheme``.
        observer: how the range is found: ``"min_max"``, ``"moving_average"``, ``"percentile"``, ``"histogram"`` or
            ``"mse"``; None means ``"min_max"`` for a weight and ``"moving_average"`` for an activation.
        observer_momentum: the moving average is ``m * old + (1 - m) * new``.
        dynamic_range: what a range found at run time covers: ``"token"`` (of a convolution, a sample) or ``"tensor"``.
        learnable: learn scale and zero point by gradient (LSQ, LSQ+), beginning at those of least squared error.
        pact_decay: learn the value that an activation is clipped at instead, as PACT does, with this L2 decay.
    """

    scheme: str = "int8"
    _: KW_ONLY
    bits: int | None = None
    symmetric: bool = True
    per_channel: bool = False
    group_size: int | None = None
    calibration_samples: int | None = None
    bnb: BitsAndBytesConfig | None = None
    observer: str | None = None
    observer_momentum: float = 0.99
    dynamic_range: str = "token"
    learnable: bool = False
    pact_decay: float | None = None

    def __post_init__(self) -> None:
        name, bits = check_scheme_bits(self.scheme, self.bits)
        object.__setattr__(self, "scheme", QuantizationScheme._value2member_map_.get(name, name))
        object.__setattr__(self, "bits", bits)
        for name in ("symmetric", "per_channel", "learnable"):
            check_bool(name, getattr(self, name))
        for name in ("group_size", "calibration_samples"):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), 1)
        if self.bnb is not None and not isinstance(self.bnb, BitsAndBytesConfig):
            raise ValueError(f"bnb={self.bnb!r} is not allowed; use a BitsAndBytesConfig or None")
        if self.observer is not None:
            check_choice("observer", self.observer, OBSERVER_NAMES)
        check_fraction("observer_momentum", self.observer_momentum, include_one=False)
        if self.scheme in _FIXED_GRIDS:
            self._check_fixed_grid()
        if check_choice("dynamic_range", self.dynamic_range, DYNAMIC_RANGES) == "tensor" and not self.dynamic:
            raise ValueError(
                f"dynamic_range='tensor' is not allowed with scheme={str(self.scheme)!r}, whose ranges are not found "
                "at run time; use scheme='dynamic'"
            )
        if self.learnable and self.dynamic:
            raise ValueError("learnable=True is not allowed with scheme='dynamic', which finds its scales at run time")
        check_pact_decay(self.pact_decay, self.learnable, "learnable=True")

    def _check_fixed_grid(self) -> None:
        shared, name = _FIXED_GRIDS[self.scheme], str(self.scheme)
        wrong = {
            "symmetric=False": not self.symmetric,
            "per_channel=True": self.per_channel and shared == "blocks",
            f"group_size={self.group_size}": self.group_size is not None and shared == "rows",
            f"observer={self.observer!r}": self.observer not in (None, "min_max"),
            "learnable=True": self.learnable,
        }
        if any(wrong.values()):
            what = next(text for text, given in wrong.items() if given)
            raise ValueError(f"{what} is not allowed with scheme={name!r}, whose grid is symmetric in {shared}")

    @property
    def dynamic(self) -> bool:
        """Whether ranges are found at run time."""
        return self.scheme == QuantizationScheme.DYNAMIC


@dataclass(frozen=True)
class QATConfig:
    """Quantization-aware training of a whole model with one setting for every layer.

    Args:
        scheme: number format of the weights.
        bits: of the weights; left out or None, the scheme's own.
        symmetric: symmetric weights.
        per_channel: one weight scale for each output channel.
        start_step: from here on the forward is fake-quantized; before, ranges are only observed.
        freeze_step: from here on scales and BatchNorm statistics stand still; None means never.
        learnable_step_size: learn the scales by gradient (LSQ, LSQ+); ranges found at run time have none to learn.
        observer_momentum: of the activations' moving average, ``m * old + (1 - m) * new``.
        pact_decay: learn the values that activations are clipped at (PACT), with this L2 decay; None is LSQ+, or fixed.
        activation_bits: bits of the activations; None means weight-only.
        activation_symmetric: symmetric activations.
        activation_dynamic: find ranges at run time instead of calibrated ones: ``"token"``, which True means too,
            finds one for each token and ``"tensor"`` one for the whole input of a layer.
        group_size: weights of an output channel that share a scale.
        weight_observer, activation_observer: how ranges are found.
        fold_batchnorm: fold BatchNorm that directly follows a layer into it on conversion.
        bnb: settings of the bitsandbytes formats.

    A step is an optimizer step (``1000``), a fraction of the run (``0.3``) or epochs (``"3 epochs"``).
    """

    scheme: str = "int8"
    _: KW_ONLY
    bits: int | None = _DEFAULT_BITS
    symmetric: bool = True
    per_channel: bool = False
    start_step: Step = 0
    freeze_step: Step | None = None
    learnable_step_size: bool = False
    pact_decay: float | None = None
    observer_momentum: float = 0.99
    activation_bits: int | None = 8
    activation_symmetric: bool = False
    activation_dynamic: bool | str = False
    group_size: int | None = None
    weight_observer: str = "min_max"
    activation_observer: str = "moving_average"
    fold_batchnorm: bool = True
    bnb: BitsAndBytesConfig | None = None

    def __post_init__(self) -> None:
        # A scheme of 4 bits under the default of 8 means its own 4; a given 8 is a contradiction.
        given = None if isinstance(self.bits, _Unset) else self.bits
        weight = QuantizationConfig(self.scheme, bits=given)
        object.__setattr__(self, "scheme", weight.scheme)
        if given is not None or weight.bits != self.bits:
            object.__setattr__(self, "bits", weight.bits)
        if weight.dynamic:
            raise ValueError("scheme='dynamic' describes activations; use scheme='int8', activation_dynamic=True")
        check_step("start_step", self.start_step)
        if self.freeze_step is not None:
            check_step("freeze_step", self.freeze_step)
        if self.activation_bits is not None:
            check_int("activation_bits", self.activation_bits, 2, 16)
        static = self.activation_bits is not None and not self.activation_dynamic and self.scheme != "llm_int8"
        check_pact_decay(self.pact_decay, static, "activations with calibrated ranges")
        for name in ("learnable_step_size", "activation_symmetric", "fold_batchnorm"):
            check_bool(name, getattr(self, name))
        object.__setattr__(self, "activation_dynamic", check_dynamic(self.activation_dynamic))
        check_choice("weight_observer", self.weight_observer, OBSERVER_NAMES)
        check_choice("activation_observer", self.activation_observer, OBSERVER_NAMES)
        self.weight_config()
        self.activation_config()

    def weight_config(self) -> QuantizationConfig:
        """Return what a weight of the model gets."""
        return QuantizationConfig(
            self.scheme,
            bits=self.bits,
            symmetric=self.symmetric,
            per_channel=self.per_channel,
            group_size=self.group_size,
            observer=self.weight_observer,
            bnb=self.bnb,
            learnable=self.learnable_step_size,
        )

    def activation_config(self) -> QuantizationConfig | None:
        """Return what the input of a layer gets, or None for weight-only."""
        if self.activation_bits is None:
            return None
        if self.scheme == QuantizationScheme.LLM_INT8:
            return QuantizationConfig(QuantizationScheme.LLM_INT8, bits=self.activation_bits, bnb=self.bnb)
        return QuantizationConfig(
            QuantizationScheme.DYNAMIC if self.activation_dynamic else QuantizationScheme.INT8,
            bits=self.activation_bits,
            symmetric=self.activation_symmetric,
            observer=None if self.activation_dynamic else self.activation_observer,
            observer_momentum=self.observer_momentum,
            dynamic_range="tensor" if self.activation_dynamic == "tensor" else "token",
            learnable=(self.learnable_step_size or self.pact_decay is not None) and not self.activation_dynamic,
            pact_decay=self.pact_decay,
        )


#: What a name means wherever a config or a plan is taken.
PRESETS: dict[str, QATConfig] = {
    "int8": QATConfig("int8", per_channel=True),
    "int8_dynamic": QATConfig("int8", per_channel=True, activation_dynamic=True, activation_symmetric=True),
    "int8_dynamic_per_tensor": QATConfig("int8", per_channel=True, activation_dynamic="tensor"),
    "int8_weight_only": QATConfig("int8", per_channel=True, activation_bits=None),
    "w4a8": QATConfig("int4", per_channel=True),
    "w4a16": QATConfig("int4", group_size=128, activation_bits=None),
    "w4a4": QATConfig("int4", per_channel=True, activation_bits=4),
    "nf4": QATConfig("nf4", activation_bits=None, bnb=BitsAndBytesConfig(bits=4, block_size=64)),
    "fp4": QATConfig("fp4", activation_bits=None, bnb=BitsAndBytesConfig(bits=4, block_size=64, quant_type="fp4")),
    "dynamic_tree": QATConfig("dynamic_tree", activation_bits=None, bnb=BitsAndBytesConfig(dynamic_tree=True)),
    "llm_int8": QATConfig("llm_int8", bnb=BitsAndBytesConfig(outlier_threshold=6.0)),
}


def preset(name: str) -> QATConfig:
    """Return the preset called ``name``; raise ``ValueError`` listing all, nearest first."""
    return PRESETS[check_choice("preset", name, PRESETS)]


@dataclass(frozen=True)
class LayerRule:
    """What the layers that match get. A preset's name means its weight or its activation part.

    Args:
        match: a glob on module names (``"blocks.*.mlp"``) or a layer type (``nn.Linear``).
        weight: of the weight; None leaves the layer in float.
        activation: of the layer's input; None means weight-only.
    """

    match: str | type[nn.Module]
    weight: QuantizationConfig | str | None = None
    activation: QuantizationConfig | str | None = None

    def __post_init__(self) -> None:
        is_type = isinstance(self.match, type) and issubclass(self.match, nn.Module)
        if not is_type and not (isinstance(self.match, str) and self.match):
            raise ValueError(f"match={self.match!r} is not allowed; use a glob on module names or a layer type")
        if isinstance(self.weight, str):
            object.__setattr__(self, "weight", preset(self.weight).weight_config())
        if isinstance(self.activation, str):
            object.__setattr__(self, "activation", preset(self.activation).activation_config())
        for name in ("weight", "activation"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, QuantizationConfig):
                raise ValueError(f"{name}={value!r} is not allowed; use a QuantizationConfig, a preset's name or None")
        if self.weight is None and self.activation is not None:
            raise ValueError(
                f"activation={self.activation!r} needs a weight: an integer layer has both (match={self.match!r})"
            )
        if self.weight is not None and self.weight.dynamic:  # type: ignore[union-attr]
            raise ValueError("weight=QuantizationConfig('dynamic') is not allowed; it describes activations")


@dataclass(frozen=True)
class QuantizationPlan:
    """Which layers get which config.

    Args:
        rules: in order; later rules win. A rule that matches no layer is an error when the plan is used.
        base: what every Linear and convolution gets first: a :class:`QATConfig`, a :class:`QuantizationConfig`, which
            describes one tensor and means weight-only, or a preset's name.
    """

    rules: Sequence[LayerRule] = field(default_factory=tuple)
    _: KW_ONLY
    base: QATConfig | QuantizationConfig | str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.rules, (str, LayerRule)) or not all(isinstance(r, LayerRule) for r in self.rules):
            raise ValueError(f"rules={self.rules!r} is not allowed; use a list of LayerRule")
        object.__setattr__(self, "rules", tuple(self.rules))
        if isinstance(self.base, str):
            object.__setattr__(self, "base", preset(self.base))
        elif isinstance(self.base, QuantizationConfig):
            object.__setattr__(self, "base", _weight_only(self.base))
        elif self.base is not None and not isinstance(self.base, QATConfig):
            raise ValueError(f"base={self.base!r} is not allowed; use a config, a preset's name or None")
        if not self.rules and self.base is None:
            raise ValueError("rules=[] is not allowed without a base: the plan would quantize nothing")


#: What ``prepare`` and the callbacks take.
PlanLike: TypeAlias = Union[QuantizationPlan, QATConfig, QuantizationConfig, str]


def resolve_plan(plan: PlanLike) -> QuantizationPlan:
    """Return the :class:`QuantizationPlan` that a plan, a config or a preset's name stands for."""
    if isinstance(plan, QuantizationPlan):
        return plan
    if isinstance(plan, (QATConfig, QuantizationConfig, str)):
        return QuantizationPlan(base=plan)
    raise ValueError(
        f"plan={plan!r} is not allowed; use a QuantizationPlan, a QATConfig, a QuantizationConfig or a name"
    )


def _weight_only(config: QuantizationConfig) -> QATConfig:
    return QATConfig(
        config.scheme,
        bits=config.bits,
        symmetric=config.symmetric,
        per_channel=config.per_channel,
        group_size=config.group_size,
        activation_bits=None,
        weight_observer=config.observer or "min_max",
        bnb=config.bnb,
        learnable_step_size=config.learnable,
    )

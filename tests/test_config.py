"""Values are checked when they are made; messages name the field, the value and what is allowed."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from torch import nn

from lightning_qat import (
    PRESETS,
    BitsAndBytesConfig,
    LayerRule,
    QATConfig,
    QuantizationConfig,
    QuantizationPlan,
    QuantizationScheme,
)
from lightning_qat.config import check_choice, nearest_first, preset, resolve_plan


def defaults(cls: type) -> dict[str, Any]:
    return {f.name: f.default for f in dataclasses.fields(cls)}


def test_defaults_of_quantization_config() -> None:
    expected = {
        "scheme": "int8",
        "bits": None,
        "symmetric": True,
        "per_channel": False,
        "group_size": None,
        "calibration_samples": None,
        "bnb": None,
    }
    assert expected.items() <= defaults(QuantizationConfig).items()
    assert QuantizationConfig().bits == 8  # None means the scheme's own


def test_defaults_of_qat_config() -> None:
    expected = {
        "scheme": "int8",
        "bits": 8,
        "symmetric": True,
        "per_channel": False,
        "start_step": 0,
        "freeze_step": None,
        "learnable_step_size": False,
        "observer_momentum": 0.99,
        "activation_bits": 8,
        "activation_symmetric": False,
    }
    assert expected.items() <= defaults(QATConfig).items()


def test_defaults_of_bitsandbytes_config() -> None:
    assert dataclasses.asdict(BitsAndBytesConfig()) == {
        "bits": 8,
        "dynamic_tree": False,
        "block_size": 256,
        "stochastic": False,
        "outlier_threshold": 0.99,
        "nested_quantization": False,
        "quant_type": "nf4",
        "rule": "cpu",
    }


def test_schemes() -> None:
    names = {"int8", "int4", "nf4", "fp4", "llm_int8", "dynamic_tree", "dynamic", "gptq", "awq"}
    assert {str(s) for s in QuantizationScheme} == names
    assert QuantizationConfig("int8").scheme is QuantizationScheme.INT8


@pytest.mark.parametrize("cls", [QuantizationConfig, QATConfig])
def test_scheme_is_positional_and_the_rest_is_not(cls: type) -> None:
    assert cls("int4").bits == 4
    with pytest.raises(TypeError, match="positional"):
        cls("int8", 8)


@pytest.mark.parametrize("config", [QuantizationConfig(), QATConfig(), BitsAndBytesConfig(), LayerRule("*")])
def test_configs_are_frozen(config: Any) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.bits = 4


@pytest.mark.parametrize(
    ("cls", "field", "value", "allowed"),
    [
        (QuantizationConfig, "bits", 1, "2 to 16"),
        (QuantizationConfig, "bits", 17, "2 to 16"),
        (QuantizationConfig, "bits", "8", "2 to 16"),
        (QuantizationConfig, "bits", True, "2 to 16"),
        (QuantizationConfig, "symmetric", 1, "True or False"),
        (QuantizationConfig, "per_channel", "yes", "True or False"),
        (QuantizationConfig, "group_size", 0, "1 or more"),
        (QuantizationConfig, "group_size", 64.0, "1 or more"),
        (QuantizationConfig, "calibration_samples", -1, "1 or more"),
        (QuantizationConfig, "bnb", {}, "BitsAndBytesConfig"),
        (QuantizationConfig, "observer", "minmax", "'min_max'"),
        (QuantizationConfig, "observer_momentum", 1.0, "[0, 1)"),
        (QuantizationConfig, "observer_momentum", -0.1, "[0, 1)"),
        (QATConfig, "bits", 0, "2 to 16"),
        (QATConfig, "symmetric", None, "True or False"),
        (QATConfig, "start_step", -1, "step"),
        (QATConfig, "start_step", "soon", "epochs"),
        (QATConfig, "freeze_step", 1.5, "fraction"),
        (QATConfig, "learnable_step_size", "no", "True or False"),
        (QATConfig, "observer_momentum", 2, "[0, 1)"),
        (QATConfig, "activation_bits", 1, "from 2 to 16"),
        (QATConfig, "activation_symmetric", 0, "True or False"),
        (QATConfig, "activation_dynamic", 0, "True or False"),
        (QATConfig, "activation_dynamic", "row", "'token' or 'tensor'"),
        (QuantizationConfig, "dynamic_range", "row", "'token', 'tensor'"),
        (QuantizationConfig, "dynamic_range", "tensor", "scheme='dynamic'"),
        (QATConfig, "group_size", -8, "1 or more"),
        (QATConfig, "weight_observer", "mse_", "'mse'"),
        (QATConfig, "activation_observer", "average", "'moving_average'"),
        (QATConfig, "fold_batchnorm", "auto", "True or False"),
        (BitsAndBytesConfig, "bits", 5, "4 and 8"),
        (BitsAndBytesConfig, "block_size", 100, "power of two"),
        (BitsAndBytesConfig, "dynamic_tree", 1, "True or False"),
        (BitsAndBytesConfig, "outlier_threshold", -0.5, "a quantile from 0 to 1"),
        (BitsAndBytesConfig, "quant_type", "nf5", "'nf4'"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(cls: type, field: str, value: Any, allowed: str) -> None:
    with pytest.raises(ValueError, match=field) as error:
        cls(**{field: value})
    assert f"{field}={value!r}" in str(error.value)
    assert allowed in str(error.value)


@pytest.mark.parametrize(("wrong", "nearest"), [("in8", "int8"), ("nf5", "nf4"), ("gptk", "gptq"), ("INT4", "int4")])
def test_an_unknown_scheme_lists_all_nearest_first(wrong: str, nearest: str) -> None:
    with pytest.raises(ValueError, match="scheme") as error:
        QuantizationConfig(wrong)
    listed = str(error.value).partition("use one of: ")[2].split(", ")
    assert listed[0] == f"'{nearest}'"
    assert set(listed) >= {f"'{s}'" for s in QuantizationScheme}


def test_check_choice_and_nearest_first() -> None:
    assert nearest_first("int9", ["w4a8", "int8"]) == ["int8", "w4a8"]
    assert check_choice("preset", "int8", PRESETS) == "int8"
    with pytest.raises(ValueError, match=r"preset='int9' is not known; use one of: 'int8'"):
        preset("int9")


def test_bits_against_the_scheme() -> None:
    assert QATConfig("int4").bits == 4
    with pytest.raises(ValueError, match="bits=8"):
        QATConfig("int4", bits=8)
    assert [QATConfig("int8", bits=bits).bits for bits in (2, 6, 16)] == [2, 6, 16]


@pytest.mark.parametrize("step", [0, 1000, 0.3, "3 epochs", "1 epoch"])
def test_steps_may_be_numbers_fractions_or_epochs(step: Any) -> None:
    assert QATConfig(start_step=step).start_step == step


def test_parts_of_a_qat_config() -> None:
    config = QATConfig("int8", bits=6, per_channel=True, activation_bits=7, weight_observer="mse")
    assert config.weight_config() == QuantizationConfig("int8", bits=6, per_channel=True, observer="mse")
    activation = config.activation_config()
    assert activation is not None
    assert (activation.bits, activation.symmetric, activation.observer) == (7, False, "moving_average")
    assert QATConfig(activation_bits=None).activation_config() is None
    dynamic = QATConfig(activation_dynamic=True).activation_config()
    assert dynamic is not None
    assert dynamic.dynamic


def test_what_a_range_found_at_run_time_covers() -> None:
    assert QATConfig(activation_dynamic="token") == QATConfig(activation_dynamic=True)
    for dynamic, covered in ((True, "token"), ("token", "token"), ("tensor", "tensor")):
        activation = QATConfig(activation_dynamic=dynamic).activation_config()
        assert activation == QuantizationConfig("dynamic", symmetric=False, dynamic_range=covered)
    static = QATConfig().activation_config()
    assert static is not None
    assert not static.dynamic


def test_presets() -> None:
    assert {"int8", "int8_dynamic", "int8_weight_only", "w4a8", "w4a16", "w4a4"} <= set(PRESETS)
    int8 = PRESETS["int8"]
    assert (int8.bits, int8.per_channel, int8.symmetric) == (8, True, True)
    assert (int8.activation_bits, int8.activation_symmetric) == (8, False)
    assert PRESETS["int8_dynamic"].activation_dynamic
    per_tensor = PRESETS["int8_dynamic_per_tensor"]
    assert (per_tensor.activation_dynamic, per_tensor.activation_symmetric) == ("tensor", False)
    assert PRESETS["int8_weight_only"].activation_bits is None
    assert (PRESETS["w4a16"].group_size, PRESETS["w4a16"].activation_bits) == (128, None)
    assert (PRESETS["w4a4"].bits, PRESETS["w4a4"].activation_bits) == (4, 4)


@pytest.mark.parametrize("match", ["", 3, None, int, nn.Linear(1, 1)])
def test_a_rule_matches_names_or_types(match: Any) -> None:
    with pytest.raises(ValueError, match="match="):
        LayerRule(match)


def test_a_rule_takes_presets_and_configs() -> None:
    rule = LayerRule(nn.Linear, weight="w4a8", activation="w4a8")
    assert isinstance(rule.weight, QuantizationConfig)
    assert isinstance(rule.activation, QuantizationConfig)
    assert (rule.weight.bits, rule.activation.bits) == (4, 8)
    assert LayerRule("head").weight is None
    with pytest.raises(ValueError, match="weight=8"):
        LayerRule("head", weight=8)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs a weight"):
        LayerRule("head", activation=QuantizationConfig())
    with pytest.raises(ValueError, match="describes activations"):
        LayerRule("head", weight=QuantizationConfig("dynamic"))


def test_a_plan_is_checked() -> None:
    assert QuantizationPlan(base="int8").base == PRESETS["int8"]
    weights = QuantizationConfig("gptq", group_size=64)
    assert QuantizationPlan([LayerRule("head")], base=weights).base == resolve_plan(weights).base
    with pytest.raises(ValueError, match="rules=\\[\\]"):
        QuantizationPlan()
    with pytest.raises(ValueError, match="LayerRule"):
        QuantizationPlan(rules=["head"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="base=3"):
        QuantizationPlan(base=3)  # type: ignore[arg-type]


def test_resolve_plan() -> None:
    plan = QuantizationPlan(rules=[LayerRule("*", weight="int8")])
    assert resolve_plan(plan) is plan
    assert resolve_plan("int8") == QuantizationPlan(base="int8")
    assert resolve_plan(QATConfig("int8")) == QuantizationPlan(base=QATConfig("int8"))
    base = resolve_plan(QuantizationConfig("int8", per_channel=True)).base
    assert isinstance(base, QATConfig)
    assert base.activation_bits is None  # one tensor's config means weight-only
    assert base.per_channel
    with pytest.raises(ValueError, match="plan=8"):
        resolve_plan(8)  # type: ignore[arg-type]


def test_no_bits_are_the_schemes_own():
    for scheme, bits in (("int8", 8), ("int4", 4), ("nf4", 4), ("dynamic_tree", 8)):
        assert QATConfig(scheme, bits=None) == QATConfig(scheme)
        assert QATConfig(scheme, bits=None).bits == bits

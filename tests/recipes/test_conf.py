"""The YAML files say what the code says."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import resources

import hydra
import pytest
from hydra.utils import instantiate
from omegaconf import DictConfig

from lightning_qat import PRESETS, QATConfig, QuantizationPlan
from lightning_qat.recipes._targets import check_targets

CONF = resources.files("lightning_qat.conf")


def options(group: str) -> list[str]:
    return sorted(f.name.removesuffix(".yaml") for f in CONF.joinpath(group).iterdir() if f.name.endswith(".yaml"))


def compose(*overrides: str) -> DictConfig:
    with hydra.initialize_config_module("lightning_qat.conf", version_base="1.3"):
        return hydra.compose("train", list(overrides))


@pytest.mark.parametrize("name", PRESETS)
def test_a_file_for_each_preset(name: str) -> None:
    made = instantiate(compose(f"quantization={name}").quantization)
    assert made == PRESETS[name]


def test_no_other_quantization_than_presets_and_plans() -> None:
    assert set(options("quantization")) == {*PRESETS, "plan"}
    assert isinstance(instantiate(compose("quantization=plan").quantization, _convert_="all"), QuantizationPlan)


@pytest.mark.parametrize("bits", [2, 4, 6, 16])
@pytest.mark.parametrize("name", ["int8", "int8_dynamic", "int8_weight_only"])
def test_bits_of_int8_can_be_lowered(name: str, bits: int) -> None:
    made = instantiate(compose(f"quantization={name}", f"quantization.bits={bits}").quantization)
    assert isinstance(made, QATConfig)
    assert made.bits == bits


def choices() -> Iterator[str]:
    for group in ("callbacks", "data", "logger", "model", "quantization", "recipe", "task", "trainer"):
        yield from (f"{group}={option}" for option in options(group) if option != "custom")


@pytest.mark.parametrize("choice", list(choices()))
def test_every_file_names_classes_and_arguments_that_exist(choice: str) -> None:
    cfg = compose(choice)
    for part in ("data", "model", "task", "quantization", "trainer", "callbacks", "logger"):
        check_targets(cfg[part], part)


def test_a_recipe_changes_groups_and_values() -> None:
    cfg = compose("recipe=mnist5k_int8")
    assert cfg.data._target_.endswith("MNIST5kDataModule")
    assert cfg.float_fit.max_epochs == 8
    assert cfg.threads is None
    assert compose("recipe=mnist5k_int8", "data=digits", "float_fit.max_epochs=2").float_fit.max_epochs == 2

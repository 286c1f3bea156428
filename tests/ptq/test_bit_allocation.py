"""Sensitivities are what quantizing one layer does to the output; the plan made of them is one that recipes take."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from tensors import randn
from torch import nn

import lightning_qat as lq
from lightning_qat import LayerSensitivity, allocate_bits, measure_sensitivity, mixed_plan, write_plan


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 32), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(32, 10)).eval()


def test_the_loss_of_a_layer_is_what_it_does_to_the_output() -> None:
    model, batches = network(), [randn(8, 1, 8, 8, seed=i) for i in range(2)]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = {s.name: s for s in measure_sensitivity(model, batches, bits=(3, 8))}
    assert list(found) == ["0", "4", "6"]
    assert [found[n].weights for n in found] == [72, 288 * 32, 320]
    for name in found:
        for bits in (3, 8):
            noise = power = 0.0
            changed = network()
            config = lq.QuantizationConfig("int8", bits=bits, per_channel=True)
            changed.get_submodule(name).weight.data = lq.quantize(
                changed.get_submodule(name).weight, config
            ).dequantize()
            with torch.no_grad():
                for x in batches:
                    expected = model(x).double()
                    noise += float((changed(x).double() - expected).square().sum())
                    power += float(expected.square().sum())
            assert found[name].loss[bits] == pytest.approx(noise / power, rel=1e-4)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert type(model[0]) is nn.Conv2d


def test_the_plan_loses_less_than_equal_bits_of_the_same_size() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(64, 64), nn.Tanh()))).eval()
    model[2].weight.data[3, 5] = 2.0  # its one scale for the tensor is wide
    model[4].weight.data *= 0.02  # what it does hardly matters
    batches, base = [randn(64, 64, seed=i) for i in range(2)], lq.QATConfig("int8", activation_bits=None)
    found = measure_sensitivity(model, batches, base, bits=(2, 4, 5, 6, 8))
    plan = mixed_plan(found, 5.0)
    bits = {rule.match: rule.weight.bits for rule in plan.rules}
    assert sum(bits.values()) <= 4 * 5
    assert bits["4"] < 5 < bits["2"]
    x = randn(64, 64, seed=9)
    with torch.no_grad():
        mixed = lq.sqnr(model(x), lq.quantize_model(model, plan)(x))
        equal = lq.sqnr(model(x), lq.quantize_model(model, lq.QATConfig("int8", bits=5, activation_bits=None))(x))
    assert mixed > equal + 1


def test_a_budget_that_is_met_exactly_and_one_that_is_too_small() -> None:
    config = lq.QuantizationConfig("int8")
    layers = [LayerSensitivity("a", 10, {2: 5.0, 4: 1.0}, config), LayerSensitivity("b", 30, {2: 1.0, 4: 0.9}, config)]
    assert allocate_bits(layers, 2.5) == {"a": 4, "b": 2}
    assert allocate_bits(layers, 4.0) == {"a": 4, "b": 4}
    with pytest.raises(ValueError, match="is too few: the fewest that were measured take 2.000"):
        allocate_bits(layers, 1.9)
    with pytest.raises(ValueError, match="bits is empty"):
        measure_sensitivity(network(), [randn(1, 1, 8, 8)], bits=())
    with pytest.raises(ValueError, match="keeps its 4 bits"):
        measure_sensitivity(network(), [randn(1, 1, 8, 8)], "nf4")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bits_without_a_finite_loss_are_not_chosen(bad: float) -> None:
    config = lq.QuantizationConfig("int8", per_channel=True)
    layers = [LayerSensitivity("a", 10, {2: bad, 4: 0.1}, config), LayerSensitivity("b", 10, {2: 0.5, 8: bad}, config)]
    assert allocate_bits(layers, 6) == {"a": 4, "b": 2}
    with pytest.raises(ValueError, match=r"bits_per_weight=2.5 is too few: .* take 3.000"):
        allocate_bits(layers, 2.5)
    layers.append(LayerSensitivity("c", 10, {2: bad, 4: bad}, config))
    with pytest.raises(ValueError, match=r"the loss of layer 'c' is not finite at any of \[2, 4\] bits"):
        allocate_bits(layers, 6)


def test_the_file_is_the_plan(tmp_path: Path) -> None:
    model = nn.ModuleDict({"a[0]": nn.Linear(8, 4)})
    found = measure_sensitivity(model, [randn(4, 8)], "int8", bits=(2, 4), forward=lambda m, x: m["a[0]"](x))
    plan = mixed_plan(found, 3.0)
    file = write_plan(plan, tmp_path / "quantization" / "mixed.yaml")
    made = instantiate(OmegaConf.load(file), _convert_="all")
    assert made == plan
    assert isinstance(lq.prepare(model, made)["a[0]"], lq.QATLinear)
    nested = lq.QuantizationPlan([lq.LayerRule("x", lq.QuantizationConfig("nf4", bnb=lq.BitsAndBytesConfig(bits=4)))])
    assert instantiate(OmegaConf.load(write_plan(nested, tmp_path / "n.yaml")), _convert_="all") == nested
    with pytest.raises(ValueError, match="give each layer a rule by name"):
        write_plan(lq.QuantizationPlan(base="int8"), tmp_path / "base.yaml")


def test_a_recipe_takes_the_file(tmp_path: Path) -> None:
    rules = [lq.LayerRule("*", lq.QuantizationConfig("int8", bits=5, per_channel=True))]
    write_plan(lq.QuantizationPlan(rules), tmp_path / "quantization" / "mine.yaml")
    command = [
        sys.executable, "-m", "lightning_qat", "train", f"hydra.searchpath=[file://{tmp_path}]", "quantization=mine",
        "++trainer.max_epochs=1", "++trainer.limit_train_batches=2", f"hydra.run.dir={tmp_path / 'run'}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert '"bits": 5' in next((tmp_path / "run").rglob("manifest.json")).read_text()

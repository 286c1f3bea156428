"""Evening out: the float model stays what it was, the quantized one comes nearer; what fails leaves no trace."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from ptq_models import Llama, MobileNet, built, images, tokens
from torch import Tensor, nn

import lightning_qat as lq
from lightning_qat.metrics import sqnr
from lightning_qat.ptq import EqualizationOptions, GroupEqualization, PTQOptions, equalization, equalize
from lightning_qat.ptq.channel_groups import ChannelGroup
from lightning_qat.ptq.equalizing_scales import ChannelRange
from lightning_qat.ptq.journal import Journal
from lightning_qat.transforms.phase import float_forward

INT8 = lq.QATConfig("int8", per_channel=True, activation_observer="min_max")
EVEN = PTQOptions(equalization=EqualizationOptions())


def uneven() -> nn.Module:
    """Return a model in which some channels that go from norm to convolution are far larger than others."""
    model: Any = built(MobileNet)
    for i, block in enumerate(model.features[1:]):
        for norm, reader in ((1, 3), (4, 6)):
            made, read = block.body[norm], block.body[reader]
            made.bias.data.add_(1)  # or most would be 0 after the ReLU
            factor = torch.exp2(torch.linspace(-6, 0, len(made.weight)))[
                torch.randperm(len(made.weight), generator=seeded(i))
            ]
            made.weight.data.mul_(factor), made.bias.data.mul_(factor)
            read.weight.data.div_(factor.view(-1, 1, 1, 1) if read.groups > 1 else factor.view(1, -1, 1, 1))
    return model


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def floats(model: nn.Module, batches: list[Tensor]) -> list[Tensor]:
    with float_forward(model), torch.no_grad():
        return [model(batch) for batch in batches]


def test_the_float_model_stays_and_channels_are_more_alike() -> None:
    model = lq.prepare(uneven(), INT8)
    before, kept = floats(model, images()), dict(model.named_parameters())
    values = {name: parameter.clone() for name, parameter in kept.items()}
    done = equalize(model, images())
    for actual, expected in zip(floats(model, images()), before, strict=True):
        assert torch.allclose(actual, expected, rtol=1e-5, atol=1e-6)
    assert len(done) >= 5
    for name, parameter in kept.items():  # somebody else's, maybe
        assert torch.equal(parameter, values[name])
    changed = {name for name, parameter in model.named_parameters() if parameter is not kept[name]}
    expected_changes = {f"{name}.weight" for group in done for name in (*group.sources, *group.readers)}
    assert changed == expected_changes | {f"{name}.bias" for group in done for name in group.sources}
    for group in done:
        assert group.loss < group.plain_loss
        assert float(group.scales.min()) < 1


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_the_quantized_model_comes_nearer(method: str) -> None:
    model, batches = uneven(), images()
    x = torch.cat(batches)
    plain = lq.quantize_model(model, INT8, batches, method)
    even = lq.quantize_model(model, INT8, batches, method, options=EVEN, verify=True)
    with torch.no_grad():
        assert sqnr(model(x), even(x)) > sqnr(model(x), plain(x)) + 3
    report: Any = lq.ptq_report(even)
    assert report.notes[-1] == "7 groups of channels, inputs of 8 layers, were evened out"


def test_the_least_expected_error_is_taken() -> None:
    tried = [
        equalize(lq.prepare(uneven(), INT8), images(), None, EqualizationOptions(alpha=a)) for a in (0.25, 0.5, 1.0)
    ]
    best = equalize(lq.prepare(uneven(), INT8), images(), None, EqualizationOptions(grid_points=4))
    for group in best:
        clamped = not group.sources[0].endswith(".7")  # the norms before a sum
        losses = [
            g.loss for done in tried for g in done if g.sources == group.sources and g.alpha <= (0.5 if clamped else 1)
        ]
        assert group.loss <= min(losses)
        assert group.alpha <= 0.5 or not clamped


def test_the_users_model_is_left_alone() -> None:
    model = uneven()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    even = lq.quantize_model(model, INT8, images(), "rtn", options=EVEN, convert=False)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    pointers = {parameter.data_ptr() for parameter in model.parameters()}
    assert pointers.isdisjoint(parameter.data_ptr() for parameter in even.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_16_bits_get_powers_of_two(dtype: torch.dtype) -> None:
    model, batches = lq.prepare(uneven().to(dtype), INT8), [batch.to(dtype) for batch in images()]
    before = floats(model, batches)
    done = equalize(model, batches)
    assert done
    for group in done:
        assert torch.equal(group.scales.log2(), group.scales.log2().round())
    for actual, expected in zip(floats(model, batches), before, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("config", ["int8_dynamic", "int8_weight_only", "nf4"])
def test_without_calibrated_ranges_there_is_nothing_to_even_out(config: str) -> None:
    assert equalize(lq.prepare(uneven(), config), images()) == ()


def test_a_model_that_computes_something_else_is_put_back(caplog: pytest.LogCaptureFixture) -> None:
    model = lq.prepare(uneven(), INT8)
    norm: Any = model.get_submodule("features.1.body.1")
    norm.register_forward_hook(lambda _module, _args, output: output.square())  # which is inside of what is watched
    before, kept = floats(model, images()), dict(model.named_parameters())
    assert equalize(model, images()) == ()
    assert "channels are not evened out" in caplog.text
    assert all(parameter is kept[name] for name, parameter in model.named_parameters())
    assert all(torch.equal(a, b) for a, b in zip(floats(model, images()), before, strict=True))


def test_what_only_a_forward_of_the_users_returns_stays() -> None:
    def both(model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        features = model.features(x)
        return features, model.classifier(features.mean((2, 3)))

    alone = equalize(lq.prepare(uneven(), INT8), images())
    with_features = equalize(lq.prepare(uneven(), INT8), images(), both)
    assert [group.sources for group in with_features] == [g.sources for g in alone if "classifier.1" not in g.readers]
    assert len(with_features) < len(alone)


def test_a_run_that_broke_off_ends_with_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(folder: str) -> dict[str, Any]:
        made = lq.quantize_model(uneven(), INT8, images(), "gptq", options=EVEN, journal=tmp_path / folder)
        return made.state_dict()

    written = []
    write = Journal.write

    def broken(self: Journal, stage: str, *args: Any) -> None:
        write(self, stage, *args)
        written.append(stage)
        if len(written) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "write", broken)
        with pytest.raises(KeyboardInterrupt):
            run("broken")
    whole, resumed = run("whole"), run("broken")
    assert len(list((tmp_path / "whole").glob("*.safetensors"))) > 2
    for name, value in whole.items():
        assert not isinstance(value, Tensor) or torch.equal(value, resumed[name]), name
    with pytest.raises(ValueError, match="with another options"):
        lq.quantize_model(uneven(), INT8, images(), "gptq", journal=tmp_path / "whole")


def test_ranks_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other rank has seen the other batches, and one of the groups has another reader there."""

    def seen_by(batches: list[Tensor]) -> tuple[list[ChannelGroup], dict[str, ChannelRange]]:
        model = lq.prepare(uneven(), INT8)
        with float_forward(model), torch.no_grad():
            return equalization._watched(model, batches, model)

    groups, seen = seen_by(images()[:1])
    _, other = seen_by(images()[1:])
    _, whole = seen_by(images())

    def of_every_rank(value: Any) -> list[Any]:
        told, ranges = value
        return [value, ([(told[0][0], ("another",), math.inf), *told[1:]], {name: other[name] for name in ranges})]

    monkeypatch.setattr(equalization, "of_every_rank", of_every_rank)
    agreed, merged = equalization._agreed(groups, seen)
    assert agreed == groups[1:]
    for name, found in merged.items():
        assert torch.equal(found.low, whole[name].low)
        assert torch.equal(found.high, whole[name].high)
        assert found.count == whole[name].count
        assert torch.allclose(found.square, whole[name].square)


def test_what_does_not_go_together() -> None:
    with pytest.raises(ValueError, match="equalization=... needs calibration batches"):
        lq.quantize_model(uneven(), "int8_weight_only", options=EVEN)
    with pytest.raises(ValueError, match="equalization=... got no calibration batch"):
        lq.quantize_model(uneven(), INT8, [], "rtn", options=EVEN)
    with pytest.raises(ValueError, match="equalization=0.5 is not allowed"):
        PTQOptions(equalization=0.5)  # type: ignore[arg-type]


def test_transformers_are_left_to_smoothing() -> None:
    done: tuple[GroupEqualization, ...] = equalize(lq.prepare(built(Llama), "int8"), tokens())
    assert done == ()

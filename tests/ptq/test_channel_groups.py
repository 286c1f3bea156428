"""Groups of channels: those that may be multiplied, proved by multiplying them; and all that must not be."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ptq_models import MobileNet, built, images
from tensors import randn
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_qat as lq
from lightning_qat.ptq.channel_groups import ChannelGroup, ChannelWatch
from lightning_qat.tasks.mobilenet_v2 import MobileNetV2
from lightning_qat.transforms.phase import float_forward


def found(model: nn.Module, *batches: Tensor) -> list[ChannelGroup]:
    watch = ChannelWatch(model)
    with float_forward(model), torch.no_grad():
        for batch in batches:
            with watch.forward():
                model(batch)
    return watch.groups()


def names(groups: list[ChannelGroup]) -> list[tuple[tuple[str, ...], tuple[str, ...], float]]:
    return [(tuple(sorted(s.name for s in group.sources)), tuple(group.readers), group.ceiling) for group in groups]


def check_by_multiplying(model: nn.Module, groups: list[ChannelGroup], x: Tensor) -> None:
    """Powers of two are exact: what the groups' definition says has to be so to the last bit."""
    with float_forward(model), torch.no_grad():
        before = model(x)
        for i, group in enumerate(groups):
            exponent = torch.randint(0, 2, (group.channels,), generator=torch.Generator().manual_seed(i))
            # A clamp only stays where it was for channels that are made smaller where none comes near it.
            factor = torch.exp2(exponent * (-6.0 if group.ceiling < math.inf else 3.0))
            for source in group.sources:
                source.multiply(factor)
            for layer in group.readers.values():
                columns = layer.weight.unflatten(0, (getattr(layer, "groups", 1), -1))
                by_channel = factor.view(columns.shape[0], 1, -1, *[1] * (columns.dim() - 3))
                layer.weight.copy_((columns / by_channel).flatten(0, 1))
        assert torch.equal(model(x), before)


class Bottleneck(nn.Module):
    """As in ResNet: a ReLU after the sum, pooling, and a shortcut with a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.ReLU(), nn.Conv2d(4, 6, 1, bias=False))
        self.norm, self.shortcut = nn.BatchNorm2d(6), nn.Conv2d(4, 6, 1)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.first(x)), 2)
        x = (self.norm(self.body(x)) + self.shortcut(x)).relu_()
        return self.head(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def test_over_shortcuts_and_pooling() -> None:
    model = lq.prepare(built(Bottleneck), "int8")
    groups = found(model, *images())
    inf = math.inf
    assert names(groups) == [
        (("first.1",), ("body.0", "shortcut"), inf),
        (("body.0",), ("body.2",), inf),
        (("norm", "shortcut"), ("head",), inf),
    ]
    check_by_multiplying(model, groups, images()[0])


def test_of_inverted_residuals() -> None:
    model = lq.prepare(built(MobileNet), "int8")
    groups = found(model, *images())
    inside = [
        ((f"features.{i}.body.{norm}",), (f"features.{i}.body.{norm + 2}",), 6.0) for i in (1, 2, 3) for norm in (1, 4)
    ]
    end = (("features.2.body.7", "features.3.body.7"), ("features.3.body.0", "classifier.1"), math.inf)
    # What features.0 clamps at 6 goes into a sum: from the sum it cannot be told how far from 6 it was.
    assert names(groups) == [*inside[:4], end, *inside[4:]]
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.weight.data.mul_(1e-2), norm.bias.data.mul_(1e-2)  # far below 6
    check_by_multiplying(model, groups, images()[0])


def test_of_every_convolution_of_mobilenet_v2_but_the_first() -> None:
    model = lq.prepare(MobileNetV2(), "int8").eval()
    groups = found(model, randn(1, 3, 32, 32))
    convolutions = [name for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d)]
    assert sorted(name for group in groups for name in group.readers) == sorted(convolutions[1:])
    # Before 17 depthwise and 17 projecting ones; and a chain of residual connections for each width.
    assert [len([g for g in groups if (g.ceiling == 6.0) is clamped]) for clamped in (True, False)] == [34, 7]


class Between(nn.Module):
    """A convolution with BatchNorm, a function, and a convolution; or what a case makes of them."""

    def __init__(self, between: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)
        self.other, self.head = nn.Conv2d(3, 4, 1), nn.Linear(4, 2)
        self.between = between

    def forward(self, x: Tensor) -> Any:
        return self.between(self, x)


@dataclass
class Output:
    made: Tensor
    features: Tensor


def assigned(x: Tensor) -> Tensor:
    whole = torch.zeros(len(x), 8, *x.shape[2:])
    whole[:, :4] = x
    return whole


CASES: dict[str, Callable[[Any, Tensor], Any]] = {
    "no homogeneous function": lambda m, x: m.last(torch.sigmoid(m.norm(m.conv(x)))),
    "a clamp below zero": lambda m, x: m.last(F.hardtanh(m.norm(m.conv(x)))),
    "a number added": lambda m, x: m.last(m.norm(m.conv(x)) + 1),
    "a sum with what no source makes": lambda m, x: m.last(m.norm(m.conv(x)) + x.mean(1, keepdim=True)),
    "a sum over channels": lambda m, x: m.last(m.norm(m.conv(x))) + m.norm(m.conv(x)).mean(1, keepdim=True),
    "a mean over channels": lambda m, x: m.head(m.norm(m.conv(x[..., :4, :])).mean((1, 3))),
    "a product": lambda m, x: m.last(m.norm(m.conv(x)) * m.norm(m.conv(x))),
    "an output": lambda m, x: (m.last(h := m.norm(m.conv(x))), h),
    "an output in a dataclass": lambda m, x: Output(m.last(h := m.norm(m.conv(x))), h),
    "an output in some object": lambda m, x: SimpleNamespace(made=m.last(h := m.norm(m.conv(x))), features=h),
    "assigned to a part of a tensor": lambda m, x: m.last(h := m.norm(m.conv(x))) + assigned(h).amax(),
    "a second reader": lambda m, x: m.last(h := m.norm(m.conv(x))) + h.amax(),
    "a layer that gets other inputs too": lambda m, x: m.last(m.norm(m.conv(x))) + m.last(x[:, [0, 1, 2, 0]]),
    "a clamp before a sum": lambda m, x: m.last(F.relu6(m.norm(m.conv(x))) + m.other(x)),
    "dropout in training": lambda m, x: m.last(F.dropout(m.norm(m.conv(x)), 0.5, True)),
    "changed in place": lambda m, x: m.last(m.norm(m.conv(x)).exp_()),
    "rolled": lambda m, x: m.last(m.norm(m.conv(x)).roll(1, 1)),
    "another norm": lambda m, x: m.last(F.group_norm(m.norm(m.conv(x)), 2)),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_must_not_be_multiplied(case: str) -> None:
    assert found(lq.prepare(built(Between, between=CASES[case]), "int8"), *images()) == []


def test_another_batch_may_show_another_reader() -> None:
    def between(m: Any, x: Tensor) -> Tensor:
        h = m.norm(m.conv(x))
        return m.last(h) if len(x) == 4 else m.last(h) + h.amax()

    model = lq.prepare(built(Between, between=between), "int8")
    assert names(found(model, *images())) == [(("norm",), ("last",), math.inf)]
    assert found(model, *images(), randn(1, 3, 8, 8)) == []


def plain(m: Any, x: Tensor) -> Tensor:
    return m.last(m.norm(m.conv(x)))


def shared_weight(model: Any) -> None:
    model.other.weight = model.last.weight


def without_affine(model: Any) -> None:
    model.norm = nn.BatchNorm2d(4, affine=False)


class OwnForward(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.sigmoid())


def own_forward(model: Any) -> None:
    model.last = OwnForward(4, 2, 1)


def pruned(model: Any) -> None:
    nn.utils.prune.l1_unstructured(model.last, "weight", 1)


def transposed(model: Any) -> None:
    model.last = nn.ConvTranspose2d(4, 2, 1)


@pytest.mark.parametrize("change", [shared_weight, without_affine, own_forward, pruned, transposed])
def test_layers_that_cannot_be_multiplied(change: Callable[[Any], None]) -> None:
    model = built(Between, between=plain)
    assert len(found(lq.prepare(built(Between, between=plain), "int8"), *images())) == 1
    change(model)
    assert found(lq.prepare(model.eval(), "int8"), *images()) == []


def test_frozen_scales_stay() -> None:
    model = lq.prepare(built(Between, between=plain), "int8")
    model.last.weight_quantizer.set_frozen(True, model.last.weight)
    assert found(model, *images()) == []

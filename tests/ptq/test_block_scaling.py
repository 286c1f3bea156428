"""Scaling a block: it computes what it did, its statistics are those of a new pass, and weights are easier to round."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from tensors import randn
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_qat as lq
from lightning_qat.nn import QATLayer
from lightning_qat.ptq.awq import AWQOptions
from lightning_qat.ptq.block_scaling import BlockScaling, scale_block
from lightning_qat.ptq.chosen import output_error
from lightning_qat.ptq.nearest import choose_nearest
from lightning_qat.ptq.smoothing import SmoothingOptions
from lightning_qat.ptq.statistics import InputStatistics
from lightning_qat.ptq.watch import Run, find_shared_inputs, gather_statistics
from lightning_qat.transforms.phase import float_forward

FOLDED = AWQOptions(keep_scales=False)
# Symmetric groups have their extreme between two codes: the last place of a scale decides which.
INT4 = lq.QATConfig("int4", symmetric=False, group_size=16, activation_bits=None)


class Block(nn.Module):
    """A gated feed-forward block whose norm makes some channels large, and a GELU that no scale gets through."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.RMSNorm(32)
        self.norm.weight.data = randn(32).exp() ** 2
        self.gate, self.up = nn.Linear(32, 48), nn.Linear(32, 48)
        self.down = nn.Linear(48, 32)
        self.behind, self.last = nn.Linear(32, 48), nn.Linear(48, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        h = self.down(F.silu(self.gate(h)) * self.up(h))
        return self.last(F.gelu(self.behind(torch.tanh(h))))


def prepared(config: lq.QATConfig = INT4) -> tuple[Block, dict[str, QATLayer], list[Tensor]]:
    block = lq.prepare(Block(), config).eval()
    layers = {name: module for name, module in block.named_modules() if isinstance(module, QATLayer)}
    return block, layers, [randn(4, 20, 32, seed=i) for i in range(3)]


def statistics_of(block: Block, layers: dict[str, QATLayer], batches: list[Tensor]) -> dict[str, InputStatistics]:
    def runs() -> Iterator[Run]:
        return (partial(block, batch) for batch in batches)

    with float_forward(block), torch.no_grad():
        return gather_statistics(layers, find_shared_inputs(layers, next(runs())), runs)


def scaled(block: Block, layers: dict[str, QATLayer], batches: list[Tensor], *options: object) -> BlockScaling:
    with float_forward(block), torch.no_grad():
        groups = [shared.layers for shared in find_shared_inputs(layers, lambda: block(batches[0]))]
    seen = statistics_of(block, layers, batches)
    return scale_block(block, layers, groups, seen, lambda: block(batches[0]), *options)


@pytest.mark.parametrize(
    ("config", "options"), [(INT4, AWQOptions()), (INT4, AWQOptions(codes="gptq")), ("int8", SmoothingOptions())]
)
def test_the_block_computes_what_it_did_and_statistics_follow(config: object, options: object) -> None:
    block, layers, batches = prepared(config)
    with float_forward(block):
        expected = [block(batch) for batch in batches]
    found = scaled(block, layers, batches, options)
    with float_forward(block):
        for batch, output in zip(batches, expected, strict=True):
            assert torch.allclose(block(batch), output, rtol=1e-4, atol=1e-5)
    sources = {group.fold.layers: group.fold.source and group.fold.source.name for group in found.groups}
    assert sources == {("gate", "up"): "norm", ("down",): "up", ("behind",): None, ("last",): None}
    assert set(found.changed) <= {"norm", "up"}
    assert "norm" in found.changed
    again = statistics_of(block, layers, batches)
    for name, seen in found.statistics.items():
        largest = float(again[name].gram.abs().max())
        assert torch.allclose(seen.gram, again[name].gram, rtol=1e-3, atol=1e-4 * largest)
        assert torch.allclose(seen.mean_magnitude, again[name].mean_magnitude, rtol=1e-4, atol=1e-6)
        assert torch.allclose(seen.max_magnitude, again[name].max_magnitude, rtol=1e-4, atol=1e-6)
        assert seen.count == again[name].count


def test_losses_are_those_of_the_layers_rounded_to_nearest() -> None:
    block, layers, batches = prepared()
    seen = statistics_of(block, layers, batches)
    plain = {
        name: choose_nearest(layer.weight.detach(), seen[name].gram, layer.weight_quantizer.format).loss
        for name, layer in layers.items()
    }
    found = scaled(block, layers, batches, FOLDED)
    by_layer = {name: group for group in found.groups for name in group.fold.layers}
    for names in (("gate", "up"), ("down",)):
        losses = []
        for name in names:
            weight, fmt = layers[name].weight.detach(), layers[name].weight_quantizer.format
            chosen = choose_nearest(weight, found.statistics[name].gram, fmt)
            # The rows of "up" were divided once more, by the scales of what reads them.
            rows = by_layer["down"].scales.unsqueeze(1) if name == "up" else 1.0
            losses.append(output_error(weight * rows, chosen.values() * rows, found.statistics[name].gram))
        group = by_layer[names[0]]
        assert group.plain_loss == pytest.approx(sum(plain[n] for n in names), rel=1e-3)
        assert group.loss == pytest.approx(sum(losses), rel=1e-3)
        assert group.loss < group.plain_loss
    assert found.notes["gate"].startswith("scale in 'norm': 0.")
    assert found.notes["last"] == "no scale: no module before it multiplies its inputs one by one"


def test_given_grids_and_scales_of_whole_tensors_stay() -> None:
    block, layers, batches = prepared()
    layers["gate"].weight_quantizer.set_frozen(True, layers["gate"].weight)
    layers["up"].weight_quantizer.set_frozen(True, layers["up"].weight)
    before = {name: p.detach().clone() for name, p in block.named_parameters()}
    found = scaled(block, layers, batches, FOLDED)
    assert found.notes["gate"] == "no scale: the scales of 'gate' are given"
    assert found.notes["down"] == "no scale: no module before it multiplies its inputs one by one"  # 'up' must stay
    assert found.changed == {}
    assert all(torch.equal(p, before[name]) for name, p in block.named_parameters())
    block, layers, batches = prepared(lq.QATConfig("int8", activation_bits=None))
    sources = [group.fold.source for group in scaled(block, layers, batches, FOLDED).groups]
    assert [source and source.name for source in sources] == ["norm", None, None, None]


def test_layers_without_statistics_are_left_alone() -> None:
    block, layers, batches = prepared()
    seen = statistics_of(block, layers, batches)
    del seen["down"]
    found = scale_block(block, layers, [("gate", "up"), ("down",)], seen, lambda: block(batches[0]))
    assert found.groups[0].scales is not None
    assert found.notes["down"] == "no scale: 'down' got no input, or one without a Gram matrix"


def test_smoothing_is_for_inputs_that_are_quantized() -> None:
    block, layers, batches = prepared()
    found = scaled(block, layers, batches, SmoothingOptions())
    assert found.changed == {}
    assert found.notes["gate"] == "no scale: inputs that stay in float need no smoothing"
    losses = []
    for bits in (4, 8):
        block, layers, batches = prepared(lq.QATConfig("int8", per_channel=True, activation_bits=bits))
        losses.append(scaled(block, layers, batches, SmoothingOptions()).groups[0].plain_loss)
    assert losses[0] > 50 * losses[1]


def test_the_users_parameters_stay() -> None:
    block, layers, batches = prepared()
    own = {name: (p, p.detach().clone()) for name, p in block.named_parameters()}
    scaled(block, layers, batches)
    assert all(torch.equal(parameter, value) for parameter, value in own.values())
    assert not torch.equal(block.norm.weight, own["norm.weight"][1])

"""Blocks run alone get what they get in the whole model."""

from __future__ import annotations

import pytest
import torch
from ptq_models import MODELS, EncoderDecoder, Llama, MobileNet, ViT, built, images, pairs, tokens
from tensors import randn
from torch import nn

import lightning_qat as lq
from lightning_qat.ptq.blocks import SegmentRunner, find_blocks, watch_course
from lightning_qat.transforms.calibrate import _call


def course_of(model, batch):
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    return watch_course(model, layers, find_blocks(model, layers), lambda: _call(model, batch))


def names(course):
    return [[block.name for block in segment.blocks] for segment in course.segments]


def test_llama() -> None:
    course = course_of(built(Llama), tokens()[0])
    assert names(course) == [["layers.0", "layers.1", "layers.2"]]
    assert course.outside == ((), ("lm_head",))
    assert course.unreached == ()
    assert course.segments[0].blocks[1].layers[:2] == ("layers.1.q_proj", "layers.1.k_proj")


def test_a_network_of_stages() -> None:
    course = course_of(built(MobileNet), images()[0])
    assert names(course) == [["features.0", "features.1", "features.2", "features.3"]]
    assert course.outside == ((), ("classifier.1",))


def test_two_lists() -> None:
    course = course_of(built(EncoderDecoder), pairs()[0])
    assert names(course) == [["encoder.0", "encoder.1"], ["decoder.0", "decoder.1"]]
    assert course.outside == (("first",), ("second",), ("head",))
    assert course.unreached == ()  # "encoder.0.b" is in a block that was reached


def test_what_is_no_block() -> None:
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.items = nn.ModuleList(nn.Sequential(nn.Linear(3, 3)) for _ in range(2))

        def forward(self, x):
            return self.items[0](self.items[1](self.items[0](x)))

    course = course_of(Recurrent(), randn(2, 3))
    assert names(course) == [["items.1"]]
    assert course.outside == ((), ("items.0.0",))
    flat = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    assert names(course_of(flat, randn(2, 3))) == []
    assert course_of(flat, randn(2, 3)).outside == (("0", "2"),)


def test_a_block_that_is_skipped_breaks_the_chain() -> None:
    class Dense(nn.Module):
        """The third block gets what the first two made, in a sum."""

        def __init__(self):
            super().__init__()
            self.items = nn.ModuleList(nn.Sequential(nn.Linear(3, 3), nn.ReLU()) for _ in range(4))

        def forward(self, x):
            first = self.items[0](x)
            second = self.items[1](first)
            return self.items[3](self.items[2](first + second))

    assert names(course_of(Dense(), randn(2, 3))) == [["items.0", "items.1"], ["items.2", "items.3"]]


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_every_block_gets_what_it_gets_in_the_model(kind) -> None:
    made, batches = MODELS[kind]
    model, batches = built(made), batches()
    if made is ViT:
        model.encoder.layers[0].activation_relu_or_gelu = model.encoder.layers[1].activation_relu_or_gelu = 0
    course = course_of(model, batches[0])
    assert course.segments
    expected: dict[str, list] = {}
    handles = []
    for segment in course.segments:
        for block in segment.blocks:
            see = lambda _m, _a, out, name=block.name: expected.setdefault(name, []).append(  # noqa: E731
                (out[0] if isinstance(out, tuple) else out).clone()
            )
            handles.append(block.module.register_forward_hook(see))
    for batch in batches:
        _call(model, batch)
    for handle in handles:
        handle.remove()
    for segment in course.segments:
        runner = SegmentRunner(segment, [lambda batch=batch: _call(model, batch) for batch in batches])
        for block in segment.blocks:
            for _ in range(2):  # running changes nothing that the next run gets
                found = [run() for run in runner.runs()]
                for actual, right in zip(found, expected[block.name], strict=True):
                    assert torch.equal(actual[0] if isinstance(actual, tuple) else actual, right)
            if block is not segment.blocks[-1]:
                runner.advance()


def test_a_batch_that_takes_another_way() -> None:
    class Choosing(nn.Module):
        def __init__(self):
            super().__init__()
            self.items = nn.ModuleList(nn.Sequential(nn.Linear(3, 3), nn.ReLU()) for _ in range(2))

        def forward(self, x):
            return x if len(x) == 1 else self.items[1](self.items[0](x))

    model = Choosing()
    course = course_of(model, randn(2, 3))
    batches = [randn(rows, 3, seed=rows) for rows in (1, 2, 1, 4)]
    runner = SegmentRunner(course.segments[0], [lambda x=x: model(x) for x in batches])
    runner.advance()
    found = [run() for run in runner.runs()]
    assert len(found) == 2  # the others are none of the blocks' inputs
    for actual, x in zip(found, (batches[1], batches[3]), strict=True):
        assert torch.equal(actual, model(x))


def test_batches_that_call_a_block_differently_are_told() -> None:
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(3, 3)

        def forward(self, x, mask=None):
            return self.inner(x) if mask is None else self.inner(x) * mask

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.items = nn.ModuleList(Masked() for _ in range(2))

        def forward(self, x, **options):
            for item in self.items:
                x = item(x, **options)
            return x

    model, x = Model(), randn(2, 3)
    course = course_of(model, {"x": x, "mask": x})
    runs = [lambda: model(x, mask=x), lambda: model(x)]
    with pytest.raises(ValueError, match=r"the block 'items\.0' with other arguments.*order='one_pass'"):
        SegmentRunner(course.segments[0], runs)


class Kept:
    """What blocks write as they run: the keys of each, and the last ones for whoever shares them."""

    def __init__(self):
        self.of_layer, self.last = {}, None

    def update(self, layer, keys):
        before = self.of_layer.get(layer)
        self.of_layer[layer] = keys if before is None else torch.cat([before, keys], 1)
        self.last = self.of_layer[layer]
        return self.last


class Attending(nn.Module):
    def __init__(self, index):
        super().__init__()
        self.index, self.shares = index, index == 2
        self.keys, self.mixes = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x, kept):
        keys = kept.last if self.shares else kept.update(self.index, self.keys(x))
        return x + self.mixes((x @ keys.mT).view(len(x), x.shape[1], x.shape[1]).softmax(-1) @ keys)


class Keeping(nn.Module):
    """As XLM, which always makes a cache, and Gemma 3n, whose later layers share the keys of earlier ones."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Attending(i) for i in range(3))

    def forward(self, x):
        kept = Kept()
        for layer in self.layers:
            x = layer(x, kept)
        return x


@pytest.mark.parametrize("order", ["blocks", "sublayers"])
@torch.no_grad()
def test_what_blocks_keep_in_an_object_is_as_in_one_forward(order):
    batches = [randn(2, 5, 8, seed=i) for i in range(2)]
    seen = []
    model = built(Keeping)

    def runs():
        return (lambda batch=batch: _call(model, batch) for batch in batches)

    runner = SegmentRunner(course_of(model, batches[0]).segments[0], runs())
    for index, layer in enumerate(model.layers):
        handle = layer.register_forward_hook(lambda _m, _a, output: seen.append(output))
        for _ in range(2):  # statistics of several parts of a block
            for run in runner.runs():
                run()
        expected = len(seen)
        for batch in batches:
            model(batch)
        handle.remove()
        assert expected == 4
        assert all(torch.equal(a, b) for a, b in zip(seen[:4], 2 * seen[4:], strict=True))
        seen.clear()
        if index < 2:
            runner.advance()
    plan = lq.QuantizationPlan([lq.LayerRule("layers.2.keys")], base=lq.QuantizationConfig("gptq", group_size=8))
    lq.quantize_model(model, plan, batches, options=lq.PTQOptions(order=order))

"""Residual blocks: a sum is added up when it is read, and nobody can tell, but by the number of passes."""

from __future__ import annotations

import weakref
from functools import lru_cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from regions import converted, module_by_module
from tensors import randn
from torch import nn
from torch.nn import functional as F

import lightning_qat as lq
from lightning_qat.nn import conv_kernel, region_functions, region_sum
from lightning_qat.nn.conv_kernel import ConvKernel
from lightning_qat.ops.integer_conv import conv_is_exact
from lightning_qat.tasks.resnet import SmallResNet

pytestmark = pytest.mark.skipif(not conv_is_exact(), reason="this CPU has no exact integer kernel")


@pytest.fixture
def passes(monkeypatch):
    """What went over memory, in order: convolutions, additions with codes and without, quantization alone."""
    seen = []

    def note(owner, name, as_what):
        function = getattr(owner, name)

        def noted(*args, **kwargs):
            seen.append(as_what)
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, noted)

    note(ConvKernel, "run", "conv")
    note(region_sum, "add_quantized", "sum and codes")
    note(region_sum, "add_clamped", "sum")
    note(conv_kernel, "quantize_unsigned", "codes")
    note(region_functions, "_add_now", "added at once")
    note(region_functions, "_add_in_place_now", "added at once")
    return seen


class Block(nn.Module):
    """A residual block that ends in ``end(conv(x), shortcut(x))``; then two readers of that."""

    def __init__(self, end, projects=False):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.conv = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.shortcut = nn.Conv2d(8, 8, 1) if projects else nn.Identity()
        self.next, self.beside = nn.Conv2d(8, 4, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.end = end

    def forward(self, x):
        x = torch.relu(self.stem(x))
        y = self.end(self.conv(x), self.shortcut(x))
        return self.next(y) + self.beside(y)


def in_place(y, x):
    y += x
    return F.relu(y, inplace=True)


ENDS = {
    "relu": lambda y, x: torch.relu(y + x),
    "other order": lambda y, x: torch.relu(x + y),
    "no relu": lambda y, x: y + x,
    "in place": in_place,
    "relu6": lambda y, x: F.relu6(torch.add(y, x), inplace=True),
    "hardtanh": lambda y, x: F.hardtanh(y.add(x), -0.1, 0.2),
    "add_": lambda y, x: y.add_(x).relu_(),
    "relu before": lambda y, x: torch.relu(y) + x,
}


@pytest.mark.parametrize("projects", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("end", ENDS)
def test_a_block_ends_in_one_pass(end, layout, projects, passes):
    x = randn(2, 3, 9, 11).to(memory_format=layout)
    model = converted(Block(ENDS[end], projects), x)
    expected = module_by_module(model, x)
    passes.clear()
    with torch.no_grad():
        actual = model(x)
    assert actual.stride() == expected.stride()
    assert torch.equal(actual, expected)
    # The image's codes, the stem for both sides, its codes, the projection; the block's end; two layers that read it.
    first = ["codes", "conv", "codes", *["conv"] * projects]
    assert sorted(passes[: len(first)]) == sorted(first)
    assert passes[len(first) :] == ["conv", "sum and codes", "conv", "conv", "sum"]


def test_readers_of_other_grids_quantize_on_their_own(passes):
    x = randn(2, 3, 9, 11)
    model = converted(Block(ENDS["relu"]), x)
    model.beside.input_scale.mul_(1.5)
    expected = module_by_module(model, x)
    passes.clear()
    with torch.no_grad():
        assert torch.equal(model(x), expected)
    assert passes == ["codes", "conv", "codes", "conv", "sum and codes", "codes", "conv", "conv", "sum"]


def test_what_else_stands_after_a_sum(passes):
    """Codes of the sum are not those of what pools it, or of what is clamped twice."""
    x = randn(2, 3, 9, 11)
    for end in (
        lambda y, x: F.max_pool2d(torch.relu(y + x), 3, 1, 1),
        lambda y, x: F.max_pool2d(y + x, 2),
        lambda y, x: F.hardtanh(torch.relu(y + x), 0.1, 0.2),
        lambda y, x: torch.flatten(torch.relu(y + x), 1).view_as(x),
        lambda y, x: y + x + x,
    ):
        model = converted(Block(end), x)
        expected = module_by_module(model, x)
        passes.clear()
        with torch.no_grad():
            assert torch.equal(model(x), expected)
        assert passes.count("conv") == 4


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("plan", ["int8", "w4a4", lq.QATConfig("int8", activation_symmetric=True)])
def test_a_residual_network_has_the_bits_it_had(plan, batch, monkeypatch):
    x = randn(batch, 3, 16, 16)
    model = converted(SmallResNet(3, 10, widths=(8, 16), blocks=2), x, plan)
    with torch.no_grad():
        actual = model(x)
        monkeypatch.setattr(region_functions, "_both_wait", lambda a, b: False)
        assert torch.equal(model(x), actual)


@pytest.mark.parametrize("turned", [False, True])
def test_a_sum_that_lives_on_is_added_up_once(turned, passes):
    """As where the activation comes before the convolutions: the sum goes on beside them."""

    class Before(Block):
        def forward(self, x):
            x = self.stem(x)
            x = x + self.conv(F.relu(x))
            y = F.relu6(x)
            y = self.beside(x) + self.next(y) if turned else self.next(y) + self.beside(x)
            return y + x.mean((1, 2, 3), keepdim=True)

    x = randn(2, 3, 9, 11)
    model = converted(Before(None), x)
    expected = module_by_module(model, x)
    passes.clear()
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=1e-6, atol=1e-6)  # means depend on the layout
    assert passes.count("conv") == 5  # the stem's for each side of the sum
    assert "sum and codes" not in passes


def test_nothing_is_held_after_the_sum():
    """The convolution and the shortcut's floats go when the sum is there."""
    x = randn(2, 3, 9, 11)
    held = []

    def end(y, x):
        total = y + x
        held.append(weakref.ref(total._sum))
        return total

    model = converted(Block(lambda y, x: y + x), x)
    model.end = end
    model.next.register_forward_hook(lambda *_: held.append(held[0]() is None))
    with torch.no_grad():
        model(x)
    assert held[1] is True


def test_a_kept_tensor_is_what_it_was(passes):
    """A hook keeps the input of every block: each holds floats of its own."""
    x = randn(2, 3, 16, 16)
    model = converted(SmallResNet(3, 10, widths=(8, 16), blocks=2), x)
    for module in model.modules():
        if hasattr(module, "feeds_one_layer"):
            module.feeds_one_layer = False
    kept = []
    for block in model.stages:
        block.register_forward_hook(lambda _m, args, output: kept.extend((args[0], output)))
    expected, _ = module_by_module(model, x), kept.clear()
    reference = [module_by_module(nn.Sequential(model.stem, *list(model.stages)[:n]), x) for n in range(5)]
    kept.clear()
    with torch.no_grad():
        assert torch.equal(model(x), expected)
    assert "sum and codes" in passes
    for one, n in zip(kept, (0, 1, 1, 2, 2, 3, 3, 4), strict=True):
        assert torch.equal(one + 0, reference[n])


# --------------------------------------------------------------------------------------------- whatever the code does
class Program(nn.Module):
    """Runs any steps over tensors that all have one shape."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))
        self.steps = [("conv", 0, 0), ("conv", 1, 1), ("conv", 2, 0)]

    def forward(self, x):
        pool = [self.stem(x)]
        for name, i, j in self.steps:
            a, b = pool[i % len(pool)], pool[j % len(pool)]
            if name == "conv":
                pool.append(self.convs[j % 2](a))
            elif name == "drop":
                del pool[: min(i % 3, len(pool) - 1)]
            else:
                result = STEPS[name](a, b)
                pool.extend([] if result is None else [result])
            del a, b
        return tuple(pool)


def _written(a, b):
    a.numpy()[:, 0] = 1


def _changed(a, b):
    a *= 0.5


def _added(a, b):
    a += b


def _under_a_view(change):
    def step(a, b):
        view = a.flatten(1)
        change(a, b)
        return view.view_as(a)

    return step


STEPS = {
    "plus": lambda a, b: a + b,
    "relu of sum": lambda a, b: torch.relu(a + b),
    "relu": lambda a, b: F.relu(a),
    "clamp": lambda a, b: F.hardtanh(a, -0.2, 0.3),
    "pool": lambda a, b: F.max_pool2d(a, 3, 1, 1),
    "leaky relu": lambda a, b: F.leaky_relu(a),
    "by channel": lambda a, b: a + b[:, :, :1, :1].clone(),
    "times": lambda a, b: a * b,
    "copy": lambda a, b: a.clone(),
    "relu in place": lambda a, b: F.relu(a, inplace=True) is None or None,
    "clamp in place": lambda a, b: F.relu6(a, inplace=True) is None or None,
    "added": _added,
    "changed": _changed,
    "written": _written,
    "looked at": lambda a, b: a.sum() is None or None,
    "view": lambda a, b: a.flatten(1).view_as(a),
    "added under a view": _under_a_view(_added),
    "clamped under a view": _under_a_view(lambda a, b: F.relu(a, inplace=True)),
    "view changed": lambda a, b: a.view(len(a), -1).relu_() is None or None if a.is_contiguous() else None,
}


@lru_cache(maxsize=1)
def program():
    model = converted(Program(), randn(2, 3, 5, 6))
    for module in model.modules():
        if hasattr(module, "feeds_one_layer"):
            module.feeds_one_layer = False  # floats are quantized then: equal bits
    return model


_STEP = st.sampled_from(("conv", "conv", "plus", "plus", "added", "relu of sum", "drop", *STEPS))


@settings(max_examples=400, deadline=None)
@given(
    st.lists(st.tuples(_STEP, st.integers(0, 7), st.integers(0, 7)), max_size=16),
    st.booleans(),
    st.integers(1, 3),
    st.sampled_from((torch.no_grad, torch.inference_mode)),
)
def test_any_program_gives_what_it_gives_without_regions(steps, channels_last, batch, mode):
    model, x = program(), randn(batch, 3, 5, 6)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    model.steps = steps
    expected = module_by_module(model, x)
    with mode():
        actual = model(x)
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        assert type(one) is torch.Tensor
        assert torch.equal(one, other)
        assert one.stride() == other.stride()


def test_nan_and_infinities_of_a_shortcut_go_through():
    def end(y, x):
        x[0, 0, 0, 0], x[0, 1, 0, 0], x[0, 2, 0, 0] = float("nan"), float("inf"), -float("inf")
        return torch.relu(y + (x * 1))

    x = randn(2, 3, 9, 11)
    model = converted(Block(lambda y, x: torch.relu(y + (x * 1))), x)
    model.end = end
    expected = module_by_module(model, x)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=0, atol=0, equal_nan=True)

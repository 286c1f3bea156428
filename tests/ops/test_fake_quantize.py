"""The definition against independent witnesses, and every fast path against the definition."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import prod
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_qat.native.library import without_native
from lightning_qat.ops import layout
from lightning_qat.ops.fake_quantize import (
    EDGE,
    fake_quantize,
    fake_quantize_backward_op,
    fake_quantize_op,
    quant_range,
    reference_fake_quantize,
    reference_fake_quantize_backward,
)

#: What turns the compiled kernels off, or nothing.
Around = Callable[[], AbstractContextManager[None]]

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
GRANULARITIES = ("tensor", "channel", "group", "token")
LAYOUTS = ("contiguous", "reversed", "channels_last", "sliced", "expanded")
SPECIAL_VALUES = (float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-38, 1e30)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill ``torch.empty`` with NaN, so that an element nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@dataclass(frozen=True)
class Case:
    x: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bits: int
    symmetric: bool
    axis: int | None
    group_size: int | None
    block: int
    seed: int

    def randn(self) -> Tensor:
        """Return a gradient for ``x``, the same one each time."""
        return torch.randn(self.x.shape, generator=torch.Generator().manual_seed(self.seed + 1)).to(self.x.dtype)

    @property
    def options(self) -> dict[str, Any]:
        return {"bits": self.bits, "symmetric": self.symmetric, "axis": self.axis, "group_size": self.group_size}

    @property
    def op_arguments(self) -> tuple[Any, ...]:
        axis, group = layout.resolve_layout(self.x, self.scale, self.zero_point, self.axis, self.group_size)
        return (self.x, self.scale, self.zero_point, *quant_range(self.bits, self.symmetric), axis, group)

    def spread(self, parameter: Tensor) -> Tensor:
        """Return a scale or zero point with one float32 element for each of ``x``, by counting rows and runs."""
        flat, x = parameter.detach().flatten().to(torch.float32), self.x
        if self.axis is not None:
            return flat.reshape([-1 if d == self.axis % x.dim() else 1 for d in range(x.dim())]).expand(x.shape)
        run = self.group_size or (x.numel() if flat.numel() == 1 else x.shape[-1])
        return flat.repeat_interleave(run).reshape(x.shape)


def relayout(x: Tensor, kind: str) -> Tensor:
    """Return the same values in another memory layout."""
    if kind == "reversed":
        backwards = list(reversed(range(x.dim())))
        return x.permute(backwards).contiguous().permute(backwards)
    if kind == "channels_last" and x.dim() == 4:
        return x.to(memory_format=torch.channels_last)
    if kind == "sliced" and x.dim():
        return x.repeat_interleave(2, dim=-1)[..., ::2]
    if kind == "expanded" and x.dim():
        return x[:1].expand(x.shape)
    return x


@st.composite
def cases(draw: st.DrawFn, min_size: int = 0, dtypes: tuple[torch.dtype, ...] = FLOAT_DTYPES) -> Case:
    granularity = draw(st.sampled_from(GRANULARITIES))
    ndim = draw(st.integers({"tensor": 0, "channel": 1, "group": 1, "token": 2}[granularity], 4))
    shape = draw(st.lists(st.integers(min_size, 7), min_size=ndim, max_size=ndim))
    if ndim:
        shape[draw(st.integers(0, ndim - 1))] *= draw(st.sampled_from((1, 1, 19)))
    bits, symmetric = draw(st.integers(2, 16)), draw(st.booleans())
    seed = draw(st.integers(0, 2**32))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    for value in draw(st.lists(st.sampled_from(SPECIAL_VALUES), max_size=4)) if x.numel() else ():
        x.view(-1)[draw(st.integers(0, x.numel() - 1))] = value
    axis = group_size = None
    count: list[int] = draw(st.sampled_from(([], [1])))
    if granularity == "channel":
        axis = draw(st.integers(-ndim, ndim - 1))
        kept = [shape[axis] if d == axis % ndim else 1 for d in range(ndim)]
        count = draw(st.sampled_from(([shape[axis]], kept)))
    elif granularity == "group":
        row = prod(shape[1:]) if ndim > 1 else x.numel()
        group_size = draw(st.sampled_from([d for d in range(1, row + 1) if row % d == 0] or [1]))
        count = [shape[0], row // group_size] if ndim > 1 else [row // group_size]
    elif granularity == "token":
        count = [*shape[:-1], 1]
    quant_min, quant_max = quant_range(bits, symmetric)
    scale = (torch.rand(count, generator=generator) * 4 + 0.5) / (quant_max - quant_min)
    zero_point = None
    if not symmetric and draw(st.booleans()):
        zero_point = torch.randint(quant_min, quant_max + 1, count, generator=generator, dtype=torch.int32)
        if draw(st.booleans()):
            zero_point = zero_point + torch.rand(count, generator=generator)
    x = relayout(x.to(draw(st.sampled_from(dtypes))), draw(st.sampled_from(LAYOUTS)))
    block = draw(st.sampled_from((1, 7, 64, 2**21)))
    return Case(x, scale, zero_point, bits, symmetric, axis, group_size, block, seed)


def blocks_of(elements: int) -> AbstractContextManager[object]:
    """Let the CPU kernels work in blocks of so many elements, so that small tensors take several."""
    return mock.patch.multiple(layout, _BLOCK_ELEMENTS=elements, _SCRATCH_ELEMENTS=elements)


def assert_same_bits(actual: Tensor, expected: Tensor, where: Tensor | None = None) -> None:
    """Check shape, dtype, NaNs and every bit of the rest, the sign of zero included."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    wrong = (actual != expected) | (torch.signbit(actual) != torch.signbit(expected))
    wrong = torch.where(expected.isnan(), ~actual.isnan(), wrong)
    if where is not None:
        wrong = wrong & where
    assert not wrong.any(), (actual[wrong], expected[wrong])


def numpy_codes(case: Case) -> np.ndarray:
    """Return the codes in plain float32 numpy arithmetic."""
    quant_min, quant_max = quant_range(case.bits, case.symmetric)
    zero = 0.0 if case.zero_point is None else np.rint(case.spread(case.zero_point).numpy())
    with np.errstate(over="ignore"):
        ratio = case.x.to(torch.float32).numpy() / case.spread(case.scale).numpy()
    return np.clip(np.rint(ratio) + zero, quant_min, quant_max)


# --- the definition against witnesses -------------------------------------------------------------


@given(cases())
@settings(max_examples=300, deadline=None)
def test_values_equal_plain_numpy_float32(case: Case) -> None:
    codes = numpy_codes(case)
    zero = np.float32(0.0) if case.zero_point is None else np.rint(case.spread(case.zero_point).numpy())
    expected = torch.from_numpy(np.asarray((codes - zero) * case.spread(case.scale).numpy(), dtype=np.float32))
    actual = fake_quantize(case.x, case.scale, case.zero_point, **case.options)
    torch.testing.assert_close(actual, expected.to(case.x.dtype), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(actual.isnan(), case.x.isnan())


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize(("bits", "symmetric"), [(8, True), (4, True), (2, True), (8, False), (3, False)])
def test_agrees_with_torch_at_power_of_two_scales(bits: int, symmetric: bool, per_channel: bool) -> None:
    # Its multiplication by the reciprocal is exact there. Its gradient has no 2**-10 of slack at the edges.
    quant_min, quant_max = quant_range(bits, symmetric)
    x = torch.cat((torch.randn(5, 997), torch.arange(-997, 998, 2).expand(5, -1) / 16), dim=1).requires_grad_()
    scale = torch.tensor([0.25, 0.5, 2.0**-6, 1.0, 4.0]) / 2 ** (bits - 4)
    zero_point = None if symmetric else torch.tensor([0, 1, quant_max, 3, 2], dtype=torch.int32)
    zero = torch.zeros(5, dtype=torch.int32) if zero_point is None else zero_point
    options: dict[str, Any] = {"bits": bits, "symmetric": symmetric}
    if per_channel:
        expected = torch.fake_quantize_per_channel_affine(x, scale, zero, 0, quant_min, quant_max)
        actual = fake_quantize(x, scale, zero_point, axis=0, **options)
    else:
        scale, zero = scale[2], zero[1]
        expected = torch.fake_quantize_per_tensor_affine(x, float(scale), int(zero), quant_min, quant_max)
        actual = fake_quantize(x, scale, None if symmetric else zero, **options)
    assert torch.equal(actual, expected)
    grad = torch.randn_like(x)
    ratio = x.detach() / scale.reshape(-1, 1) + zero.reshape(-1, 1)
    inner = ((ratio - quant_min + 0.5).abs() > 2**-9) & ((ratio - quant_max - 0.5).abs() > 2**-9)
    actual_grad, expected_grad = (torch.autograd.grad(y, x, grad)[0] for y in (actual, expected))
    assert torch.equal(actual_grad[inner], expected_grad[inner])


def lsq(case: Case, x: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """Return LSQ's fake quantization written so that autograd finds its gradients."""
    quant_min, quant_max = quant_range(case.bits, case.symmetric)
    index = case.spread(torch.arange(scale.numel()).reshape(scale.shape)).long()
    step = scale.flatten()[index]
    zero = torch.zeros(()) if zero_point is None else zero_point.float().flatten()[index]
    zero = zero + (zero.round() - zero).detach()
    ratio = x / step
    inside = (x > (quant_min - zero - EDGE) * step) & (x < (quant_max - zero + EDGE) * step)
    codes = (ratio.round() + zero).clamp(quant_min, quant_max).detach()
    straight_through = (ratio + (codes - zero - ratio).detach()) * step
    return torch.where(inside, straight_through, (codes - zero) * step)


@given(cases(min_size=1, dtypes=(torch.float32,)))
@settings(max_examples=150, deadline=None)
def test_gradients_equal_autograd_through_lsq(case: Case) -> None:
    x = torch.where(case.x.abs() < 1e20, case.x, torch.ones(())).requires_grad_()
    scale = case.scale.clone().requires_grad_()
    zero_point = case.zero_point
    wanted = [x, scale]
    if zero_point is not None and zero_point.is_floating_point():
        zero_point = zero_point.clone().requires_grad_()
        wanted.append(zero_point)
    grad = case.randn()
    expected = torch.autograd.grad(lsq(case, x, scale, zero_point), wanted, grad)
    with blocks_of(case.block):
        actual = torch.autograd.grad(fake_quantize(x, scale, zero_point, **case.options), wanted, grad)
    # The witness multiplies the gradient by the scale and divides by it again.
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-6, atol=0)
    # It finds code - ratio, at most 0.5, as the difference of numbers up to the largest code.
    atol = 2.5e-7 * 2**case.bits * float(grad.abs().sum())
    torch.testing.assert_close(actual[1:], expected[1:], rtol=1e-6, atol=atol)


@given(st.integers(2, 7), st.floats(2.0**-100, 2.0**100, width=32))
@settings(max_examples=300, deadline=None)
def test_largest_weight_keeps_its_gradient_below_8_bits(bits: int, absmax: float) -> None:
    scale = torch.tensor(absmax) / (2 ** (bits - 1) - 0.5)
    for rows in (1, 2):
        x = torch.tensor([[absmax, -absmax, absmax / 3, 1.01 * absmax]] * rows).requires_grad_()
        y = fake_quantize(x, scale.expand(rows).contiguous(), bits=bits, axis=0)
        assert torch.autograd.grad(y.sum(), x)[0].tolist() == [[1.0, 1.0, 1.0, 0.0]] * rows
    x = x.detach()[0].requires_grad_()
    assert torch.autograd.grad(fake_quantize(x, scale, bits=bits).sum(), x)[0].tolist() == [1.0, 1.0, 1.0, 0.0]


def test_rounds_half_to_even_and_divides() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5])
    assert fake_quantize(x, torch.tensor(1.0)).tolist() == [0.0, 2.0, 2.0, 0.0, -2.0]
    scale = torch.rand(2000, 1, generator=torch.Generator().manual_seed(0)) + 0.5
    x = scale * torch.arange(0.5, 30).reshape(1, -1)
    by_reciprocal = torch.round(x * (1 / scale)) * scale
    assert not torch.equal(by_reciprocal, torch.round(x / scale) * scale)
    assert torch.equal(fake_quantize(x, scale, axis=0), torch.round(x / scale) * scale)


@pytest.mark.parametrize(
    ("bits", "symmetric", "expected"),
    [(8, True, (-127, 127)), (16, True, (-32767, 32767)), (4, True, (-8, 7)), (2, True, (-2, 1)), (4, False, (0, 15))],
)
def test_quant_range(bits: int, symmetric: bool, expected: tuple[int, int]) -> None:
    assert quant_range(bits, symmetric) == expected


# --- the CPU kernels against the definition -------------------------------------------------------


@pytest.mark.parametrize("around", [nullcontext, without_native], ids=["native", "pytorch"])
@given(cases())
@settings(max_examples=400, deadline=None)
def test_cpu_forward_equals_the_definition_bit_for_bit(around: Around, case: Case) -> None:
    before = case.x.clone()
    with around(), blocks_of(case.block):
        actual = fake_quantize_op(*case.op_arguments)
    assert_same_bits(actual, reference_fake_quantize(*case.op_arguments))
    assert actual.stride() == torch.empty_like(case.x).stride()
    assert_same_bits(case.x, before)


@pytest.mark.parametrize("around", [nullcontext, without_native], ids=["native", "pytorch"])
@given(cases(), st.sampled_from(LAYOUTS), st.booleans(), st.booleans())
@settings(max_examples=400, deadline=None)
def test_cpu_backward_equals_the_definition(
    around: Around, case: Case, grad_layout: str, needs_scale: bool, needs_zero: bool
) -> None:
    grad = relayout(case.randn(), grad_layout)
    learned_zero = case.zero_point is not None and case.zero_point.is_floating_point()
    arguments = (grad, *case.op_arguments, [True, needs_scale, needs_zero and learned_zero])
    with around(), blocks_of(case.block):
        actual = fake_quantize_backward_op(*arguments)
    expected = reference_fake_quantize_backward(*arguments)
    assert_same_bits(actual[0], expected[0], where=~case.x.isnan())
    assert actual[0].stride() == torch.empty_like(case.x).stride()
    for gradients in (actual, expected):
        assert_sums_of_terms(case, grad, gradients[1], 1, needs_scale)
        assert_sums_of_terms(case, grad, gradients[2], 2, needs_zero and learned_zero)


def assert_sums_of_terms(case: Case, grad: Tensor, actual: Tensor, which: int, needed: bool) -> None:
    """Check the gradient of a scale (1) or zero point (2) against its terms, summed in float64.

    The terms are the definition's gradients where each element has a scale of its own.
    """
    if not needed:
        assert actual.numel() == 0
        return
    own = [None if p is None else case.spread(p).flatten() for p in (case.scale, case.zero_point)]
    codes = quant_range(case.bits, case.symmetric)
    arguments: tuple[Any, ...] = (
        grad.flatten(),
        case.x.flatten(),
        *own,
        *codes,
        -1,
        1,
        [False, which == 1, which == 2],
    )
    terms = reference_fake_quantize_backward(*arguments)[which].double()
    index = case.spread(torch.arange(case.scale.numel()).reshape(case.scale.shape)).flatten().long()
    zeros = torch.zeros(case.scale.numel(), dtype=torch.float64)
    total, magnitude = zeros.index_add(0, index, terms), zeros.index_add(0, index, terms.abs())
    wrong = (actual.flatten().double() - total).abs() > 1e-6 * magnitude
    assert not wrong.any(), (actual.flatten()[wrong], total[wrong])
    assert torch.equal(actual.flatten().isnan(), total.isnan())


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("shape", "kwargs", "scale_shape"),
    [
        ((1031, 1033), {"axis": 0}, (1031,)),
        ((1031, 1033), {"axis": 1}, (1033,)),
        ((3, 700001), {}, ()),
        ((1031, 1033), {}, (1031, 1)),
        ((1028, 1040), {"group_size": 16}, (1028, 65)),
        ((9, 33, 65, 67), {"axis": 1}, (33,)),
    ],
)
def test_sizes_of_many_blocks(
    shape: tuple[int, ...], kwargs: dict[str, Any], scale_shape: tuple[int, ...], threads: int
) -> None:
    x, grad = torch.randn(shape), torch.randn(shape)
    scale = torch.rand(scale_shape) / 50 + 0.01
    grid = layout.resolve_layout(x, scale, None, kwargs.get("axis"), kwargs.get("group_size"))
    arguments = (grad, x, scale, None, -127, 127, *grid, [True, False, False])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with blocks_of(200_000):
            y, dx = fake_quantize(x, scale, **kwargs), fake_quantize_backward_op(*arguments)[0]
        assert_same_bits(y, reference_fake_quantize(x, scale, None, -127, 127, *grid))
        assert_same_bits(dx, reference_fake_quantize_backward(*arguments)[0])
    finally:
        torch.set_num_threads(before)


def test_nan_passes_its_gradient_where_scales_differ() -> None:
    x = torch.full((3, 37), float("nan"), requires_grad=True)
    y = fake_quantize(x, torch.ones(3), axis=0)
    assert y.isnan().all()
    assert torch.autograd.grad(y, x, torch.ones(3, 37))[0].eq(1).all()


# --- what it refuses ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "zero_point", "bits", "message"),
    [
        (torch.ones(4).long(), None, 8, "x has dtype torch.int64"),
        (torch.ones(4), torch.ones(()), 8, "leave it out"),
        (torch.ones(4), None, 1, "bits=1 is not allowed; use 2 to 16"),
        (torch.ones(4), None, 17, "bits=17 is not allowed; use 2 to 16"),
        (torch.ones(4), None, 8.0, "bits=8.0 is not allowed; use 2 to 16"),
    ],
)
def test_errors_name_what_is_allowed(x: Tensor, zero_point: Tensor | None, bits: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fake_quantize(x, torch.ones(()), zero_point, bits=bits)

"""The codebook ops as citizens of PyTorch, and their CPU kernels against the definition."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensors import DTYPES, batches, randn
from torch import Tensor

from lightning_qat.native.library import without_native
from lightning_qat.ops import codebook as ops
from lightning_qat.ops.codebook import (
    EDGE,
    block_absmax,
    dequantize_codebook,
    fake_quantize_codebook,
    quantize_codebook,
)
from lightning_qat.ops.codebook_tables import CODEBOOK_BITS, RULES, codebook

NAMES = list(CODEBOOK_BITS)
SPECIAL = (0.0, math.nan, math.inf, -math.inf, 1e38, 1e-42)


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, but that a NaN is a NaN."""
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.isnan(), b.isnan())
        and torch.equal(a.nan_to_num(nan=0.0), b.nan_to_num(nan=0.0))
    )


# --- kernels and the definition -------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(NAMES),
    st.sampled_from(RULES),
    st.sampled_from((0, 1, 2, 7, 64, 65, 4097, 70_001)),
    st.sampled_from((1, 3, 32, 64, 100, 4096, 40_001)),
    st.sampled_from(DTYPES),
    st.sampled_from((1.0, 1e-3, 1e-38, 1e-41, 1e30, 0.0)),
    st.lists(st.tuples(st.integers(0, 70_000), st.sampled_from(SPECIAL)), max_size=3),
    st.sampled_from((None, 0.5, 1.0, 2.0)),
)
def test_the_cpu_kernels_equal_the_definition(
    name: str,
    rule: str,
    count: int,
    block_size: int,
    dtype: torch.dtype,
    size: float,
    special: list[tuple[int, float]],
    factor: float | None,
) -> None:
    x = (randn(count, seed=count) * size).to(dtype)
    for place, value in special:
        if count:
            x[place % count] = value
    given_absmax = None if factor is None else block_absmax(x, block_size) * factor
    expected, absmax = ops.reference_quantize(x, given_absmax, name, block_size, rule)
    stored, scale = ops.codebook_quantize_op(x, given_absmax, name, block_size, rule)
    assert torch.equal(stored, expected)
    assert same(scale, absmax)
    arguments = (expected, absmax, count, name, block_size, dtype)
    assert same(ops.codebook_dequantize_op(*arguments), ops.reference_dequantize(*arguments))
    fake = (x, absmax, absmax * 0.99, name, block_size, rule)
    assert same(ops.codebook_fake_quantize_op(*fake), ops.reference_fake_quantize(*fake))
    backward = (randn(count, seed=1).to(dtype), x, absmax, block_size)
    assert same(ops.codebook_fake_quantize_backward_op(*backward), ops.reference_fake_quantize_backward(*backward))


@pytest.mark.parametrize("value", [0.0, -0.0026, 0.9], ids=str)
def test_a_tensor_full_of_values_beside_a_threshold(value: float) -> None:
    """Without a compiled kernel all of them are in one cell, and are searched as a whole."""
    x = torch.full((300_000,), value)
    x[::64] = 1.0
    expected, _ = ops.reference_quantize(x, None, "fp4", 64, "cpu")
    assert torch.equal(ops.codebook_quantize_op(x, None, "fp4", 64, "cpu")[0], expected)
    with without_native():
        assert torch.equal(ops.codebook_quantize_op(x, None, "fp4", 64, "cpu")[0], expected)


@settings(max_examples=60, deadline=None)
@given(batches(), st.sampled_from(NAMES), st.sampled_from((1, 3, 64)))
def test_fake_quantize_is_quantize_and_dequantize(case: tuple[Tensor, int], name: str, block_size: int) -> None:
    x, _ = case
    absmax = block_absmax(x, block_size)
    fake = fake_quantize_codebook(x, absmax, codebook=name, block_size=block_size)
    codes = quantize_codebook(x, absmax, codebook=name, block_size=block_size)
    values = dequantize_codebook(codes, absmax, codebook=name, block_size=block_size, dtype=x.dtype)
    assert same(fake, values)
    assert fake.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("name", NAMES)
def test_the_default_dtype_does_not_matter(name: str) -> None:
    x = randn(300)
    expected, absmax = ops.reference_quantize(x, None, name, 64, "cpu")
    torch.set_default_dtype(torch.float64)
    try:
        stored, scale = ops.codebook_quantize_op(x, None, name, 64, "cpu")
        fake = fake_quantize_codebook(x, scale, codebook=name, block_size=64)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(stored, expected)
    assert same(scale, absmax)
    assert same(fake, ops.reference_fake_quantize(x, absmax, None, name, 64, "cpu"))


# --- what is given and what comes out -------------------------------------------------------------


def test_codes_come_of_one_scale_and_values_of_the_other() -> None:
    x = randn(128)
    absmax, stored = block_absmax(x, 64), torch.tensor([2.0, 3.0])
    fake = fake_quantize_codebook(x, absmax, codebook="nf4", block_size=64, stored_absmax=stored)
    codes = quantize_codebook(x, absmax, codebook="nf4", block_size=64)
    assert torch.equal(fake, dequantize_codebook(codes, stored, codebook="nf4", block_size=64))


@pytest.mark.parametrize("name", NAMES)
def test_nan_stays_nan_and_infinity_is_clamped(name: str) -> None:
    x = torch.tensor([math.nan, math.inf, -math.inf, 1.0])
    fake = fake_quantize_codebook(x, torch.tensor([2.0]), codebook=name, block_size=64)
    ends = codebook(name, "cpu").aminmax()
    assert math.isnan(fake[0])
    assert fake[1:3].tolist() == [2 * float(ends.max), 2 * float(ends.min)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_passes_up_to_the_absmax(dtype: torch.dtype) -> None:
    x = torch.tensor([2.0, -2.0, 0.0, 2.01, -3.0, math.nan, 0.0, 1e-3], dtype=dtype, requires_grad=True)
    y = fake_quantize_codebook(x, torch.tensor([2.0, 0.0]), codebook="nf4", block_size=6)
    (gradient,) = torch.autograd.grad(y, x, torch.full_like(y, 3.0))
    assert gradient.dtype == dtype
    assert gradient.tolist() == [3.0, 3.0, 3.0, 0.0, 0.0, 0.0, 3.0, 0.0]


def test_the_maximum_keeps_its_gradient_through_a_rounding_of_the_scale() -> None:
    x = torch.tensor([1.0, 1.0], requires_grad=True)
    absmax = torch.tensor([1 / (1 + 2.0**-10) + 2.0**-23, 1 / (1 + 2.0**-10) - 2.0**-22])
    fake_quantize_codebook(x, absmax, codebook="nf4", block_size=1).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1.0, 0.0]


def test_the_gradient_of_a_transposed_tensor_is_at_its_place() -> None:
    x = randn(6, 5).t().requires_grad_()
    absmax = torch.full((5,), 0.5)
    y = fake_quantize_codebook(x, absmax, codebook="fp4", block_size=6)
    (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(gradient, (x.abs() <= 0.5 * EDGE).float())


def test_saves_its_arguments_and_nothing_else() -> None:
    x, absmax = randn(128).requires_grad_(), torch.ones(2)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):  # type: ignore[func-returns-value]
        fake_quantize_codebook(x, absmax, codebook="nf4", block_size=64, stored_absmax=absmax * 2)
    assert set(saved) == {x.data_ptr(), absmax.data_ptr()}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("given", [False, True])
def test_opcheck(name: str, given: bool) -> None:
    x = randn(7, 15).requires_grad_()
    absmax = block_absmax(x.detach(), 64)
    torch.library.opcheck(ops.codebook_quantize_op, (x.detach(), absmax if given else None, name, 64, "cpu"))
    stored, _ = ops.codebook_quantize_op(x.detach(), absmax, name, 64, "cpu")
    torch.library.opcheck(ops.codebook_dequantize_op, (stored, absmax, 105, name, 64, torch.bfloat16))
    torch.library.opcheck(ops.codebook_fake_quantize_op, (x, absmax, absmax * 0.9 if given else None, name, 64, "cuda"))
    torch.library.opcheck(ops.codebook_fake_quantize_backward_op, (randn(7, 15), x.detach(), absmax, 64))


@pytest.mark.parametrize(("name", "dynamic"), [("nf4", False), ("dynamic_tree", True)])
def test_compiles_in_one_graph(name: str, dynamic: bool) -> None:
    def step(x: Tensor) -> Tensor:
        absmax = block_absmax(x.detach(), 64)
        codes = quantize_codebook(x.detach(), absmax, codebook=name, block_size=64)
        values = dequantize_codebook(codes, absmax, codebook=name, block_size=64)
        return fake_quantize_codebook(x * 2, absmax, codebook=name, block_size=64).sin() + values

    results = []
    for function in (step, torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=dynamic)):
        x = randn(8, 16).requires_grad_()
        y = function(x)
        results.append((y.detach(), torch.autograd.grad(y.sum(), x)[0]))
    torch.testing.assert_close(results[1], results[0])


# --- stochastic rounding --------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rule", RULES)
def test_stochastic_rounding_is_unbiased_and_seeded(name: str, rule: str) -> None:
    draws = 4000
    points = torch.linspace(-0.99, 1.0, 41)
    x, absmax = points.repeat(draws, 1), torch.ones(1)
    arguments = {"codebook": name, "block_size": x.numel(), "rule": rule, "stochastic": True}

    def draw() -> Tensor:
        return quantize_codebook(x, absmax, generator=torch.Generator().manual_seed(7), **arguments)  # type: ignore[arg-type]

    codes = draw()
    assert torch.equal(codes, draw())
    values = codebook(name, "cpu")[codes.long()]
    # Five standard errors; a fair coin between neighbours has the largest deviation, half their distance.
    order = codebook(name, "cpu").sort().values
    at = torch.searchsorted(order, points).clamp(1, len(order) - 1)
    deviation = (order[at] - order[at - 1]) / 2
    assert bool(((values.mean(0) - points).abs() <= 5 * deviation / draws**0.5 + 1e-6).all())
    assert bool(((values - x).abs() <= (order[at] - order[at - 1])).all())


def test_stochastic_rounding_leaves_the_values_of_the_table() -> None:
    values = codebook("fp4", "cpu")
    codes = quantize_codebook(values, torch.ones(1), codebook="fp4", block_size=16, stochastic=True)
    assert torch.equal(values[codes.long()], values)


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codebook": "nf5"}, "codebook='nf5' is not known"),
        ({"rule": "gpu"}, "rule='gpu' is not known"),
        ({"block_size": 0}, "block_size=0 is not allowed"),
        ({"block_size": True}, "block_size=True is not allowed"),
        ({"absmax": torch.ones(3)}, "take torch.float32 with 2 elements"),
        ({"absmax": torch.ones(2, dtype=torch.float64)}, r"absmax is torch\.float64"),
        ({"x": torch.arange(128)}, r"x has dtype torch\.int64"),
    ],
)
def test_errors_name_the_value_and_the_way_out(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {
        "x": torch.ones(128),
        "absmax": torch.ones(2),
        "codebook": "nf4",
        "block_size": 64,
        "rule": "cpu",
    } | change
    x, absmax = arguments.pop("x"), arguments.pop("absmax")
    for function in (quantize_codebook, fake_quantize_codebook):
        with pytest.raises(ValueError, match=message):
            function(x, absmax, **arguments)  # type: ignore[arg-type]


def test_a_generator_without_stochastic_rounding_is_an_error() -> None:
    with pytest.raises(ValueError, match="stochastic=False"):
        quantize_codebook(torch.ones(1), torch.ones(1), codebook="nf4", block_size=64, generator=torch.Generator())

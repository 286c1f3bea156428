"""Products of int8 codes: equal to sums in 64-bit integers, scaled one rounding at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensors import randn
from torch import Tensor

from lightning_qat.native.library import without_native
from lightning_qat.native.linear_int8 import multiply_codes_native
from lightning_qat.ops import w8a8_matmul as ops
from lightning_qat.ops.integer_linear import MAX_TERMS, few_rows
from lightning_qat.ops.w8a8_matmul import reference_w8a8_matmul, w8a8_matmul, w8a8_matmul_op

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def codes(*shape: int, seed: int) -> Tensor:
    return torch.randint(-128, 128, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


def exact(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None, zero: Tensor | int | None
) -> Tensor:
    """The sums in 64-bit integers, then the roundings that the definition names."""
    shift = zero.long().reshape(-1, 1) if isinstance(zero, Tensor) else (zero or 0)
    sums = (a.long() - shift) @ b.long().t()
    value = sums.float() * (a_scale.reshape(-1, 1) * b_scale.reshape(1, -1))
    return value if bias is None else value + bias.float()


@settings(max_examples=120, deadline=None)
@given(
    st.tuples(st.integers(0, 40), st.integers(0, 40), st.sampled_from((0, 1, 2, 7, 64, 333))),
    st.tuples(st.booleans(), st.booleans(), st.booleans(), st.booleans()),
    st.sampled_from(("none", "number", "one", "rows")),
    st.sampled_from(DTYPES),
    st.integers(0, 2**16),
)
def test_products_are_exact(
    shape: tuple[int, int, int], options: tuple[bool, ...], kind: str, dtype: torch.dtype, seed: int
) -> None:
    (m, n, k), (per_row, per_column, with_bias, with_sums) = shape, options
    a, b = codes(m, k, seed=seed), codes(n, k, seed=seed + 1)
    a_scale, b_scale = randn(m if per_row else 1, seed=seed).abs(), randn(n if per_column else 1, seed=seed + 2)
    bias = randn(n, seed=seed + 3).to(dtype) if with_bias else None
    zero = {"none": None, "number": -128, "one": torch.tensor([127]), "rows": torch.arange(m) % 256 - 128}[kind]
    sums = b.sum(1, dtype=torch.int32) if with_sums else None
    expected = exact(a, a_scale, b, b_scale, bias, zero).to(dtype)
    out = w8a8_matmul(a, a_scale, b, b_scale, bias, a_zero_point=zero, b_sums=sums, dtype=dtype)
    assert out.dtype == dtype
    assert torch.equal(out, expected)
    with without_native():
        again = w8a8_matmul(a, a_scale, b, b_scale, bias, a_zero_point=zero, b_sums=sums, dtype=dtype)
    assert torch.equal(again, expected)
    point = torch.tensor([zero]) if isinstance(zero, int) else zero
    assert torch.equal(reference_w8a8_matmul(a, a_scale, b, b_scale, bias, point, sums, dtype), expected)


@pytest.mark.parametrize("zero", [None, -128, 127])
@pytest.mark.parametrize("with_sums", [True, False])
@pytest.mark.parametrize("per_row", [True, False])
def test_few_rows_take_the_kernel_of_converted_layers(
    monkeypatch: pytest.MonkeyPatch, zero: int | None, with_sums: bool, per_row: bool
) -> None:
    """Where the sums of a weight's rows are given, or would be needed all the same."""
    products = []

    def counted(codes: Tensor, *arguments: Any) -> Any:
        products.append(len(codes))
        return multiply_codes_native(codes, *arguments)

    monkeypatch.setattr(ops, "multiply_codes_native", counted)
    b, b_scale, bias = codes(96, 333, seed=2), randn(96, seed=3), randn(96, seed=4)
    sums = b.sum(1, dtype=torch.int32) if with_sums else None
    most = few_rows(b.numel())
    for rows in (1, 2, 8, 9, 40):
        products.clear()
        a, a_scale = codes(rows, 333, seed=rows), randn(rows if per_row else 1, seed=rows).abs()
        out = w8a8_matmul(a, a_scale, b, b_scale, bias, a_zero_point=zero, b_sums=sums)
        assert torch.equal(out, exact(a, a_scale, b, b_scale, bias, zero))
        found_sums = [1] if zero is not None and not with_sums and (most or ops.sums_are_exact()) else []
        few = rows <= min(most, 8) and (zero is not None or with_sums)
        assert products == ([*found_sums, rows] if few else found_sums)
    strided = torch.stack([b, b], 2)[:, :, 0]
    out = w8a8_matmul(a[:2], a_scale[:1], strided, b_scale, bias, a_zero_point=zero, b_sums=sums)
    assert torch.equal(out, exact(a[:2], a_scale[:1], b, b_scale, bias, zero))


def test_by_hand() -> None:
    a, b = torch.tensor([[1, -2], [3, 4]], dtype=torch.int8), torch.tensor([[5, 6]], dtype=torch.int8)
    out = w8a8_matmul(a, torch.tensor([2.0, 0.5]), b, torch.tensor([10.0]), torch.tensor([1.0]), a_zero_point=1)
    assert out.tolist() == [[(0 * 5 - 3 * 6) * 20 + 1.0], [(2 * 5 + 3 * 6) * 5 + 1.0]]


@pytest.mark.parametrize("value", [-128, 127])
def test_the_largest_sums(value: int) -> None:
    a = torch.full((2, MAX_TERMS), value, dtype=torch.int8)
    b = torch.full((3, MAX_TERMS), -128, dtype=torch.int8)
    one = torch.ones(1)
    shift = 127 if value == -128 else -128
    out = w8a8_matmul(a, one, b, one, a_zero_point=shift, dtype=torch.float64)
    assert out.unique().tolist() == [float(torch.tensor((value - shift) * -128 * MAX_TERMS).float())]


def test_leading_dimensions_and_strides() -> None:
    a, b = codes(6, 2, 3, seed=1).permute(1, 2, 0), codes(6, 5, seed=2).t()
    steps, one = randn(2, 3, 1).abs(), torch.ones(1)
    out = w8a8_matmul(a, steps, b, one)
    assert out.shape == (2, 3, 5)
    assert torch.equal(out.view(6, 5), exact(a.reshape(6, 6), steps.view(6), b, one, None, None))


def test_opcheck() -> None:
    a, b = codes(3, 8, seed=1), codes(5, 8, seed=2)
    zero, sums = torch.tensor([3], dtype=torch.int32), b.sum(1, dtype=torch.int32)
    torch.library.opcheck(
        w8a8_matmul_op, (a, torch.ones(3), b, torch.ones(5), torch.ones(5), zero, sums, torch.float32)
    )
    torch.library.opcheck(w8a8_matmul_op, (a[:0], torch.ones(1), b, torch.ones(1), None, None, None, torch.bfloat16))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_in_one_graph(dynamic: bool) -> None:
    b, one = codes(5, 16, seed=2), torch.ones(1)

    def step(a: Tensor, steps: Tensor) -> Tensor:
        return w8a8_matmul(a, steps, b, one, a_zero_point=2, dtype=torch.bfloat16).relu()

    arguments = codes(2, 3, 16, seed=1), randn(2, 3, 1).abs()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=dynamic)(*arguments)
    assert torch.equal(compiled, step(*arguments))


def test_a_cpu_that_saturates_takes_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "sums_are_exact", lambda: False)
    monkeypatch.setattr(torch, "_int_mm", None)
    a, b, one = codes(3, 8, seed=1), codes(5, 8, seed=2), torch.ones(1)
    assert torch.equal(w8a8_matmul(a, one, b, one), exact(a, one, b, one, None, None))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": torch.ones(2, 4)}, "a is torch.float32 of shape .2, 4. and b torch.int8 .* use torch.int8"),
        ({"b": codes(3, 5, seed=0)}, r"a is .* of shape \(2, 4\) and b .* of shape \(3, 5\); use .* \[N, K\]"),
        ({"a_scale": torch.ones(3)}, "a_scale has 3 elements on cpu; use 1 or 2 on cpu"),
        ({"b_scale": torch.ones(2)}, "b_scale has 2 elements on cpu; use 1 or 3 on cpu"),
        ({"a_zero_point": torch.ones(3)}, "a_zero_point has 3 elements"),
        ({"bias": torch.ones(2)}, "bias has 2 elements on cpu; use 3 on cpu"),
        ({"b_sums": torch.ones(2)}, "b_sums has 2 elements on cpu; use 3 on cpu"),
        ({"bias": torch.ones(3, device="meta")}, "bias has 3 elements on meta; use 3 on cpu"),
        ({"dtype": torch.int32}, "dtype=torch.int32 is not allowed; use a floating-point dtype"),
    ],
)
def test_errors_name_the_value_and_the_way_out(change: dict[str, object], message: str) -> None:
    given: dict[str, object] = {"a": codes(2, 4, seed=0), "b": codes(3, 4, seed=1)}
    given |= {"a_scale": torch.ones(1), "b_scale": torch.ones(1)}
    with pytest.raises(ValueError, match=message):
        w8a8_matmul(**{**given, **change})  # type: ignore[arg-type]


def test_more_products_than_a_sum_holds() -> None:
    a, one = torch.zeros(1, MAX_TERMS + 1, dtype=torch.int8), torch.ones(1)
    with pytest.raises(ValueError, match=f"use {MAX_TERMS} columns at most"):
        w8a8_matmul(a, one, a, one)

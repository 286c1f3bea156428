"""Products with packed 4-bit weights: against float64, with gradients, and what PyTorch asks of an op."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensors import randn
from torch import Tensor

from lightning_qat.native.library import without_native
from lightning_qat.native.linear_float import has_linear_float
from lightning_qat.ops.codebook import pack_nibbles
from lightning_qat.ops.codebook_tables import codebook
from lightning_qat.ops.float_linear import float_linear, most_tokens, of_four_bits
from lightning_qat.ops.packing import pack_bits
from lightning_qat.ops.w4a16_matmul import reference_w4a16_matmul, w4a16_matmul, w4a16_matmul_op

FORMATS = ("signed", "zero", "nf4", "fp4")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Weight:
    """Random codes of one format: arguments of the op, and the float64 numbers that they stand for."""

    packed: Tensor
    scale: Tensor
    zero: Tensor | None
    out_features: int
    group: int
    name: str | None
    exact: Tensor

    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        options = {"out_features": self.out_features, "group_size": self.group, "codebook": self.name}
        return w4a16_matmul(x, self.packed, self.scale, self.zero, bias, **options)  # type: ignore[arg-type]

    def arguments(self, x: Tensor, bias: Tensor | None = None) -> tuple[object, ...]:
        return x, self.packed, self.scale, self.zero, bias, self.out_features, self.group, self.name


def weight(kind: str, n: int, k: int, group: int, seed: int = 0) -> Weight:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (n, k), generator=generator, dtype=torch.uint8)
    scale = torch.rand(-(-n * k // group), generator=generator) + 0.1
    zero, name = None, kind if kind in ("nf4", "fp4") else None
    if name is not None:
        packed, values = pack_nibbles(codes, name), codebook(name, "cpu")[codes.long()].double()
    elif kind == "signed":
        values = codes.double() - 8
        packed = pack_bits(values.to(torch.int8), 4, signed=True)
    else:
        zero = torch.randint(0, 16, scale.shape, generator=generator, dtype=torch.int32)
        values = codes.double() - zero.repeat_interleave(group).view(n, k)
        packed = pack_bits(codes, 4, signed=False)
    exact = values * scale.double().repeat_interleave(group)[: n * k].view(n, k)
    return Weight(packed, scale, zero, n, group, name, exact)


def assert_close(out: Tensor, x: Tensor, held: Weight, bias: Tensor | None, of_weight: float) -> None:
    """Each product and sum may lose a rounding of float32, each weight ``of_weight``, the result one of its dtype."""
    exact, size = x.double() @ held.exact.t(), x.double().abs() @ held.exact.abs().t()
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    limit = size * ((x.shape[-1] + 8) * 2.0**-24 + of_weight) + exact.abs() * torch.finfo(out.dtype).eps
    assert ((out.double() - exact).abs() <= limit + torch.finfo(out.dtype).smallest_normal).all()


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(FORMATS),
    st.integers(0, 9),
    st.integers(1, 20),
    st.integers(1, 6),
    st.integers(1, 40),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.integers(0, 2**16),
)
def test_products_are_those_of_the_values(
    kind: str, m: int, n: int, groups: int, group: int, dtype: torch.dtype, with_bias: bool, seed: int
) -> None:
    """A codebook's blocks go across rows and end short; those of integers divide them."""
    k = groups * group if kind in ("signed", "zero") else groups * group + seed % 3
    held, x = weight(kind, n, k, group, seed), randn(m, k, seed=seed).to(dtype)
    bias = randn(n, seed=seed + 1).to(dtype) if with_bias else None
    out = held.multiply(x, bias)
    assert (out.shape, out.dtype) == ((m, n), dtype)
    assert_close(out, x, held, bias, torch.finfo(dtype).eps / 2)
    assert_close(reference_w4a16_matmul(*held.arguments(x, bias)), x, held, bias, 2.0**-23)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", FORMATS)
def test_products_with_the_identity_are_the_weights(kind: str) -> None:
    held = weight(kind, 6, 32, 16)
    assert torch.equal(held.multiply(torch.eye(32)).t().double(), held.exact.float().double())


@pytest.mark.parametrize("kind", FORMATS)
def test_leading_dimensions_and_strides(kind: str) -> None:
    held, x = weight(kind, 5, 8, 4), randn(8, 3, 2).permute(2, 1, 0)
    out = held.multiply(x, torch.ones(5))
    assert out.shape == (2, 3, 5)
    assert_close(out.view(6, 5), x.reshape(6, 8), held, torch.ones(5), 2.0**-23)
    assert held.multiply(randn(0, 4, 8)).shape == (0, 4, 5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "group"), [("signed", 128), ("zero", 32), ("nf4", 64), ("fp4", 192), ("nf4", 500)])
def test_few_rows_take_the_weight_as_it_is_stored(kind: str, group: int, dtype: torch.dtype) -> None:
    """Where groups end with rows; then a row's product does not depend on the other rows, as the library's does."""
    held, bias = weight(kind, 64, 384, group), randn(64, seed=7)
    fits = 384 % group == 0 and has_linear_float()
    x = randn(384, 9, seed=1).to(dtype).t()
    out = held.multiply(x, bias)
    assert_close(out, x, held, bias, torch.finfo(dtype).eps / 2)
    with without_native():
        dense = held.multiply(x, bias)
    assert_close(dense, x, held, bias, torch.finfo(dtype).eps / 2)
    if not fits:
        assert torch.equal(out, dense)
        return
    rows = of_four_bits(held.packed, held.scale, held.zero, 64, group, held.name)
    assert torch.equal(out, float_linear(x, rows, bias))
    assert torch.equal(out, torch.cat([held.multiply(row[None], bias) for row in x]))
    assert torch.equal(held.multiply(torch._neg_view(x), bias), held.multiply(-x, bias))
    many = randn(most_tokens(4, 64, 384, group, dtype) + 1, 384, seed=2).to(dtype)
    with without_native():
        dense = held.multiply(many, bias)
    assert torch.equal(held.multiply(many, bias), dense)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_the_dense_product(kind: str, dtype: torch.dtype) -> None:
    held = weight(kind, 6, 16, 8)
    x, bias = randn(4, 16).to(dtype).requires_grad_(), randn(6).requires_grad_()
    upstream = randn(4, 6, seed=3).to(dtype)
    grad_x, grad_bias = torch.autograd.grad(held.multiply(x, bias), (x, bias), upstream)
    assert (grad_x.dtype, grad_bias.dtype) == (dtype, torch.float32)
    tolerance = {"rtol": 0.0, "atol": 1e-5 if dtype == torch.float32 else 0.2}
    torch.testing.assert_close(grad_x.double(), upstream.double() @ held.exact, **tolerance)
    torch.testing.assert_close(grad_bias.double(), upstream.double().sum(0), **tolerance)


@pytest.mark.parametrize(
    ("kind", "dtype"), [("signed", torch.float32), ("zero", torch.float16), ("nf4", torch.bfloat16)]
)
def test_opcheck(kind: str, dtype: torch.dtype) -> None:
    held = weight(kind, 6, 16, 8)
    x, bias = randn(4, 16).to(dtype).requires_grad_(), randn(6).to(dtype).requires_grad_()
    torch.library.opcheck(w4a16_matmul_op, held.arguments(x, bias))


@pytest.mark.parametrize(("kind", "dynamic"), [("signed", False), ("zero", True), ("nf4", True)])
def test_compiles_in_one_graph(kind: str, dynamic: bool) -> None:
    held = weight(kind, 6, 16, 8)

    def step(x: Tensor) -> Tensor:
        return held.multiply(x * 2, torch.ones(6)).relu()

    results = []
    for function in (step, torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=dynamic)):
        x = randn(3, 4, 16).requires_grad_()
        y = function(x)
        results.append((y.detach(), torch.autograd.grad(y.sum(), x)[0]))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(2, 8).double()}, "x is torch.float64 of shape .2, 8.; use"),
        ({"group_size": 3}, "group_size must divide K: 8 % 3 != 0"),
        (
            {"packed": torch.zeros(13, dtype=torch.uint8)},
            r"packed is torch.uint8 with 13 .* a weight \[3, 8\] takes 12",
        ),
        ({"scale": torch.ones(5)}, "scale has 5 elements; groups of 4 take 6"),
        ({"zero_point": torch.ones(5)}, "zero_point has 5 elements; groups of 4 take 6"),
        ({"bias": torch.ones(2)}, "bias has 2 elements; use out_features=3"),
        ({"codebook": "nf4", "zero_point": torch.ones(6)}, "zero_point is given with codebook='nf4'"),
        ({"codebook": "dynamic_tree"}, "codebook='dynamic_tree' has 8 bits; use 'nf4' or 'fp4'"),
        ({"codebook": "nf5"}, "nf5.* is not known"),
        ({"scale": torch.ones(6, device="meta")}, "scale is on meta and x on cpu; move it to cpu"),
    ],
)
def test_errors_name_the_value_and_the_way_out(change: dict[str, object], message: str) -> None:
    given: dict[str, object] = {"x": torch.ones(2, 8), "packed": torch.zeros(12, dtype=torch.uint8)}
    given |= {"scale": torch.ones(6), "out_features": 3, "group_size": 4}
    with pytest.raises(ValueError, match=message):
        w4a16_matmul(**{**given, **change})  # type: ignore[arg-type]

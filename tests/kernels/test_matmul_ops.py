"""What the ops of products do with CUDA tensors, against their definitions, in what no kernel takes too."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.cases import same
from ops.test_w4a16_matmul import FORMATS, assert_close, weight
from ops.test_w8a8_matmul import codes
from tensors import randn
from torch import Tensor

from lightning_qat.ops import w4a16_matmul as four_bits
from lightning_qat.ops.quantize_packed import quantize_packed_cuda, reference_quantize_packed
from lightning_qat.ops.token_quantize import reference_token_quantize, token_quantize_cuda
from lightning_qat.ops.w8a8_matmul import reference_w8a8_matmul, w8a8_matmul_cuda


def moved(arguments: tuple[object, ...], device: str) -> list[object]:
    return [a.to(device) if isinstance(a, Tensor) else a for a in arguments]


@settings(max_examples=25, deadline=None)
@given(
    st.tuples(st.integers(0, 20), st.integers(0, 20), st.sampled_from((0, 1, 2, 33, 64))),
    st.booleans(),
    st.sampled_from((None, 1, "rows")),
    st.sampled_from((torch.float32, torch.bfloat16, torch.float16, torch.float64)),
)
def test_integer_products_are_the_definition(
    device: str, shape: tuple[int, int, int], with_bias: bool, points: object, dtype: torch.dtype
) -> None:
    m, n, k = shape
    a, b = codes(m, k, seed=m), codes(n, k, seed=n + 50)
    zero = None if points is None else torch.arange(m if points == "rows" else 1, dtype=torch.int32) - 7
    bias = randn(n, seed=1) if with_bias else None
    arguments = (a, randn(m, 1).abs(), b, randn(n), bias, zero, None, dtype)
    out = w8a8_matmul_cuda(*moved(arguments, device))  # type: ignore[arg-type]
    assert same(out, reference_w8a8_matmul(*arguments))


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("shape", [(1, 5, 64), (3, 7, 64), (20, 9, 32), (0, 4, 32), (2, 0, 32), (3, 4, 33)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_four_bit_products_are_the_definition(
    device: str, kind: str, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    m, n, k = shape
    held, x = weight(kind, n, k, k if k % 2 else 32), randn(m, k, seed=1).to(dtype)
    bias = randn(n, seed=2).to(dtype)
    out = four_bits.w4a16_matmul_cuda(*moved(held.arguments(x, bias), device)).cpu()  # type: ignore[arg-type]
    assert (out.dtype, out.shape) == (dtype, (m, n))
    assert_close(out, x, held, bias, torch.finfo(dtype).eps / 2)


def test_many_rows_are_multiplied_by_the_library(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(four_bits, "MANY_ROWS", 4)
    seen = []
    dense = four_bits._dense
    monkeypatch.setattr(four_bits, "_dense", lambda *arguments: seen.append(len(arguments[0])) or dense(*arguments))
    held = weight("nf4", 6, 64, 64)
    for rows, dtype in ((3, torch.float16), (4, torch.float16), (5, torch.float32)):
        x = randn(rows, 64).to(dtype)
        out = four_bits.w4a16_matmul_cuda(*moved(held.arguments(x), device)).cpu()  # type: ignore[arg-type]
        assert_close(out, x, held, None, torch.finfo(dtype).eps / 2)
    assert seen == [4]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3, 70), (2, 0, 4), (5,)])
def test_codes_of_tokens_are_the_definition(
    device: str, symmetric: bool, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    x = randn(*shape).to(dtype)
    found = token_quantize_cuda(x.to(device), symmetric)
    assert all(same(a, b) for a, b in zip(found, reference_token_quantize(x, symmetric), strict=True))


@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (4, False), (8, True), (8, False)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("shape", "run"), [((6, 32), 16), ((5, 7), 35), ((0, 8), 8)])
def test_stored_codes_are_the_definition(
    device: str, bits: int, symmetric: bool, dtype: torch.dtype, shape: tuple[int, ...], run: int
) -> None:
    x = randn(*shape).to(dtype)
    scale = randn(x.numel() // run, seed=1).abs() + 0.05
    zero = None if symmetric else torch.arange(len(scale), dtype=torch.int32)
    arguments = (x, scale, zero, bits, symmetric, run)
    out = quantize_packed_cuda(*moved(arguments, device))  # type: ignore[arg-type]
    assert same(out, reference_quantize_packed(*arguments))

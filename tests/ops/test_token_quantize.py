"""The op of per-token quantization: the steps one after the other, and what PyTorch asks of an op."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensors import batches, randn
from torch import Tensor

from lightning_qat.ops.affine import choose_scale_zero_point, quantize_affine
from lightning_qat.ops.token_quantize import token_quantize, token_quantize_op


@settings(max_examples=40, deadline=None)
@given(batches(), st.booleans())
def test_scales_and_codes_are_those_of_each_row(case: tuple[Tensor, int], symmetric: bool) -> None:
    x = case[0]
    codes, scale, zero = token_quantize(x, symmetric=symmetric)
    assert codes.shape == x.shape
    assert codes.is_contiguous()
    assert scale.shape == (*x.shape[:-1], 1)
    assert (zero is None) == symmetric
    for i, row in enumerate(x.reshape(-1, x.shape[-1])):
        own, own_zero = choose_scale_zero_point(row.min(), row.max(), bits=8, symmetric=symmetric)
        assert scale.reshape(-1)[i] == own
        if zero is not None and own_zero is not None:
            assert zero.dtype == torch.int32
            assert zero.reshape(-1)[i] == own_zero
        expected = quantize_affine(row, own, own_zero, bits=8, symmetric=symmetric)
        assert torch.equal(codes.reshape(-1, x.shape[-1])[i], expected)


def test_by_hand() -> None:
    x = torch.tensor([[-1.27, 0.5, 1.27], [0.0, 0.0, 0.0], [0.0, 127.0, -254.0]])
    codes, scale, _ = token_quantize(x)
    assert codes.tolist() == [[-127, 50, 127], [0, 0, 0], [0, 64, -127]]  # 63.5 is a tie
    torch.testing.assert_close(scale.view(-1), torch.tensor([0.01, 1.0, 2.0]))


def test_a_row_with_nan_has_no_scale_and_the_others_theirs() -> None:
    x = torch.tensor([[1.0, float("nan")], [1.0, 127.0]])
    codes, scale, _ = token_quantize(x)
    assert scale[0].isnan()
    assert codes[1].tolist() == [1, 127]


@pytest.mark.parametrize(("shape", "symmetric"), [((3, 5), True), ((2, 2, 4), False), ((0, 7), False)])
def test_opcheck(shape: tuple[int, ...], symmetric: bool) -> None:
    torch.library.opcheck(token_quantize_op, (randn(*shape).bfloat16(), symmetric))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_in_one_graph(dynamic: bool) -> None:
    def step(x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        return token_quantize(x.transpose(0, 1), symmetric=False)

    x = randn(4, 6, 8)
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=dynamic)(x)
    for found, expected in zip(compiled, step(x), strict=True):
        assert found is not None
        assert expected is not None
        assert torch.equal(found, expected)


def test_errors_name_the_value_and_the_way_out() -> None:
    with pytest.raises(ValueError, match=r"x has dtype torch.int64; use a floating-point dtype"):
        token_quantize(torch.ones(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"x has shape \(2, 0\); rows of one element or more"):
        token_quantize(torch.ones(2, 0))

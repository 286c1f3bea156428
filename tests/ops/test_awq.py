"""AWQ's packed layout: bit by bit as the format says, and back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensors import randn
from torch import Tensor

from lightning_qat.ops.awq import awq_pack, awq_pack_op, awq_unpack, awq_unpack_op

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def grid(weight: Tensor, group: int, symmetric: bool) -> tuple[Tensor, Tensor | None]:
    runs = weight.float().reshape(len(weight), -1, group)
    if symmetric:
        return runs.abs().amax(2) / 7.5, None
    scale = (runs.amax(2) - runs.amin(2)) / 15
    return scale, (-runs.amin(2) / scale).round().clamp(0, 15).to(torch.int32)


@given(
    words=st.integers(1, 3),
    groups=st.integers(1, 3),
    symmetric=st.booleans(),
    scaled=st.booleans(),
    dtype=st.sampled_from((torch.float32, torch.float16, torch.bfloat16, torch.float64)),
)
@settings(max_examples=30, deadline=None)
def test_each_nibble_is_the_code_of_its_weight(
    words: int, groups: int, symmetric: bool, scaled: bool, dtype: torch.dtype
) -> None:
    weight = randn(8 * words, 8 * groups, seed=words).to(dtype)
    inputs = randn(8 * groups, seed=1).exp() if scaled else torch.ones(8 * groups)
    scale, zero = grid(weight, 8, symmetric)
    packed = awq_pack(weight, scale, zero, inputs if scaled else None)
    assert packed.dtype == torch.int32
    assert packed.shape == (8 * groups, words)
    for k in range(8 * groups):
        for c in range(words):
            for i, column in enumerate(ORDER):
                n = 8 * c + column
                code = torch.round(weight[n, k].float() * inputs[k] / scale[n, k // 8])
                expected = code.clamp(-8, 7) + 8 if symmetric else (code + zero[n, k // 8]).clamp(0, 15)
                assert (int(packed[k, c]) >> 4 * i) & 15 == int(expected)
    values = awq_unpack(packed, scale, zero, inputs if scaled else None)
    nearest = scale.repeat_interleave(8, 1) / inputs * 0.51
    edge = (weight * inputs / scale.repeat_interleave(8, 1)).abs().amax() > 20  # scaled beyond the grid: cut
    assert edge or bool(((values - weight.float()).abs() <= nearest * 40).all())
    again = awq_pack(values, scale, zero, inputs if scaled else None)
    assert torch.equal(again, packed)


def test_it_is_what_autoawq_and_gptqmodel_pack() -> None:
    gemm = pytest.importorskip("gptqmodel.nn_modules.qlinear.gemm_awq")
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 32, bias=False).half()
    scale, zero = grid(linear.weight.detach().float(), 32, False)
    codes = (linear.weight.float() / scale.half().float().repeat_interleave(32, 1)).round()
    codes = codes + zero.repeat_interleave(32, 1)
    del gemm
    expected = torch.zeros(64, 4, dtype=torch.int32)
    for c in range(4):  # as AutoAWQ's WQLinear_GEMM.from_linear does it
        for i, column in enumerate(ORDER):
            expected[:, c] |= codes.clamp(0, 15).to(torch.int32)[8 * c + column] << (4 * i)
    assert torch.equal(awq_pack(linear.weight.detach(), scale.half().float(), zero), expected)


def test_ops_are_registered_as_they_should_be() -> None:
    weight = randn(16, 32)
    scale, zero = grid(weight, 16, False)
    arguments = (weight, scale, zero, randn(32).exp())
    torch.library.opcheck(awq_pack_op, arguments)
    torch.library.opcheck(awq_unpack_op, (awq_pack(*arguments), *arguments[1:], torch.float16))
    torch.library.opcheck(awq_pack_op, (weight, scale, None, None))


def test_empty_weights() -> None:
    words = awq_pack(torch.empty(0, 16), torch.ones(0, 2))
    assert words.shape == (16, 0)
    assert awq_unpack(words, torch.ones(0, 2)).shape == (0, 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(12, 16), torch.ones(12, 1)), "12 outputs; 8 fill a word"),
        ((torch.ones(8, 16), torch.ones(8, 3)), r"scale is torch.float32 of shape \(8, 3\).*dividing 16"),
        ((torch.ones(8, 16), torch.ones(8, 2).half()), "scale is torch.float16"),
        ((torch.ones(8, 16), torch.ones(8, 2), torch.ones(8, 1)), r"zero_point has shape \(8, 1\)"),
        ((torch.ones(8, 16), torch.ones(8, 2), None, torch.ones(8)), r"input_scale is .*use torch.float32 \[16\]"),
        ((torch.ones(8, 16).int(), torch.ones(8, 2)), "use a floating-point matrix"),
        ((torch.ones(8, 16), torch.ones(8, 2, device="meta")), "scale is on meta and the weight on cpu"),
    ],
)
def test_what_does_not_fit(arguments: tuple[Tensor, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        awq_pack(*arguments)


def test_words_are_checked() -> None:
    with pytest.raises(ValueError, match=r"words are torch.int64"):
        awq_unpack(torch.ones(16, 1, dtype=torch.int64), torch.ones(8, 1))
    with pytest.raises(ValueError, match="dtype=torch.int8"):
        awq_unpack(torch.ones(16, 1, dtype=torch.int32), torch.ones(8, 1), dtype=torch.int8)

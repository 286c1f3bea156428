"""Converted layers on the Triton kernels compute what they compute without them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.cases import same
from tensors import randn
from torch import nn

import lightning_qat as lq
from lightning_qat.nn.triton_linear import triton_execution, triton_kernel
from lightning_qat.ops import codebook_cuda
from lightning_qat.ops.codebook import (
    block_absmax,
    reference_dequantize,
    reference_fake_quantize,
    reference_quantize,
)
from lightning_qat.ops.int4_dequantize import reference_int4_dequantize
from lightning_qat.ops.packing import pack_bits

CONFIGS = {
    "w4a16": lq.QATConfig("int4", group_size=32, activation_bits=None),
    "w4a16 asymmetric": lq.QATConfig("int4", group_size=32, activation_bits=None, symmetric=False),
    "w4 per channel": lq.QATConfig("int4", per_channel=True, activation_bits=None),
    "w4 per tensor": lq.QATConfig("int4", activation_bits=None),
    "nf4": lq.QATConfig("nf4", activation_bits=None),
    "nf4 nested": lq.QATConfig(
        "nf4", activation_bits=None, bnb=lq.BitsAndBytesConfig(bits=4, nested_quantization=True)
    ),
    "fp4": lq.QATConfig("fp4", activation_bits=None, group_size=32),
    "int8_dynamic": "int8_dynamic",
    "int8": "int8",
    "int8 symmetric": lq.QATConfig("int8", activation_symmetric=True),
}


def converted(config: object, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48))
    return lq.quantize_model(model, config, calibration=[randn(16, 64)])[0].to(dtype)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 64), (2, 9, 64)])
def test_a_layer_computes_the_same(device: str, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if dtype == torch.bfloat16 and device == "cpu":
        pytest.skip("the interpreter multiplies the bits of bfloat16 tiles as integers")
    layer = converted(CONFIGS[name], dtype)
    x = randn(*shape, seed=1).to(dtype)
    with torch.no_grad():
        exact = nn.functional.linear(layer.quantized_input(x).double(), layer.weight.double(), layer.bias.double())
        layer = layer.to(device)
        kernel = triton_kernel(layer)
        assert kernel is not None, triton_execution(layer)
        actual = kernel(x.to(device), layer.bias).cpu()
    assert actual.dtype == dtype
    assert actual.shape == exact.shape
    bound = {torch.float32: 1e-5, torch.float16: 2**-9, torch.bfloat16: 2**-7}[dtype]
    assert (actual.double() - exact).abs().max() <= bound * exact.abs().max()


@pytest.mark.parametrize("name", ["nf4", "fp4", "dynamic_tree"])
@pytest.mark.parametrize("rule", ["cpu", "cuda"])
@pytest.mark.parametrize("count", [1, 63, 1000])
def test_ops_are_the_definition(device: str, name: str, rule: str, count: int) -> None:
    x = randn(count, seed=count)
    given = reference_quantize(x, None, name, 64, rule)
    packed, absmax = codebook_cuda.codebook_quantize_cuda(x.to(device), None, name, 64, rule)
    assert torch.equal(packed.cpu(), given[0])
    assert torch.equal(absmax.cpu(), given[1])
    values = codebook_cuda.codebook_dequantize_cuda(packed, absmax, count, name, 64, torch.float32)
    assert torch.equal(values.cpu(), reference_dequantize(*given, count, name, 64, torch.float32))


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(("nf4", "fp4", "dynamic_tree")),
    st.sampled_from(("cpu", "cuda")),
    st.sampled_from(((1,), (7, 9), (3, 64), (5, 130))),
    st.sampled_from((48, 64, 128)),
    st.sampled_from((torch.float32, torch.float16, torch.bfloat16, torch.float64)),
    st.lists(st.sampled_from((math.nan, math.inf, -math.inf, 0.0, 1e-42, -3e4)), max_size=4),
    st.booleans(),
)
def test_fake_quantization_by_codebooks_is_the_definition(
    device: str,
    name: str,
    rule: str,
    shape: tuple[int, ...],
    block_size: int,
    dtype: torch.dtype,
    special: list[float],
    transposed: bool,
) -> None:
    x = randn(*shape, seed=block_size).to(dtype)
    x.view(-1)[: len(special)] = torch.tensor(special, dtype=dtype)[: x.numel()]
    x = x.t().contiguous().t() if transposed and x.dim() > 1 else x
    absmax = block_absmax(x.nan_to_num(0.0, 3.0, -3.0), block_size)
    for stored in (None, absmax * 0.97):
        expected = reference_fake_quantize(x, absmax, stored, name, block_size, rule)
        moved = [None if t is None else t.to(device) for t in (x, absmax, stored)]
        actual = codebook_cuda.codebook_fake_quantize_cuda(*moved, name, block_size, rule)
        assert same(actual, expected)
        assert actual.stride() == expected.stride()


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize(("numel", "run"), [(96, 32), (120, 24), (7 * 5, 5)])
def test_integers_are_the_definition(device: str, zero: bool, numel: int, run: int) -> None:
    codes = torch.randint(0, 16, (numel,), generator=torch.Generator().manual_seed(0)) - (0 if zero else 8)
    packed = pack_bits(codes, 4, signed=not zero)
    scale = randn(numel // run).abs() + 0.1
    points = torch.arange(numel // run, dtype=torch.int32) if zero else None
    arguments = (packed, scale, points, numel, run, torch.float32)
    expected = reference_int4_dequantize(*arguments)
    moved = [a.to(device) if isinstance(a, torch.Tensor) else a for a in arguments]
    assert torch.equal(codebook_cuda.int4_dequantize_cuda(*moved).cpu(), expected)


def test_what_has_no_kernel_says_so(device: str) -> None:
    for config in ("int8_weight_only", "dynamic_tree", lq.QATConfig("int8", bits=3, activation_bits=None)):
        assert triton_kernel(converted(config, torch.float32)) is None

"""Affine kernels: codes, bytes and values of the PyTorch definition, bit for bit."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import aot
from tensors import DTYPES, LARGEST, randn
from torch import Tensor

from lightning_qat.kernels import affine as kernels
from lightning_qat.ops.affine import choose_scale_zero_point, dequantize_affine, quantize_affine
from lightning_qat.ops.packing import pack_bits

GRIDS = ((4, True), (4, False), (8, True), (8, False))
SHAPES = ((1, 1), (3, 7), (5, 48), (2, 4100), (64, 80), (9, 455))


def stored(codes: Tensor, bits: int, symmetric: bool) -> Tensor:
    return codes if bits == 8 else pack_bits(codes, bits, signed=symmetric)


def grid_of(x: Tensor, shape: tuple[int, ...], bits: int, symmetric: bool) -> tuple[Tensor, Tensor | None]:
    runs = x.float().nan_to_num(0.0, 3.0, -3.0).reshape(math.prod(shape), -1)
    low, high = runs.amin(1).reshape(shape), runs.amax(1).reshape(shape)
    return choose_scale_zero_point(low / 2, high / 2, bits=bits, symmetric=symmetric)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, tuple[int, ...], dict[str, Any], int | None]:
    rows, columns = draw(st.sampled_from(SHAPES))
    x = randn(rows, columns, seed=draw(st.integers(0, 2**16))).to(draw(st.sampled_from(DTYPES)))
    if draw(st.booleans()):
        x.view(-1)[: min(5, x.numel())] = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 1e-8][: x.numel()])
    if draw(st.booleans()):
        x = x.t().contiguous().t()
    sizes = [g for g in (1, 3, 7, 16, 24, 35, 128, columns) if columns % g == 0]
    group = draw(st.sampled_from((None, 0, *sizes)))
    if group is None:
        return x, (), {}, None
    if group == 0:
        return x, (rows,), {"axis": 0}, None
    return x, (rows, columns // group), {"group_size": group}, group


@pytest.mark.parametrize(("bits", "symmetric"), GRIDS)
@given(case=cases())
@settings(max_examples=60, deadline=None)
def test_codes_and_values_equal_the_definition(
    device: str, bits: int, symmetric: bool, case: tuple[Tensor, tuple[int, ...], dict[str, Any], int | None]
) -> None:
    x, shape, options, group = case
    scale, zero = grid_of(x, shape, bits, symmetric)
    expected = quantize_affine(x, scale, zero, bits=bits, symmetric=symmetric, **options)
    on = [t if t is None else t.to(device) for t in (scale, zero)]
    codes = kernels.launch_quantize_pack(x.to(device), *on, bits=bits, symmetric=symmetric, group_size=group)
    assert codes.dtype == stored(expected, bits, symmetric).dtype
    assert torch.equal(codes.cpu(), stored(expected, bits, symmetric))
    values = kernels.launch_unpack_dequantize(
        codes, *on, x.shape, bits=bits, symmetric=symmetric, group_size=group, dtype=x.dtype
    )
    exact = dequantize_affine(expected, scale, zero, **options)
    assert torch.equal(values.cpu(), exact.to(x.dtype))


@pytest.mark.parametrize(("bits", "symmetric"), GRIDS)
def test_codes_equal_numpy_on_ties_and_at_every_magnitude(device: str, bits: int, symmetric: bool) -> None:
    magnitudes = torch.tensor([2.0**e for e in range(-149, 128)])
    halves = torch.arange(-40, 40) / 2
    large = torch.tensor([2.0**22 + 0.5, 2.0**23 - 0.5, 2.0**23 + 1, LARGEST, math.inf])
    x = torch.cat((halves, magnitudes, -magnitudes, large, -large)).reshape(1, -1)
    for zero in [None] if symmetric else [torch.tensor([7]), torch.tensor([2.5]), torch.tensor([-4194300.5])]:
        low, high = {(4, True): (-8, 7), (4, False): (0, 15), (8, True): (-127, 127), (8, False): (0, 255)}[
            bits, symmetric
        ]
        shift = np.float32(0) if zero is None else np.rint(zero.numpy().astype(np.float32))
        expected = np.clip(np.rint(x.numpy()) + shift, low, high).astype(np.int32)
        one = torch.ones(1, device=device)
        on = None if zero is None else zero.to(device)
        codes = kernels.launch_quantize_pack(x.to(device), one, on, bits=bits, symmetric=symmetric)
        assert torch.equal(codes.cpu(), stored(torch.from_numpy(expected).to(codes.dtype if bits == 8 else torch.int8),
                                               bits, symmetric))  # fmt: skip


@pytest.mark.parametrize(("bits", "symmetric"), GRIDS)
def test_every_code_comes_back(device: str, bits: int, symmetric: bool, poisoned: None) -> None:
    low, high = (-(2 ** (bits - 1)) + (bits == 8), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)
    x = torch.arange(low, high + 1).repeat(65)[: 4096 + 77].float().reshape(1, -1).to(device)
    zero = None if symmetric else torch.zeros(1, dtype=torch.int32, device=device)
    codes = kernels.launch_quantize_pack(x, torch.ones(1, device=device), zero, bits=bits, symmetric=symmetric)
    values = kernels.launch_unpack_dequantize(
        codes, torch.full((1,), 0.25, device=device), zero, x.shape, bits=bits, symmetric=symmetric
    )
    assert torch.equal(values, x / 4)


def test_scales_of_other_dtypes(device: str) -> None:
    x, scale = randn(8, 64), (torch.rand(8) / 5 + 0.1).half()
    codes = kernels.launch_quantize_pack(x.to(device), scale.to(device), None, bits=8, symmetric=True)
    assert torch.equal(codes.cpu(), quantize_affine(x, scale, bits=8, symmetric=True, axis=0))


def test_empty(device: str) -> None:
    x, scale = torch.empty(0, 8, device=device), torch.ones(1, device=device)
    codes = kernels.launch_quantize_pack(x, scale, None, bits=4, symmetric=True)
    assert codes.shape == (0,)
    assert kernels.launch_unpack_dequantize(codes, scale, None, (0, 8), bits=4, symmetric=True).shape == (0, 8)


def test_what_has_no_kernel_is_named(device: str) -> None:
    x = torch.ones(4, 8, device=device)
    with pytest.raises(ValueError, match="bits=3 has no kernel; use 4 or 8"):
        kernels.launch_quantize_pack(x, torch.ones(1, device=device), None, bits=3, symmetric=True)
    with pytest.raises(ValueError, match="3 scales of group_size=8 cover no tensor of 32 elements"):
        kernels.launch_quantize_pack(x, torch.ones(3, device=device), None, bits=4, symmetric=True, group_size=8)


@pytest.mark.parametrize("name", sorted(kernels.TUNED))
def test_compiles_without_spills(compiler: None, name: str) -> None:
    aot.check(kernels.TUNED[name])


def test_the_reciprocal_of_a_scale_is_exact(compiler: None) -> None:
    text = aot.ptx(kernels.TUNED["quantize-4bit-symmetric"])
    assert "div.rn.f32" in text
    assert "div.full" not in text
    assert "div.approx" not in text

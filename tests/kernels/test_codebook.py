"""Codebook kernels: bytes of bitsandbytes' CPU, and of its CUDA source read line by line, are the witnesses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import aot
from tensors import DTYPES, randn
from torch import Tensor

from lightning_qat.kernels import codebook as kernels
from lightning_qat.ops import codebook_tables as tables

CODEBOOKS = tuple(tables.CODEBOOK_BITS)


def search_table(name: str, rule: str, device: str) -> Tensor:
    thresholds = tables.thresholds(name, rule, device)
    if tables.CODEBOOK_BITS[name] == 8:
        return thresholds
    return kernels.cell_table(thresholds, tables.bin_codes(name, rule, device))


def rule_options(name: str, rule: str) -> dict[str, Any]:
    return {
        "bits": tables.CODEBOOK_BITS[name],
        "nan_code": tables.nan_code(name, rule),
        "zero_code": tables.zero_code(name),
        "least_absmax": tables.least_absmax(name, rule),
        "divide_last_block": tables.divides_last_block(name, rule),
    }


def quantize(x: Tensor, name: str, rule: str, block: int, absmax: Tensor | None = None) -> tuple[Tensor, Tensor]:
    table = search_table(name, rule, str(x.device))
    return kernels.launch_codebook_quantize(x, absmax, table, block_size=block, **rule_options(name, rule))


def unpack(packed: Tensor, name: str, count: int) -> Tensor:
    if tables.CODEBOOK_BITS[name] == 8:
        return packed
    return torch.stack((packed >> 4, packed & 15), 1).reshape(-1)[:count]


@st.composite
def inputs(draw: st.DrawFn) -> tuple[Tensor, int]:
    block = draw(st.sampled_from((16, 64, 256, 4096)))
    count = draw(st.sampled_from((1, 2, block - 1, block, block + 1, 2 * block, 4097, 4096 + 5 * block + 3)))
    dtype = draw(st.sampled_from(DTYPES))
    x = randn(count, seed=draw(st.integers(0, 2**16)))
    x = (x * 10.0 ** draw(st.sampled_from((0, -3, 3)))).to(dtype)
    if draw(st.booleans()):
        x[: count // 2] = 0.0
    return x, block


# --- codes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CODEBOOKS)
@given(case=inputs())
@settings(max_examples=15, deadline=None)
def test_bytes_equal_bitsandbytes_on_cpu(device: str, name: str, case: tuple[Tensor, int]) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    x, block = case
    if block < 64 and name != "dynamic_tree":
        block = 64
    if x.dtype == torch.float64:
        x = x.float()
    if name == "dynamic_tree":
        expected, state = functional.quantize_blockwise(x, blocksize=block)
    else:
        expected, state = functional.quantize_4bit(x, blocksize=block, quant_type=name)
    packed, absmax = quantize(x.to(device), name, "cpu", block)
    assert torch.equal(absmax.cpu(), state.absmax)
    assert torch.equal(packed.cpu(), expected.reshape(-1))


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_a_short_block_is_divided_as_bitsandbytes_does_on_cpu(device: str, name: str) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    thresholds, told_apart = tables.thresholds(name, "cpu", "cpu"), 0
    for absmax in (torch.rand(40, generator=torch.Generator().manual_seed(0)) + 0.5).unbind():
        near = thresholds * absmax
        steps = [torch.nextafter(near, torch.tensor(to)) for to in (-2.0, 2.0)]
        x = torch.cat((absmax.reshape(1), near, *steps))
        by_reciprocal = torch.bucketize(x * (1 / absmax), thresholds)
        told_apart += int((torch.bucketize(x / absmax, thresholds) != by_reciprocal).sum())
        expected, _ = functional.quantize_4bit(x, blocksize=64, quant_type=name)
        packed, _ = quantize(x.to(device), name, "cpu", 64)
        assert torch.equal(packed.cpu(), expected.reshape(-1))
    assert told_apart > 10  # the input does tell the two apart
    _, state = functional.quantize_4bit(torch.zeros(67), blocksize=64, quant_type=name)
    _, least = quantize(torch.zeros(67, device=device), name, "cpu", 64)
    assert least.tolist() == state.absmax.tolist() == [0.0, float(torch.tensor(1e-38))]


def cuda_fp4(y: float) -> int:
    """The CUDA kernel's dQuantizeFP4, in float32 numbers that Python holds exactly."""
    bounds = [float(torch.tensor(t)) for t in (0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667)]
    bounds += [float(torch.tensor(t)) for t in (0.583333, 0.8333333)]
    codes = (0b000, 0b001, 0b110, 0b111, 0b100, 0b101, 0b010, 0b011)
    return codes[sum(abs(y) > t for t in bounds)] + (8 if y < 0 else 0)


def cuda_dynamic(y: float, code: list[float]) -> int:
    """The CUDA kernel's dQuantize<0>: halving, then one comparison with a midpoint."""
    pivot, upper_pivot, lower_pivot = 127, 255, 0
    for i in (64, 32, 16, 8, 4, 2, 1):
        if y > code[pivot]:
            lower_pivot, pivot = pivot, pivot + i
        else:
            upper_pivot, pivot = pivot, pivot - i
    if y > code[pivot]:
        return upper_pivot if y > half(code[upper_pivot], code[pivot]) else pivot
    return lower_pivot if y < half(code[lower_pivot], code[pivot]) else pivot


def half(a: float, b: float) -> float:
    return float((torch.tensor(a) + torch.tensor(b)) * 0.5)


@pytest.mark.parametrize("name", ["fp4", "dynamic_tree"])
def test_codes_equal_the_cuda_source(device: str, name: str) -> None:
    near = tables.thresholds(name, "cuda", "cpu")
    steps = [torch.nextafter(near, torch.tensor(to)) for to in (-2.0, 2.0)]
    x = torch.cat((near, *steps, torch.tensor([0.0, -0.0, 1e-30, -1e-30]), randn(500).clamp(-1, 1)))
    code = tables.codebook(name, "cpu").tolist()
    expected = [cuda_fp4(v) if name == "fp4" else cuda_dynamic(v, code) for v in x.tolist()]
    ones = torch.ones(-(-len(x) // 64))
    packed, _ = quantize(x.to(device), name, "cuda", 64, ones.to(device))
    assert unpack(packed.cpu(), name, len(x)).tolist() == expected


@pytest.mark.parametrize("rule", tables.RULES)
@pytest.mark.parametrize("name", CODEBOOKS)
def test_values_on_and_beside_thresholds(device: str, name: str, rule: str) -> None:
    near = tables.thresholds(name, rule, "cpu")
    steps = [torch.nextafter(near, torch.tensor(to)) for to in (-2.0, 2.0)]
    x = torch.cat((near, *steps, torch.tensor([0.0, -0.0, 1.0, -1.0, 5.0, -5.0, math.inf, -math.inf, math.nan])))
    bins = [sum(t < v for t in near.tolist()) for v in x.tolist()]
    codes = tables.bin_codes(name, rule, "cpu").tolist()
    expected = [
        tables.nan_code(name, rule) if math.isnan(v) else codes[b] for v, b in zip(x.tolist(), bins, strict=True)
    ]
    ones = torch.ones(-(-len(x) // 4096))
    packed, _ = quantize(x.to(device), name, rule, 4096, ones.to(device))
    assert unpack(packed.cpu(), name, len(x)).tolist() == expected


def test_every_cell_has_the_codes_of_its_values() -> None:
    """Any monotone cutting into cells is right as long as table and kernel cut alike; here in plain numbers."""
    table = kernels.cell_table(tables.thresholds("nf4", "cpu", "cpu"), tables.bin_codes("nf4", "cpu", "cpu"))
    assert len(table) == 64
    for y in torch.linspace(-1, 1, 2001).tolist():
        cell = int(torch.round(torch.tensor(y) * 15)) + 16
        above = y > float(table[32 + cell].view(torch.float32))
        below = sum(t < y for t in tables.thresholds("nf4", "cpu", "cpu").tolist())
        assert int(table[cell]) >> (4 * above) & 15 == below


def test_too_many_thresholds_in_a_cell_are_refused() -> None:
    with pytest.raises(ValueError, match="15 thresholds lie within"):
        kernels.cell_table(torch.linspace(0.1, 0.101, 15), torch.arange(16).to(torch.uint8))


@pytest.mark.parametrize("rule", tables.RULES)
@pytest.mark.parametrize(("name", "byte"), [("nf4", 0x77), ("fp4", 0x00), ("dynamic_tree", 0)])
def test_zero_blocks(device: str, name: str, byte: int, rule: str) -> None:
    packed, absmax = quantize(torch.zeros(128, device=device), name, rule, 64)
    if rule == "cuda":  # 0 times infinity: no comparison is true
        byte = tables.nan_code(name, rule) * (17 if name != "dynamic_tree" else 1)
    assert packed.cpu().eq(byte).all()
    assert absmax.cpu().eq(0).all()


def test_a_nan_shows_in_the_absmax(device: str) -> None:
    x = randn(128).to(device)
    x[70] = math.nan
    _, absmax = quantize(x, "nf4", "cpu", 64)
    assert absmax.isnan().tolist() == [False, True]


# --- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CODEBOOKS)
@given(case=inputs())
@settings(max_examples=10, deadline=None)
def test_values_equal_the_table_times_absmax(device: str, name: str, case: tuple[Tensor, int]) -> None:
    x, block = case
    packed, absmax = quantize(x.to(device), name, "cpu", block)
    table = tables.codebook(name, device)
    values = kernels.launch_codebook_dequantize(packed, absmax, table, len(x), block_size=block, dtype=x.dtype)
    codes = unpack(packed.cpu(), name, len(x)).long()
    exact = table.cpu()[codes] * absmax.cpu().repeat_interleave(block)[: len(x)]
    assert torch.equal(values.cpu(), exact.to(x.dtype))


@pytest.mark.parametrize("name", CODEBOOKS)
def test_everything_is_written_and_nothing_else(device: str, name: str, poisoned: None) -> None:
    x = randn(4096 + 131).to(device).bfloat16()
    packed, absmax = quantize(x, name, "cpu", 64)
    again, _ = quantize(x, name, "cpu", 64, absmax)
    assert torch.equal(packed, again)
    table = tables.codebook(name, device)
    values = kernels.launch_codebook_dequantize(packed, absmax, table, len(x), block_size=64, dtype=x.dtype)
    assert values.isfinite().all()
    assert (values - x).abs().max() < 0.7  # half the widest gap times the largest absmax


@pytest.mark.parametrize("name", CODEBOOKS)
def test_empty(device: str, name: str) -> None:
    packed, absmax = quantize(torch.empty(0, device=device), name, "cpu", 64)
    assert packed.numel() == absmax.numel() == 0
    table = tables.codebook(name, device)
    assert kernels.launch_codebook_dequantize(packed, absmax, table, 0, block_size=64, dtype=torch.half).numel() == 0


@pytest.mark.parametrize("block", [8, 96, 8192])
def test_a_block_size_without_a_kernel_is_named(device: str, block: int) -> None:
    with pytest.raises(ValueError, match=f"block_size={block} has no kernel; use a power of two"):
        quantize(torch.ones(4, device=device), "nf4", "cpu", block)


# --- the compiler ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(kernels.TUNED))
def test_compiles_without_spills(compiler: None, name: str) -> None:
    aot.check(kernels.TUNED[name])


def test_the_reciprocal_is_rounded_and_nothing_is_fused(compiler: None) -> None:
    text = aot.ptx(kernels.TUNED["nf4_quantize_64"])
    assert "div.rn.f32" in text
    assert "fma" not in text

"""The shared arithmetic against PyTorch's, and the interpreter's conversions, on which all other tests rest."""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_qat.kernels.arithmetic import divide, divisor_of, magnitude, round_half_even
from lightning_qat.kernels.launch import EXACT

BLOCK = 8192


@triton.jit
def convert_kernel(x_ptr, out_ptr, size, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x_ptr + at, mask=at < size)
    tl.store(out_ptr + at, value.to(out_ptr.dtype.element_ty), mask=at < size)


@triton.jit
def round_kernel(x_ptr, out_ptr, size, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, round_half_even(tl.load(x_ptr + at, mask=at < size)), mask=at < size)


@triton.jit
def divide_kernel(x_ptr, step_ptr, out_ptr, size, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    factor, divisor, reciprocal, rest = divisor_of(tl.load(step_ptr + at, mask=at < size, other=1.0))
    quotient = divide(tl.load(x_ptr + at, mask=at < size) * factor, divisor, reciprocal, rest)
    tl.store(out_ptr + at, quotient, mask=at < size)


@triton.jit
def magnitude_kernel(x_ptr, out_ptr, COLUMNS: tl.constexpr):
    at = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(out_ptr + tl.program_id(0) + tl.arange(0, 1), magnitude(tl.load(x_ptr + at), 1))


def launch(kernel: object, *inputs: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    result = torch.full_like(inputs[0], math.nan, dtype=dtype)
    kernel[(-(-len(result) // BLOCK),)](*inputs, result, len(result), BLOCK=BLOCK, **EXACT)  # type: ignore[index]
    return result.cpu()


def bits(count: int, seed: int = 0) -> Tensor:
    """Return floats of all magnitudes: random bits, NaN and infinity among them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, (count,), generator=generator).to(torch.int32).view(torch.float32)


def same(actual: Tensor, expected: Tensor) -> bool:
    """Whether all bits are equal, but for those of a NaN."""
    numbers = ~expected.isnan()
    integers = {2: torch.int16, 4: torch.int32}[expected.dtype.itemsize]
    return torch.equal(actual.isnan(), expected.isnan()) and torch.equal(
        actual[numbers].view(integers), expected[numbers].view(integers)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_conversions_are_those_of_the_hardware(device: str, dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    assert same(launch(convert_kernel, every.to(device)), every.float())
    between = (every[:-1].float() + every[1:].float()) / 2  # ties, which go to the even neighbour
    for values in (bits(100_000), between, torch.nextafter(between, torch.tensor(math.inf))):
        assert same(launch(convert_kernel, values.to(device), dtype=dtype), values.to(dtype))


def test_rounding_is_half_to_even(device: str) -> None:
    halves = torch.arange(-70_000, 70_000) + 0.5
    edges = 2.0 ** torch.arange(18, 30).float()
    near = torch.cat([edges, torch.nextafter(edges, torch.tensor(0.0)), edges + 0.5, -edges - 0.5, edges / 2 + 0.5])
    for values in (halves, near, bits(100_000), torch.tensor([0.0, -0.0, 0.5, -0.5, -0.2, math.inf, math.nan])):
        assert same(launch(round_kernel, values.to(device)), torch.round(values))


def check_quotients(x: Tensor, step: Tensor, device: str) -> None:
    expected = x / step
    actual = launch(divide_kernel, x.to(device), step.to(device))
    decides = (expected.abs() > 2.0**-50) & (expected.abs() < 2.0**40)
    assert decides.float().mean() > 0.1
    assert same(actual[decides], expected[decides])
    assert (actual[expected.abs() <= 2.0**-50].abs() < 0.25).all()


@pytest.mark.parametrize("exponent", [-126, -100, -61, -60, -59, -20, 0, 3, 59, 60, 61, 100, 127])
def test_quotients_are_rounded_correctly(device: str, exponent: int) -> None:
    generator = torch.Generator().manual_seed(exponent)
    mantissa = 1 + torch.randint(0, 2**23, (20_000,), generator=generator) / 2**23
    mantissa[:4000] = 2 - torch.randint(1, 2000, (4000,), generator=generator) / 2**23  # the hardest reciprocals
    step = mantissa.double().mul(2.0**exponent).float()
    codes = torch.randint(-(2**16), 2**16, (20_000,), generator=generator) + 0.5
    codes[::2] = torch.randint(-128, 128, (10_000,), generator=generator) + 0.5
    near = (codes.double() * step.double()).float()  # quotients on ties and next to them
    near = torch.where(near.isfinite(), near, step / 2)
    for x in (near, torch.nextafter(near, torch.tensor(math.inf)), torch.nextafter(near, torch.tensor(-math.inf))):
        check_quotients(x, step, device)
        check_quotients(-x, -step, device)


def test_quotients_next_to_rounding_boundaries(device: str) -> None:
    # x = q * step where q lies in the middle of two floats, the only place where a wrong last place could come from.
    generator = torch.Generator().manual_seed(1)
    step = 1 + torch.randint(0, 2**23, (60_000,), generator=generator) / 2**23
    middle = torch.randint(2**24, 2**25, (60_000,), generator=generator).double() * 2 + 1
    for exponent in (-26, -22, -18, -12):
        check_quotients((middle * 2.0**exponent * step.double()).float(), step, device)


def test_denormal_steps(device: str) -> None:
    step = torch.arange(1, 20_001).to(torch.int32).view(torch.float32)
    codes = torch.randint(-200, 200, (20_000,), generator=torch.Generator().manual_seed(2)) + 0.5
    check_quotients((codes.double() * step.double()).float(), step, device)


def test_every_bfloat16_by_many_steps(device: str) -> None:
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16).float()
    every = every[every.isfinite()]
    for step in (0.1, 1 / 3, 0.0078125, 0.99999994, 1.9999999, 2.0**-126, 3e-39):
        check_quotients(every, torch.full_like(every, step), device)


@pytest.mark.parametrize("special", [0.0, math.inf, -math.inf, math.nan, -3.0, 2.0**-149])
def test_magnitude(device: str, special: float) -> None:
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(3)) * 2.0**-149
    x[1, 5] = special
    result = torch.empty(3, device=device)
    magnitude_kernel[(3,)](x.to(device), result, COLUMNS=16)
    assert same(result.cpu(), x.abs().amax(1))

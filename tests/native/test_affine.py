"""Integer codes in C++ are those of PyTorch's operations, on any number of threads and any processor."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native.bits import DTYPES, another_processor, fine_grained, same_bits, values
from tensors import randn
from torch import Tensor

from lightning_qat.native import affine as native
from lightning_qat.native.library import without_native
from lightning_qat.ops.affine import codes_dtype, dequantize_affine, quantize_affine
from lightning_qat.ops.affine_cpu import dequantize_pieces
from lightning_qat.ops.fake_quantize import quant_range
from lightning_qat.ops.quantize_packed import quantize_packed, reference_quantize_packed

pytestmark = pytest.mark.skipif(native._FAMILY.functions() is None, reason="no C++ compiler")


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor | None, int, bool]:
    """Return ``[runs, run]`` values, their scales, zero points or None, bits and whether the grid is symmetric."""
    x = draw(values())
    run = min(draw(st.sampled_from((1, 2, 3, 32, 100, 128, 1024, 1025, 5000))), len(x))
    x = x[: len(x) // run * run].view(-1, run)
    generator = torch.Generator().manual_seed(run)
    scale = torch.rand(len(x), generator=generator) * draw(st.sampled_from((1.0, 1e-3, 1e-38))) + 1e-40
    bits, symmetric = draw(st.sampled_from((2, 3, 4, 4, 4, 7, 8, 8))), draw(st.booleans())
    zero = None
    if not symmetric:
        low, high = quant_range(bits, symmetric)
        zero = torch.randint(low, high + 1, (len(x),), generator=generator).to(torch.int32)
        # Zero points beside the grid and between its codes take another path, or are rounded.
        zero = draw(st.sampled_from((zero, zero, zero + 0.3, zero.double(), zero + 1000)))
    return x, scale, zero, bits, symmetric


def everything(x: Tensor, scale: Tensor, zero: Tensor | None, bits: int, symmetric: bool) -> list[Tensor]:
    """Return what the functions give for one tensor."""
    codes = quantize_affine(x, scale, zero, bits=bits, symmetric=symmetric, axis=0)
    found = [codes, *(dequantize_affine(codes, scale, zero, axis=0, dtype=dtype) for dtype in DTYPES)]
    found.append(dequantize_affine(codes.to(torch.int16), scale, zero, axis=0))
    if bits in (4, 8):
        found.append(quantize_packed(x, scale, zero, bits=bits, symmetric=symmetric, run=x.shape[1]))
    return found


def assert_same(*case: Tensor | int | bool | None) -> None:
    found = everything(*case)  # type: ignore[arg-type]
    with without_native():
        expected = everything(*case)  # type: ignore[arg-type]
    for place, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert same_bits(one, other), place


@settings(max_examples=150, deadline=None)
@given(cases(), st.integers(1, 4))
def test_bits_are_those_of_pytorchs_operations(
    case: tuple[Tensor, Tensor, Tensor | None, int, bool], threads: int
) -> None:
    with fine_grained(threads):
        assert_same(*case)


@settings(max_examples=25, deadline=None)
@given(cases())
def test_another_processor_gets_the_same_bits(
    tmp_path_factory: pytest.TempPathFactory, case: tuple[Tensor, Tensor, Tensor | None, int, bool]
) -> None:
    with another_processor(native._FAMILY, tmp_path_factory.getbasetemp()):
        assert_same(*case)


@pytest.mark.parametrize("symmetric", [True, False])
def test_every_tie_goes_to_the_even_code(symmetric: bool) -> None:
    x = torch.arange(-300, 301).view(1, -1) / 2
    zero = None if symmetric else torch.tensor([7], dtype=torch.int32)
    codes = quantize_affine(x, torch.ones(1), zero, bits=8, symmetric=symmetric, axis=0)
    low, high = quant_range(8, symmetric)
    expected = [min(max(round(value) + (0 if symmetric else 7), low), high) for value in x[0].tolist()]
    assert codes[0].tolist() == expected
    assert codes.dtype == codes_dtype(8, symmetric)


def test_4_bits_have_no_tensor_of_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    x, scale = randn(3, 100), torch.tensor([0.1, 0.2, 0.3])
    expected = reference_quantize_packed(x, scale, None, 4, True, 100)
    monkeypatch.setattr("lightning_qat.ops.quantize_packed.quantize_affine", lambda *_: pytest.fail("codes"))
    assert torch.equal(quantize_packed(x, scale, bits=4, symmetric=True, run=100), expected)


def test_the_default_device_does_not_matter() -> None:
    x, scale = randn(3, 100), torch.tensor([0.1, 0.2, 0.3])
    expected = everything(x, scale, None, 4, True)
    with torch.device("meta"):
        packed = quantize_packed(x, scale, bits=4, symmetric=True, run=100)
        codes = quantize_affine(x, scale, bits=4, symmetric=True, axis=0)
        values_ = dequantize_affine(codes, scale, axis=0)
    for one, other in zip((codes, values_, packed), (expected[0], expected[1], expected[-1]), strict=True):
        assert same_bits(one, other)


def test_what_there_is_no_kernel_for() -> None:
    scale = torch.ones(1)
    for x in (randn(8).double(), torch.empty(0)):
        assert not native.quantize(x, scale, None, 8, torch.empty(8, dtype=torch.int8), -8, 7, nibbles=False)
        assert not native.dequantize(torch.ones(8, dtype=torch.int8), scale, None, 8, x)
    codes = torch.arange(8, dtype=torch.int16)
    assert not native.dequantize(codes, scale, None, 8, torch.empty(8))
    assert dequantize_pieces(codes, scale, None, 8, torch.float32).tolist() == list(range(8))

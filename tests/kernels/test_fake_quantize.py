"""Fake quantization and its gradients: the Triton kernels against the definition, on the CPU."""

from __future__ import annotations

from math import prod

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import HealthCheck, given, settings
from kernels.cases import DTYPES, Case, cases, same
from torch import Tensor

from lightning_qat.kernels import fake_quantize_backward as backward_file
from lightning_qat.kernels import tiles as tiles_file
from lightning_qat.kernels.fake_quantize import fake_quantize_triton
from lightning_qat.kernels.fake_quantize_backward import fake_quantize_backward_triton
from lightning_qat.ops import fake_quantize_cuda
from lightning_qat.ops.fake_quantize import (
    EDGE,
    fake_quantize_backward_op,
    fake_quantize_op,
    reference_fake_quantize,
    reference_fake_quantize_backward,
)

SETTINGS = settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def cpu(case: Case) -> tuple[Tensor, Tensor, Tensor | None, int, int, int, int]:
    return case.x, case.scale, case.zero_point, *case.grid


@SETTINGS
@given(case=cases())
def test_forward_equals_the_definition(device: str, poisoned: None, case: Case) -> None:
    arguments = case.on(device)
    result = fake_quantize_triton(*arguments)
    assert same(result, reference_fake_quantize(*cpu(case)))
    assert result.stride() == torch.empty_like(arguments[0]).stride()


def terms_of(case: Case, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums of absolute terms: what a rounding error of the sums is relative to."""
    x, scale, zero, quant_min, quant_max, axis, _ = cpu(case)
    view = (1, scale.numel(), -1)
    if axis >= 0:
        view = (prod(x.shape[:axis]), x.shape[axis], prod(x.shape[axis + 1 :]))
    step, size = scale.double().reshape(1, -1, 1), grad.abs().reshape(view)
    most = (x.double().reshape(view) / step).abs().clamp(max=float(quant_max - quant_min)) + 1
    if zero is not None:
        most = most + zero.double().abs().reshape(1, -1, 1)
    return (size * most).sum((0, 2)), (size * step).sum((0, 2))


@SETTINGS
@given(case=cases())
def test_gradients_equal_the_definition(device: str, poisoned: None, case: Case) -> None:
    arguments = case.on(device)
    grad = torch.randn(case.x.shape, generator=torch.Generator().manual_seed(1)).to(case.x.dtype)
    floating = case.zero_point is not None and case.zero_point.is_floating_point()
    needs = [True, True, floating]
    expected = reference_fake_quantize_backward(grad, *cpu(case), needs)
    actual = fake_quantize_backward_triton(grad.to(device), *arguments, needs)
    assert same(actual[0], expected[0])
    assert actual[0].stride() == torch.empty_like(arguments[0]).stride()
    sizes = terms_of(case, grad.double())
    for a, e, size, needed in zip(actual[1:], expected[1:], sizes, needs[1:], strict=True):
        if needed:
            close(a.cpu(), e, size)
        else:
            assert a.numel() == e.numel() == 0


def close(actual: Tensor, expected: Tensor, size: Tensor) -> None:
    """Demand float32 sums of the same terms in another order, rounded to the dtype.

    Sums on both sides of a tie round apart by a unit in the last place, which is 2^-7 of a bfloat16 just above a power
    of two.
    """
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    finite = expected.double().isfinite() & (size < 1e36)
    error = (actual.double() - expected.double()).abs()[finite]
    rounding = 2.0**-7 if expected.dtype == torch.bfloat16 else 2.0**-23
    assert (error <= size[finite] * 2.0**-20 + expected.double().abs()[finite] * rounding + 1e-40).all()
    assert torch.equal(actual.isnan()[size < 1e36], expected.isnan()[size < 1e36])


@pytest.mark.parametrize("needs", [[True, False, False], [False, True, False], [False, False, True], [False] * 3])
def test_only_what_is_needed(device: str, poisoned: None, needs: list[bool]) -> None:
    x, grad = torch.randn(2, 6, 40, device=device)
    scale, zero = torch.rand(6, device=device) + 0.1, torch.full((6,), 3.0, device=device)
    arguments = (grad, x, scale, zero, 0, 15, 0, 0)
    expected = reference_fake_quantize_backward(*arguments, needs)
    for a, e in zip(fake_quantize_backward_triton(*arguments, needs), expected, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("shape", [(500, 7), (7, 500), (10, 5, 90)])
@pytest.mark.parametrize("axis", [-1, 0, 1])
def test_tiles_that_are_shared(
    device: str, poisoned: None, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], axis: int
) -> None:
    # As in a tensor too large for these tests: a program adds up several tiles, and rows have several programs.
    monkeypatch.setattr(backward_file, "_PROGRAMS", 4)
    monkeypatch.setattr(tiles_file, "_FEW_BYTES", 512)
    x, grad = (t.contiguous() for t in torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)))
    scale = torch.full((shape[axis] if axis >= 0 else 1,), 0.02)
    zero = torch.full_like(scale, 100.0)
    rest = (0, 255, axis, 0, [True, True, True])
    expected = reference_fake_quantize_backward(grad, x, scale, zero, *rest)
    inputs = [t.to(device) for t in (grad, x, scale, zero)]
    actual = fake_quantize_backward_triton(*inputs, *rest)
    assert same(actual[0], expected[0])
    for a, e in zip(actual[1:], expected[1:], strict=True):
        torch.testing.assert_close(a.cpu(), e, rtol=2e-4, atol=2e-4 * float(e.abs().max()))
    again = fake_quantize_backward_triton(*inputs, *rest)
    assert all(torch.equal(a, b) for a, b in zip(actual, again, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_of_both_signs(device: str, dtype: torch.dtype) -> None:
    # A learned scale may cross zero on the way; what it does there is what the definition does.
    x = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)).to(dtype)
    scale = torch.tensor([0.1, -0.1, -1e-40, 3e38])
    result = fake_quantize_triton(x.to(device), scale.to(device), None, -8, 7, 0, 0)
    assert same(result, reference_fake_quantize(x, scale, None, -8, 7, 0, 0))


def test_the_edge_is_that_of_the_definition(device: str) -> None:
    assert backward_file.EDGE == EDGE


@pytest.mark.parametrize("zero_point", [None, 3.0])
def test_elements_on_the_edges(device: str, zero_point: float | None) -> None:
    scale = torch.tensor([0.1, 0.37, 3e-5])
    zero = None if zero_point is None else torch.full_like(scale, zero_point)
    edges = torch.stack([(-8 - EDGE - (zero_point or 0.0)) * scale, (7 + EDGE - (zero_point or 0.0)) * scale], dim=1)
    x = torch.cat([edges, edges.nextafter(torch.zeros(())), edges.nextafter(edges * 2)], dim=1)
    rest = (-8, 7, 0, 0, [True, False, False])
    expected = reference_fake_quantize_backward(torch.ones_like(x), x, scale, zero, *rest)[0]
    assert expected.tolist() == [[0.0, 0.0, 1.0, 1.0, 0.0, 0.0]] * 3
    inputs = [t if t is None else t.to(device) for t in (x, scale, zero)]
    assert same(fake_quantize_backward_triton(torch.ones_like(inputs[0]), *inputs, *rest)[0], expected)


@triton.jit
def locate_kernel(base_ptr, last_ptr, row_tile, column_tile, rows, columns, MODE: tl.constexpr):
    base, offsets, mask = tiles_file.locate(row_tile, column_tile, rows, columns, MODE, 4, 8)
    tl.store(base_ptr, base)
    tl.store(last_ptr, tl.max(tl.max(tl.where(mask, offsets, -1).to(tl.int64), axis=1), axis=0))


@pytest.mark.parametrize(
    ("mode", "tile", "size", "base", "last"),
    [
        (1, (2**20, 0), (2**22 + 3, 7), 2**22 * 7, 2 * 7 + 6),
        (1, (2**28, 0), (2**30 + 4, 8), 2**33, 31),
        (2, (1, 2**27), (8, 2**30 + 1), 4 * (2**30 + 1) + 2**30, 3 * (2**30 + 1)),
    ],
)
def test_offsets_are_wide(
    device: str, mode: int, tile: tuple[int, int], size: tuple[int, int], base: int, last: int
) -> None:
    found = torch.zeros(2, dtype=torch.int64, device=device)
    locate_kernel[(1,)](found[:1], found[1:], *tile, *size, MODE=mode)
    assert found.tolist() == [base, last]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_the_ops_take_the_kernels(dtype: torch.dtype) -> None:
    x = torch.randn(8, 100, device="cuda", dtype=dtype)
    scale = torch.rand(8, device="cuda") + 0.1
    arguments = (x, scale, None, -8, 7, 0, 0)
    assert same(fake_quantize_op(*arguments), reference_fake_quantize(*arguments))
    gradients = fake_quantize_backward_op(x, *arguments, [True, True, False])
    torch.testing.assert_close(gradients[1], reference_fake_quantize_backward(x, *arguments, [True, True, False])[1])


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("size", [0, 1, 30])
def test_what_is_registered_takes_everything(device: str, dtype: torch.dtype, size: int) -> None:
    x = torch.linspace(-3, 3, size, dtype=dtype, device=device)
    arguments = (x, torch.tensor(0.5, device=device), None, -2, 1, -1, 0)
    assert same(fake_quantize_cuda.fake_quantize_cuda(*arguments), reference_fake_quantize(*arguments))
    for needs in ([True, True, False], [True, False, False]):
        actual = fake_quantize_cuda.fake_quantize_backward_cuda(torch.ones_like(x), *arguments, needs)
        expected = reference_fake_quantize_backward(torch.ones_like(x), *arguments, needs)
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e)

"""What a training step with a codebook runs, each in one launch: absmax, fake quantization and its gradient."""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernels import aot
from kernels.cases import DTYPES, SPECIAL, same, within
from tensors import randn
from torch import Tensor

from lightning_qat.kernels import codebook as codebook_file
from lightning_qat.kernels import codebook_fake_quantize as kernels
from lightning_qat.native.library import without_native
from lightning_qat.ops import codebook as ops
from lightning_qat.ops import codebook_cuda
from lightning_qat.ops.codebook_tables import CODEBOOK_BITS, RULES

SETTINGS = settings(
    max_examples=35, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
NAMES = tuple(CODEBOOK_BITS)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Return values of any layout, with zeros, denormals and what is no number."""
    shape = draw(st.lists(st.sampled_from((1, 2, 3, 7, 16, 64, 65)), min_size=1, max_size=3))
    shape = within(shape, 3000) if draw(st.booleans()) else [draw(st.sampled_from((4095, 4096, 4097, 9001)))]
    dtype = draw(st.sampled_from(DTYPES))
    size = 1.0 if dtype == torch.float16 else 2.0 ** draw(st.sampled_from((-140, -126, 0, 100)))
    x = (randn(*shape, seed=draw(st.integers(0, 2**16))) * size).to(dtype)
    for value in draw(st.lists(st.sampled_from(SPECIAL), max_size=4)):
        x.view(-1)[draw(st.integers(0, x.numel() - 1))] = value
    layout = draw(st.sampled_from(("plain", "reversed", "strided", "zeros")))
    if layout == "reversed":
        order = tuple(reversed(range(x.dim())))
        return x.permute(order).contiguous().permute(order)
    if layout == "strided":
        return torch.stack((x, torch.full_like(x, math.nan)), dim=-1)[..., 0]
    if layout == "zeros":
        x.view(-1)[: x.numel() // 2] = 0.0
    return x


BLOCKS = st.sampled_from((16, 32, 64, 256, 1024, 4096))


@SETTINGS
@given(tensors(), BLOCKS, st.sampled_from(NAMES), st.sampled_from(RULES))
def test_absmax_is_the_definition(
    device: str, poisoned: None, x: Tensor, block_size: int, name: str, rule: str
) -> None:
    found = codebook_cuda.codebook_absmax_cuda(x.to(device), name, block_size, rule)
    assert same(found, ops.reference_absmax(x.reshape(-1), name, block_size, rule))
    if device == "cpu":  # the kernel of the CPU, compiled and not
        assert same(found, ops.codebook_absmax_op(x, name, block_size, rule))
        with without_native():
            assert same(found, ops.codebook_absmax_op(x, name, block_size, rule))


def absmax_for(x: Tensor, block_size: int, kind: str) -> Tensor:
    absmax = ops.reference_absmax(x.nan_to_num(0.0, 3.0, -3.0).reshape(-1), "nf4", block_size, "cuda")
    # As a scale that was frozen, or comes of other values: some are beyond it.
    return {"own": absmax, "half": absmax * 0.5, "zero": absmax * 0.0, "infinite": absmax / 0.0}[kind]


SCALES = st.sampled_from(("own", "own", "half", "zero", "infinite"))


@SETTINGS
@given(tensors(), BLOCKS, st.sampled_from(NAMES), st.sampled_from(RULES), SCALES, st.booleans())
def test_values_are_the_definition(
    device: str, poisoned: None, x: Tensor, block_size: int, name: str, rule: str, kind: str, nested: bool
) -> None:
    absmax = absmax_for(x, block_size, kind)
    stored = absmax * 0.97 if nested else None
    moved = x.to(device), absmax.to(device), None if stored is None else stored.to(device)
    found = codebook_cuda.codebook_fake_quantize_cuda(*moved, name, block_size, rule)
    assert same(found, ops.reference_fake_quantize(x, absmax, stored, name, block_size, rule))
    assert found.stride() == torch.empty_like(moved[0]).stride()
    if device == "cpu":
        assert same(found, ops.codebook_fake_quantize_op(x, absmax, stored, name, block_size, rule))


@SETTINGS
@given(tensors(), BLOCKS, SCALES, st.sampled_from(("plain", "transposed", "expanded")))
def test_the_gradient_is_the_definition(
    device: str, poisoned: None, x: Tensor, block_size: int, kind: str, layout: str
) -> None:
    absmax = absmax_for(x, block_size, kind)
    grad = randn(*x.shape, seed=1).to(x.dtype)
    grad.view(-1)[0] = math.nan
    if layout == "transposed":
        grad = grad.transpose(0, -1).contiguous().transpose(0, -1)
    elif layout == "expanded":  # what a sum sends back
        grad = torch.ones((), dtype=x.dtype).expand(x.shape)
    moved = [t.to(device) for t in (grad, x, absmax)]
    found = codebook_cuda.codebook_fake_quantize_backward_cuda(*moved, block_size)
    assert same(found, ops.reference_fake_quantize_backward(grad, x, absmax, block_size))
    assert found.stride() == torch.empty_like(moved[1]).stride()
    if device == "cpu":
        assert same(found, ops.codebook_fake_quantize_backward_op(grad, x, absmax, block_size))


def test_the_edge_is_that_of_the_definition(device: str) -> None:
    assert kernels.EDGE == ops.EDGE
    absmax = torch.tensor([0.1, 0.37, 3e-5, 3e38])
    edges = (absmax * ops.EDGE)[:, None]
    x = torch.cat((edges, -edges, edges.nextafter(torch.zeros(())), edges.nextafter(edges * 2)), 1)
    x = torch.cat((x, torch.zeros(4, 12)), 1)
    arguments = [t.to(device) for t in (torch.ones_like(x), x, absmax)]
    found = codebook_cuda.codebook_fake_quantize_backward_cuda(*arguments, 16)
    assert found[:, :4].tolist() == [[1.0, 1.0, 1.0, 0.0]] * 4


@pytest.mark.parametrize("name", NAMES)
def test_values_on_and_beside_thresholds(device: str, name: str) -> None:
    for rule in RULES:
        near = codebook_cuda.thresholds(name, rule, "cpu")
        steps = [torch.nextafter(near, torch.tensor(to)) for to in (-2.0, 2.0)]
        x = torch.cat((near, *steps))
        ones = torch.ones(-(-len(x) // 64))
        found = codebook_cuda.codebook_fake_quantize_cuda(x.to(device), ones.to(device), None, name, 64, rule)
        assert torch.equal(found.cpu(), ops.reference_fake_quantize(x, ones, None, name, 64, rule))


@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_number(device: str, name: str) -> None:
    row = torch.tensor([*SPECIAL, 1.0, -2.0, 1e-42, 7.0, 0.25])
    absmax = torch.tensor([1.0, 0.0, math.inf, math.nan, 1e-42])
    x = row.repeat(len(absmax), 1)
    assert row.numel() == 16
    for rule in RULES:
        found = codebook_cuda.codebook_fake_quantize_cuda(x.to(device), absmax.to(device), None, name, 16, rule)
        assert same(found, ops.reference_fake_quantize(x, absmax, None, name, 16, rule))
    moved = [t.to(device) for t in (torch.ones_like(x), x, absmax)]
    gradient = codebook_cuda.codebook_fake_quantize_backward_cuda(*moved, 16).cpu()
    assert same(gradient, ops.reference_fake_quantize_backward(torch.ones_like(x), x, absmax, 16))
    assert gradient[2][row.isinf()].eq(0).all()  # beyond everything, even where the absmax is infinite


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_a_short_block_is_divided(device: str, name: str) -> None:
    near, told_apart = codebook_cuda.thresholds(name, "cpu", "cpu"), 0
    for absmax in (torch.rand(30, generator=torch.Generator().manual_seed(0)) + 0.5).split(1):
        x = torch.cat(
            (absmax, near * absmax, *[torch.nextafter(near * absmax, torch.tensor(to)) for to in (-2.0, 2.0)])
        )
        expected = ops.reference_fake_quantize(x, absmax, None, name, 64, "cpu")
        told_apart += not torch.equal(expected, ops.reference_fake_quantize(x, absmax, None, name, len(x), "cpu"))
        found = codebook_cuda.codebook_fake_quantize_cuda(x.to(device), absmax.to(device), None, name, 64, "cpu")
        assert torch.equal(found.cpu(), expected)
    assert told_apart > 3  # from a block that is whole and multiplied by the reciprocal


@pytest.mark.parametrize("block_size", [64, 48])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(0,), (3, 0), (), (1,), (5, 30)])
def test_what_is_registered_takes_everything(
    device: str, shape: tuple[int, ...], dtype: torch.dtype, block_size: int
) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device=device, dtype=dtype)
    absmax = codebook_cuda.codebook_absmax_cuda(x, "fp4", block_size, "cpu")
    assert same(absmax, ops.reference_absmax(x.reshape(-1), "fp4", block_size, "cpu"))
    found = codebook_cuda.codebook_fake_quantize_cuda(x, absmax, None, "fp4", block_size, "cpu")
    assert same(found, ops.reference_fake_quantize(x, absmax, None, "fp4", block_size, "cpu"))
    gradient = codebook_cuda.codebook_fake_quantize_backward_cuda(x, x, absmax, block_size)
    assert same(gradient, ops.reference_fake_quantize_backward(x, x, absmax, block_size))


def test_launchers_name_what_they_do_not_take(device: str) -> None:
    x = torch.ones(96, device=device)
    with pytest.raises(ValueError, match="block_size=96 has no kernel; use a power of two"):
        codebook_file.launch_codebook_absmax(x, block_size=96)
    with pytest.raises(ValueError, match="block_size=8 has no kernel; use a power of two"):
        kernels.launch_codebook_fake_quantize_backward(x, x, x[:12], block_size=8)
    empty = x[:0]
    assert codebook_file.launch_codebook_absmax(empty, block_size=64).numel() == 0
    assert kernels.launch_codebook_fake_quantize_backward(empty, empty, empty, block_size=64).numel() == 0


@triton.jit
def place_kernel(found_ptr, program, numel):
    tile, first, left = codebook_file.tile_of_blocks(program, numel, 4096)
    tl.store(found_ptr, tile)
    tl.store(found_ptr + 1, first)
    tl.store(found_ptr + 2, left.to(tl.int64))


def test_offsets_are_wide(device: str) -> None:
    found = torch.zeros(3, dtype=torch.int64, device=device)
    place_kernel[(1,)](found, 2**21 + 1, 2**33 + 4096 + 77)
    assert found.tolist() == [2**21 + 1, 2**33 + 4096, 77]


# --- the compiler ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(kernels.TUNED))
def test_memory_is_walked_in_accesses_of_16_bytes(compiler: None, name: str) -> None:
    text = aot.ptx(kernels.TUNED[name])
    assert "ld.global.v4.b32" in text
    assert "st.global.v4.b32" in text
    assert "fma" not in text
    assert ".ftz" not in text
    assert "atom" not in text
    assert ("div.rn.f32" in text) == (not name.startswith("backward"))
    assert "div.full" not in text


def test_absmax_is_read_once(compiler: None) -> None:
    text = aot.ptx(codebook_file.TUNED["absmax_64"])
    elements = codebook_file.TUNED["absmax_64"].constexprs["ROWS"] * 64
    assert text.count("ld.global") == text.count("ld.global.v4.b32") == elements // (8 * 32 * 4)

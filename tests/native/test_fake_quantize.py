"""The native kernels give the bits of PyTorch's operations, on any number of threads."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native.bits import same_bits

from lightning_qat.native import build, library
from lightning_qat.native import fake_quantize as native
from lightning_qat.native.library import without_native
from lightning_qat.ops.fake_quantize import fake_quantize_backward_op, fake_quantize_op, quant_range
from lightning_qat.ops.observe import fake_quantize_by_absmax, observe_fake_quantize_cpu, row_extremes
from lightning_qat.schemes import TensorFormat, get_scheme

pytestmark = pytest.mark.skipif(not native.has_kernels(torch.empty(1)), reason="no C++ compiler")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SPECIAL = [0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-42, -3e38, 0.5, -0.5, 1.5]
#: Channel dimension, group size.
LAYOUTS = [(None, None), (0, None), (1, None), (-1, None), (None, 4)]


@pytest.fixture(autouse=True)
def _fine_grained(monkeypatch):
    """Let small tensors go over threads, pieces and blocks."""
    monkeypatch.setattr(library, "GRAIN", 7)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@st.composite
def cases(draw):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(1, 9), min_size=2, max_size=4))
    axis, group = draw(st.sampled_from(LAYOUTS))
    if group:
        shape[-1] *= group
    x = torch.randn(shape, generator=generator) * 3
    where = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.2]))
    x[where] = torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), (int(where.sum()),), generator=generator)]
    x = x.to(dtype)
    if draw(st.booleans()):
        x = x.to(memory_format=torch.channels_last) if x.dim() == 4 and group is None else x.mT.contiguous().mT
    count = 1 if axis is None and not group else x.shape[axis] if group is None else x.numel() // group
    scale = torch.rand(count, generator=generator) + 1e-3
    zero = None
    symmetric = draw(st.booleans())
    bits = draw(st.sampled_from([2, 4, 8, 12]))
    if not symmetric:
        zero = torch.randint(0, 2**bits, (count,), generator=generator, dtype=torch.int32)
        zero = draw(st.sampled_from([zero, zero + 0.3, zero.double(), zero.long()]))
    if group and not x.is_contiguous():
        x = x.contiguous()
    op_axis = -1 if axis is None else axis % x.dim()
    return x, (scale, zero, *quant_range(bits, symmetric), op_axis, group or 0), draw(st.integers(1, 4))


@given(cases())
@settings(max_examples=300, deadline=None)
def test_values(case) -> None:
    x, arguments, threads = case
    torch.set_num_threads(threads)
    actual = fake_quantize_op(x, *arguments)
    torch.set_num_threads(1)
    with without_native():
        assert same_bits(actual, fake_quantize_op(x, *arguments))


@given(cases(), st.sampled_from([[True, False, False], [True, True, False], [True, True, True], [False, True, True]]))
@settings(max_examples=300, deadline=None)
def test_gradients(case, needs) -> None:
    x, (scale, zero, *grid), threads = case
    learned = zero is None or zero.is_floating_point()
    needs = [needs[0], needs[1], needs[2] and zero is not None and learned]
    grad = torch.randn(x.shape).to(x.dtype)
    arguments = (grad, x, scale, zero, *grid, needs)
    found = []
    for count in (1, threads):
        torch.set_num_threads(count)
        found.append(fake_quantize_backward_op(*arguments))
    torch.set_num_threads(1)
    with without_native():
        expected = fake_quantize_backward_op(*arguments)
    for i in range(3):
        assert torch.equal(found[0][i].nan_to_num(), found[1][i].nan_to_num())  # whatever the threads
        assert found[0][i].shape == expected[i].shape
        assert found[0][i].dtype == expected[i].dtype
    plain = ~x.isnan()
    if needs[0]:
        assert same_bits(torch.where(plain, found[0][0], 0), torch.where(plain, expected[0], 0))
    if bool(plain.all()):
        # Both sum float32 terms, the other in float32 over longer runs.
        most = float(grad.float().abs().sum()) * 2**12 * max(1.0, float(scale.max()))
        torch.testing.assert_close(found[0][1:], expected[1:], rtol=1e-5, atol=1e-7 * most)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("zero", [None, 8])
def test_halves_and_the_ends_of_the_range(dtype, zero) -> None:
    """Halves go to the even code; what lies on the edge itself has no code of its own."""
    scale = torch.tensor(0.25)
    low, high = (-8, 7) if zero is None else (0, 15)
    point = None if zero is None else torch.tensor(zero, dtype=torch.int32)
    shift = zero or 0
    edges = torch.tensor([low - shift - 0.5009765625, high - shift + 0.5009765625])
    x = (torch.cat((torch.arange(-20, 20) + 0.5, edges)) * scale).to(dtype)
    codes = (x.double() / 0.25).round() + shift  # exact, and rounds half to even in float64 too
    expected = ((codes.clamp(low, high) - shift) * 0.25).to(dtype)
    assert torch.equal(fake_quantize_op(x, scale, point, low, high, -1, 0), expected)
    blocked = (x.float() <= edges[0] * scale) | (x.float() >= edges[1] * scale)
    assert bool(blocked[-1]) == bool(blocked[-2]) == (dtype == torch.float32)  # the others round it inwards
    gradient = fake_quantize_backward_op(torch.ones_like(x), x, scale, point, low, high, -1, 0, [True, False, False])[0]
    assert torch.equal(gradient == 0, blocked)
    out = torch.empty_like(x)
    seen = native.quantize_input(x, out, scale, point, low, high)
    assert torch.equal(out, expected)
    assert seen.outside.tolist() == blocked.nonzero().flatten().tolist()


@pytest.mark.parametrize("needs", [[True, True, True], [False, True, True]])
@pytest.mark.parametrize("rows", [1, 3])
def test_sums_are_those_of_exact_terms(rows, needs) -> None:
    """The witness: every term in float64, summed in float64."""
    x, grad = (torch.randn(rows, 50_000, generator=torch.Generator().manual_seed(i)) for i in range(2))
    scale, zero = torch.full((rows,), 0.02), torch.full((rows,), 100.0)
    axis = 0 if rows > 1 else -1
    found = fake_quantize_backward_op(grad, x, scale, zero, 0, 255, axis, 0, needs)
    wide, step = x.double(), scale.double().view(-1, 1)
    ratio = (x / scale.view(-1, 1)).double()
    codes = (ratio.round() + 100).clamp(0, 255) - 100
    outside = (wide <= (0 - 100 - 0.5009765625) * step) | (wide >= (255 - 100 + 0.5009765625) * step)
    assert 100 < int(outside.sum()) < x.numel() // 2
    of_scale = (grad.double() * torch.where(outside, codes, codes - ratio)).sum(1)
    of_zero = torch.where(outside, -step * grad.double(), 0.0).sum(1)
    torch.testing.assert_close(found[1].double(), of_scale, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found[2].double(), of_zero, rtol=1e-5, atol=1e-5)


@given(cases())
@settings(max_examples=200, deadline=None)
def test_observing_is_quantizing_and_finding_extremes(case) -> None:
    x, (scale, zero, low, high, *_), threads = case
    scale, zero = scale[:1].clone(), None if zero is None else zero[:1].clone()
    torch.set_num_threads(threads)
    values, *bounds = observe_fake_quantize_cpu(x, scale, zero, low, high)
    torch.set_num_threads(1)
    with without_native():
        expected, *wanted = observe_fake_quantize_cpu(x, scale, zero, low, high)
    assert same_bits(values, expected)
    torch.testing.assert_close(bounds, wanted, rtol=0, atol=0, equal_nan=True)


@given(cases())
@settings(max_examples=200, deadline=None)
def test_the_elements_outside_are_listed(case) -> None:
    x, (scale, zero, low, high, *_), threads = case
    scale, zero = scale[:1].clone(), None if zero is None else zero[:1].to(torch.int32)
    torch.set_num_threads(threads)
    x, out = x.contiguous(), torch.empty_like(x).contiguous()
    seen = native.quantize_input(x, out, scale, zero, low, high)
    torch.set_num_threads(1)
    with without_native():
        ones = torch.ones_like(x)
        blocked = fake_quantize_backward_op(ones, x, scale, zero, low, high, -1, 0, [True, False, False])[0] == 0
    blocked &= ~x.isnan()
    assert same_bits(out, fake_quantize_op(x, scale, zero, low, high, -1, 0))
    if seen.outside is None:
        assert int(blocked.sum()) > 64
    else:
        assert seen.outside.tolist() == blocked.flatten().nonzero().flatten().tolist()


def test_too_many_outside_are_not_listed() -> None:
    x = torch.full((100_000,), 9.0)
    seen = native.quantize_input(x, torch.empty_like(x), torch.tensor(0.01), None, -127, 127)
    assert seen == (9.0, 9.0, None)


@given(
    st.integers(1, 9), st.integers(1, 40), st.sampled_from(DTYPES), st.integers(2, 9), st.booleans(), st.integers(1, 4)
)
@settings(max_examples=200, deadline=None)
def test_rows_with_scales_of_their_own(rows, columns, dtype, bits, special, threads) -> None:
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows * 41 + columns))
    if special:
        x.view(-1)[:: rows + 1] = torch.tensor(SPECIAL)[torch.arange(len(x.view(-1)[:: rows + 1])) % len(SPECIAL)]
    x = x.to(dtype)
    fmt = TensorFormat("int8", bits, True, axis=0)
    torch.set_num_threads(threads)
    values, scale = fake_quantize_by_absmax(x, bits, 0, None)
    low, high = row_extremes(x)
    torch.set_num_threads(1)
    with without_native():
        wanted = get_scheme("int8").parameters_of(x, fmt)[0]
        bounds = row_extremes(x)
        expected = fake_quantize_op(x, wanted, None, *quant_range(bits, True), 0, 0)
    assert same_bits(scale, wanted)
    assert same_bits(values, expected)
    for found, bound in zip((low, high), bounds, strict=True):
        torch.testing.assert_close(found, bound, rtol=0, atol=0, equal_nan=True)


def test_the_plain_loops_of_any_processor_give_the_same_bits(tmp_path) -> None:
    """The vectors of this processor are the compiler's choice: without them the numbers are the same."""
    source = Path(build.__file__).parent / "fake_quantize.cpp"
    plain = tmp_path / "plain.so"
    flags = [flag for flag in build._FLAGS if flag != "-O3"]
    subprocess.run([*build.find_compiler(), *flags, "-O1", "-shared", str(source), "-o", str(plain)], check=True)
    x = torch.randn(1001, generator=torch.Generator().manual_seed(0)) * 3
    scale, zero = torch.tensor(0.017), torch.tensor(100, dtype=torch.int32)
    expected = torch.empty_like(x)
    native.quantize(x, expected, (1, 1, 1001), scale, zero, 0, 255)
    function = ctypes.CDLL(str(plain)).quantize_float32
    function.argtypes = [library._TYPES[letter] for letter in native._FAMILY.signatures["quantize_float32"]]
    found = torch.empty_like(x)
    addresses = x.data_ptr(), found.data_ptr(), 1, 1, 1001, scale.data_ptr(), zero.data_ptr()
    function(*addresses, 2, 0, 255, 1)
    assert same_bits(found, expected)

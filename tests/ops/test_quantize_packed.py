"""Floats to stored integers in one op: the bytes of quantizing and packing, and what PyTorch asks of an op."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensors import DTYPES, randn
from torch import Tensor

from lightning_qat.ops.affine import choose_scale_zero_point
from lightning_qat.ops.packing import unpack_bits
from lightning_qat.ops.quantize_packed import quantize_packed, quantize_packed_op

GRIDS = {(4, True): (-8, 7), (4, False): (0, 15), (8, True): (-127, 127), (8, False): (0, 255)}


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(list(GRIDS)),
    st.sampled_from(DTYPES),
    st.integers(0, 6),
    st.integers(1, 40),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**16),
)
def test_codes_are_the_nearest_in_float64(
    grid: tuple[int, bool], dtype: torch.dtype, runs: int, run: int, whole: bool, transposed: bool, seed: int
) -> None:
    """A quotient within float32's rounding of a tie may go either way; no other may."""
    (bits, symmetric), (low, high) = grid, GRIDS[grid]
    x = randn(runs, run, seed=seed).to(dtype)
    x = x.t().contiguous().t() if transposed else x
    rows = x.reshape(1, -1) if whole and x.numel() else x.reshape(-1, run)
    scale, zero = choose_scale_zero_point(rows.amin(1) / 2, rows.amax(1) / 2, bits=bits, symmetric=symmetric)
    if whole and not x.numel():
        scale, zero = torch.ones(1), None if symmetric else torch.zeros(1, dtype=torch.int32)
    stored = quantize_packed(x, scale, zero, bits=bits, symmetric=symmetric, run=None if whole else run)
    codes = stored.view(-1) if bits == 8 else unpack_bits(stored, 4, (x.numel(),), signed=symmetric)
    if bits == 8:
        assert stored.shape == x.shape
        assert stored.dtype == (torch.int8 if symmetric else torch.uint8)
    if x.numel():
        exact = rows.float().double() / scale.double().unsqueeze(1)
        exact = (exact + (0 if zero is None else zero.unsqueeze(1))).clamp(low, high)
        assert ((codes.view(rows.shape).double() - exact).abs() <= 0.5 + 2.0**-15).all()


def test_by_hand() -> None:
    x = torch.tensor([0.5, 1.5, -2.5, 30.0, float("nan")])
    one = torch.ones(1)
    assert quantize_packed(x, one, bits=8, symmetric=True).tolist() == [0, 2, -2, 30, 0]
    assert quantize_packed(x, one, torch.tensor([3]), bits=8, symmetric=False).tolist() == [3, 5, 1, 33, 3]
    assert quantize_packed(x, one, bits=4, symmetric=True).tolist() == [8 | 10 << 4, 6 | 15 << 4, 8]


@pytest.mark.parametrize(
    ("bits", "symmetric", "shape", "run"), [(8, True, (3, 8), 4), (8, False, (0, 4), 4), (4, False, (5, 7), 35)]
)
def test_opcheck(bits: int, symmetric: bool, shape: tuple[int, ...], run: int) -> None:
    x = randn(*shape)
    scale = torch.ones(x.numel() // run)
    zero = None if symmetric else torch.full(scale.shape, 2, dtype=torch.int32)
    torch.library.opcheck(quantize_packed_op, (x, scale, zero, bits, symmetric, run))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_in_one_graph(dynamic: bool) -> None:
    def step(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        return quantize_packed(x * 2, scale, zero, bits=8, symmetric=False) ^ 128

    arguments = randn(5, 6), torch.tensor(0.1), torch.tensor(7)
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=dynamic)(*arguments)
    assert torch.equal(compiled, step(*arguments))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(4, dtype=torch.int8)}, "x has dtype torch.int8; use a floating-point dtype"),
        ({"bits": 5}, "bits=5 is not allowed; use 4 or 8"),
        ({"zero_point": torch.ones(2), "symmetric": True}, "zero_point is given with symmetric=True"),
        ({"run": 3}, "2 scales of runs of 3 cover no tensor of 4 elements"),
        ({"run": None}, "2 scales of runs of 4 cover no tensor of 4 elements"),
        ({"zero_point": torch.ones(1)}, "zero_point has 1 elements and scale 2; they must be equal"),
    ],
)
def test_errors_name_the_value_and_the_way_out(change: dict[str, object], message: str) -> None:
    given: dict[str, object] = {"x": torch.ones(4), "scale": torch.ones(2), "bits": 8, "symmetric": False, "run": 2}
    with pytest.raises(ValueError, match=message):
        quantize_packed(**{**given, **change})  # type: ignore[arg-type]

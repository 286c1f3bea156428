"""The end of a residual block against plain PyTorch, for any layouts and without compiled kernels."""

from __future__ import annotations

import contextlib

import pytest
import torch
from tensors import randn
from torch.nn import functional as F

from lightning_qat.native.library import without_native
from lightning_qat.ops.affine import quantize_affine
from lightning_qat.ops.integer_conv import CodeGrid
from lightning_qat.ops.integer_linear import code_range
from lightning_qat.ops.residual import add_clamped, add_quantized

INFINITY = float("inf")
CLAMPS = {
    (-INFINITY, INFINITY): lambda x: x,
    (0.0, INFINITY): torch.relu,
    (0.0, 6.0): F.relu6,
    (-0.5, 0.25): lambda x: F.hardtanh(x, -0.5, 0.25),
}
LAYOUTS = {
    "plain": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "strided": lambda x: torch.stack((x, x + 1), -1)[..., 0],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
}


@pytest.mark.parametrize("paths", [contextlib.nullcontext, without_native])
@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("right_layout", LAYOUTS)
@pytest.mark.parametrize("left_layout", LAYOUTS)
def test_sum_and_codes(left_layout, right_layout, fresh, paths):
    for bounds, clamp in CLAMPS.items():
        for symmetric, shape in ((False, (3, 5, 4, 7)), (True, (2, 1, 1, 1)), (True, (1, 4, 1, 1))):
            left, right = LAYOUTS[left_layout](randn(*shape) * 4), LAYOUTS[right_layout](randn(*shape, seed=1))
            zero = None if symmetric else torch.tensor(9)
            grid = CodeGrid(torch.tensor(0.037).item(), code_range(8, symmetric, 0 if symmetric else 9))
            expected = clamp(left + right)
            codes = quantize_affine(expected, torch.tensor(0.037), zero, bits=8, symmetric=symmetric)
            before = left.clone()
            with paths():
                alone = add_clamped(left.clone(), right, *bounds, fresh=fresh)
                total, found = add_quantized(left, right, grid, *bounds, fresh=fresh)
            assert torch.equal(total, expected)
            assert torch.equal(alone, expected)
            assert torch.equal(found.long(), codes.long() + 128 * symmetric)
            assert fresh == (total is left)
            assert fresh or torch.equal(left, before)


def test_nothing_to_add():
    total, codes = add_quantized(torch.empty(0, 3), torch.empty(0, 3), CodeGrid(1.0, code_range(8, True)), fresh=True)
    assert total.shape == codes.shape == (0, 3)

"""A weight's codes, column by column: those of fake quantization, whatever the sizes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensors import DENORMAL, LARGEST, randn

from lightning_qat.native import weight_codes as native
from lightning_qat.native.library import without_native
from lightning_qat.native.weight_codes import weight_codes
from lightning_qat.ops.affine import quantize_affine
from lightning_qat.ops.fake_quantize import quant_range
from lightning_qat.schemes import TensorFormat, get_scheme

pytestmark = pytest.mark.skipif(native._FAMILY.functions() is None, reason="no compiler here")

SPECIAL = st.sampled_from((None, None, math.inf, -math.inf, 0.0, -0.0, DENORMAL, LARGEST))


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 70), st.integers(1, 70), st.integers(2, 8), st.booleans(), st.sampled_from((1, 1, 3)),
    st.sampled_from((0.0, 1e-40, 1e-3, 1.0, 1e30)), SPECIAL, st.integers(0, 2**16),
)  # fmt: skip
def test_codes_and_scales_are_those_of_the_scheme(rows, columns, bits, per_row, threads, size, special, seed):
    weight = randn(rows, columns, seed=seed) * size
    if special is not None:
        weight[seed % rows, seed % columns] = special
    low, high = quant_range(bits, True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "threads_for", lambda _: threads)
        if per_row:  # the scales are found with the codes
            codes, scale, whole = weight_codes(weight, None, low, high, high + (bits < 8) * 0.5)
            scheme = get_scheme("int8")
            with without_native():
                expected, _ = scheme.parameters_of(weight, TensorFormat("int8", bits, True, axis=0))
            assert torch.equal(scale, expected)
        else:
            scale = torch.tensor([0.013 * (size or 1.0)])
            codes, _, whole = weight_codes(weight, scale, low, high)
    assert whole
    with without_native():
        wanted = quantize_affine(weight, scale, None, bits=bits, symmetric=True, axis=0 if per_row else None)
    assert torch.equal(codes, wanted.t())


@pytest.mark.parametrize("shape", [(1, 1), (16, 16), (17, 33), (40, 5)])
def test_nan_is_told(shape):
    for scale in (None, torch.ones(1)):
        weight = randn(*shape)
        assert weight_codes(weight, scale, -127, 127, 127.0)[2]
        weight[-1, -1] = math.nan
        weight.view(torch.int32)[-1, -1] |= 0x7FFFFF
        assert not weight_codes(weight, scale, -127, 127, 127.0)[2]
    assert not weight_codes(randn(*shape), torch.full((1,), math.nan), -127, 127)[2]


def test_nothing_without_kernels():
    with without_native():
        assert weight_codes(randn(3, 4), None, -127, 127, 127.0) is None

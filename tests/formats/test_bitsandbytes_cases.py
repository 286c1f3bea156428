"""Formats, shapes, dtypes and blocks drawn together, by public names: not a byte differs from bitsandbytes on a CPU.

``BITSANDBYTES_CASES=10000 pytest tests/formats/test_bitsandbytes_cases.py`` draws as many, in some minutes.
The witness is proved right in ``test_codebook_bytes.py``, ``test_nested.py`` and ``test_vectorwise.py`` of the
ops. Values are compared with ``code * absmax``: what bitsandbytes dequantizes on a CPU is wrong for some shapes.
"""

from __future__ import annotations

import os

import bitsandbytes as bnb
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ops import bitsandbytes_witness as witness
from torch import Tensor

import lightning_qat as lq
from lightning_qat import BitsAndBytesConfig
from lightning_qat.ops.codebook_tables import thresholds

CASES = int(os.environ.get("BITSANDBYTES_CASES", "500"))
#: Most indices of a dimension, by how many dimensions there are.
SIDES = {1: 9000, 2: 96, 3: 21, 4: 9}
SCALES = (1e-44, 1e-41, 1e-38, 1e-7, 1.0, 1.0, 1.0, 1e4, 1e30, 1e36)
FORMATS = ("nf4", "fp4", "nf4 nested", "fp4 nested", "dynamic_tree", "llm_int8")


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Return a finite tensor of 1 to 4 dimensions: ordinary, extreme and degenerate values, and ties."""
    dims = draw(st.integers(1, 4))
    shape = [draw(st.integers(1, SIDES[dims])) for _ in range(dims)]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    x = torch.randn(shape, generator=generator)
    kind = draw(st.sampled_from(("normal", "normal", "heavy", "zeros", "sparse", "constant", "few", "ties", "spread")))
    if kind == "heavy":
        x = x / torch.rand(shape, generator=generator).clamp_min(1e-6)
    elif kind == "zeros":
        x = torch.copysign(torch.zeros(shape), x)
    elif kind == "sparse":
        x = x * (torch.rand(shape, generator=generator) < 0.05)
    elif kind == "constant":
        x = torch.full(shape, draw(st.floats(-4, 4, width=32)))
    elif kind == "few":
        x = (x * 8).round() / 8
    elif kind == "ties":
        limits = thresholds(draw(st.sampled_from(("nf4", "fp4", "dynamic_tree"))), "cpu", "cpu")
        far = torch.full_like(limits, torch.inf)
        near = torch.cat((torch.nextafter(limits, -far), limits, torch.nextafter(limits, far)))
        x = near[torch.randint(len(near), shape, generator=generator)]
        x.view(-1)[:: draw(st.integers(3, 40))] = draw(st.sampled_from((1.0, -1.0)))
    elif kind == "spread":
        x = x * torch.exp2(torch.randint(-60, 60, shape, generator=generator).float())
    dtype = draw(st.sampled_from(witness.DTYPES))
    largest = torch.finfo(dtype).max
    x = (x * draw(st.sampled_from(SCALES))).clamp(-largest, largest).to(dtype)
    return x.transpose(0, -1) if draw(st.booleans()) else x


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
    assert torch.equal(ours.contiguous().view(torch.uint8), theirs.contiguous().view(torch.uint8))


def check_4_bits(x: Tensor, kind: str, block: int, nested: bool) -> None:
    packed, state = bnb.functional.quantize_4bit(
        x.contiguous(), blocksize=block, quant_type=kind, compress_statistics=nested
    )
    config = BitsAndBytesConfig(bits=4, quant_type=kind, block_size=block, nested_quantization=nested)
    if nested and not bool(torch.isfinite(state.offset)):  # nothing can be read from what it stores then
        with pytest.raises(ValueError, match="too large to be nested"):
            lq.to_bitsandbytes_format(x, config)
        return
    theirs = {"weight": packed, **{f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}}
    ours = lq.to_bitsandbytes_format(x, config)
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        assert_same(ours[name], value)
    absmax = state.absmax
    if nested:
        absmax = witness.values(absmax, state.state2.absmax, "dynamic_tree", 256) + state.offset
    codes = torch.stack((packed.view(-1) >> 4, packed.view(-1) & 15), 1).view(-1)[: x.numel()]
    values = witness.values(codes, absmax, kind, block).view(x.shape).to(x.dtype)
    assert_same(lq.from_bitsandbytes_format(theirs, config).dequantize(), values)


def check_dynamic_tree(x: Tensor, block: int) -> None:
    codes, state = bnb.functional.quantize_blockwise(x.contiguous(), blocksize=block)
    held = lq.quantize_dynamic_tree(x, BitsAndBytesConfig(block_size=block))
    assert_same(held.codes, codes.view(x.shape))
    assert_same(held.scale, state.absmax)
    values = witness.values(codes.view(-1), state.absmax, "dynamic_tree", block)
    assert_same(held.dequantize(), values.view(x.shape).to(x.dtype))


def check_int8(x: Tensor, threshold: float) -> None:
    rows = x.reshape(x.shape[0], -1).clamp(-6e4, 6e4)  # float16 holds no more
    codes, absmax, columns = witness.quantize_vectorwise(rows, threshold)
    held = lq.quantize_int8(rows, BitsAndBytesConfig(outlier_threshold=threshold))
    assert_same(held.codes, codes)
    assert_same(held.scale, absmax)
    found = [] if held.outliers is None else held.outliers.columns.tolist()
    assert found == ([] if columns is None else columns.tolist())
    if not threshold:
        state = lq.to_bitsandbytes_format(rows, BitsAndBytesConfig())
        assert_same(state["weight"], codes)
        assert_same(state["SCB"], absmax)


@settings(max_examples=CASES, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    x=tensors(),
    form=st.sampled_from(FORMATS),
    block=st.sampled_from(witness.BLOCK_SIZES),
    threshold=st.sampled_from((0.0, 1.5, 6.0)),
)
def test_not_a_byte_differs(x: Tensor, form: str, block: int, threshold: float) -> None:
    before = x.clone()
    if form == "llm_int8":
        check_int8(x, threshold)
    elif form == "dynamic_tree":
        check_dynamic_tree(x, block)
    else:
        check_4_bits(x, form.split()[0], block, form.endswith("nested"))
    assert torch.equal(x, before)

"""Codebook formats in C++ give the bits of PyTorch's operations, on any number of threads and any processor."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native.bits import another_processor, fine_grained, same_bits, values
from tensors import randn
from torch import Tensor

from lightning_qat.native import codebook as native
from lightning_qat.native.library import without_native
from lightning_qat.ops import codebook as ops
from lightning_qat.ops import codebook_cpu
from lightning_qat.ops.codebook_tables import CODEBOOK_BITS, RULES, codebook, thresholds

pytestmark = pytest.mark.skipif(native._FAMILY.functions() is None, reason="no C++ compiler")

NAMES = list(CODEBOOK_BITS)
BLOCKS = st.sampled_from((1, 3, 32, 64, 100, 256, 1024, 1025, 4096))
FORMATS = st.tuples(st.sampled_from(NAMES), BLOCKS, st.sampled_from(RULES))


def everything(x: Tensor, name: str, block: int, rule: str, factor: float | None) -> list[Tensor]:
    """Return what all ops give for one flat tensor; scales are its own, or these times ``factor``."""
    absmax = ops.codebook_absmax_op(x, name, block, rule)
    given_ = None if factor is None else absmax * factor
    stored, scale = ops.codebook_quantize_op(x, given_, name, block, rule)
    found = [absmax, stored, scale]
    found.append(ops.codebook_dequantize_op(stored, scale, len(x), name, block, x.dtype))
    found.append(ops.codebook_fake_quantize_op(x, scale, None, name, block, rule))
    found.append(ops.codebook_fake_quantize_op(x, scale, scale * 0.99, name, block, rule))
    # Scales of before, which know nothing of a NaN.
    finite = scale.nan_to_num(nan=1.0, posinf=2.0)
    found.append(ops.codebook_fake_quantize_op(x, finite, None, name, block, rule))
    found.append(ops.codebook_quantize_op(x, finite, name, block, rule)[0])
    grad = randn(len(x), seed=1).to(x.dtype)
    found.append(ops.codebook_fake_quantize_backward_op(grad, x, scale, block))
    generator = torch.Generator().manual_seed(5)
    options = {"codebook": name, "block_size": block, "rule": rule}
    found.append(ops.quantize_codebook(x, scale, **options, generator=generator, stochastic=True))
    return found


def assert_same(x: Tensor, name: str, block: int, rule: str, factor: float | None = None) -> None:
    found = everything(x, name, block, rule, factor)
    with without_native():
        expected = everything(x, name, block, rule, factor)
    for place, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert same_bits(one, other), place


@settings(max_examples=150, deadline=None)
@given(values(), FORMATS, st.sampled_from((None, None, 0.5, 2.0)), st.integers(1, 4))
def test_bits_are_those_of_pytorchs_operations(
    x: Tensor, fmt: tuple[str, int, str], factor: float | None, threads: int
) -> None:
    with fine_grained(threads):
        assert_same(x, *fmt, factor)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", NAMES)
def test_ratios_on_thresholds_and_beside_them(name: str, rule: str) -> None:
    """With an absmax of 1.0 the ratios are the values, so every bin's ends are among them."""
    ends = thresholds(name, rule, "cpu")
    x = torch.cat([ends, *(torch.nextafter(ends, torch.tensor(side)) for side in (-9.0, 9.0)), codebook(name, "cpu")])
    x = torch.cat((x, torch.tensor([0.0, -0.0, 1.0, -1.0, 2.0, -2.0, torch.nan, torch.inf, -torch.inf])))
    for block in (1, len(x)):
        absmax = torch.ones(-(-len(x) // block))
        found = ops.quantize_codebook(x, absmax, codebook=name, block_size=block, rule=rule)
        assert torch.equal(found, ops.choose_codes(x, name, rule))


@settings(max_examples=25, deadline=None)
@given(values(), FORMATS)
def test_another_processor_gets_the_same_bits(
    tmp_path_factory: pytest.TempPathFactory, x: Tensor, fmt: tuple[str, int, str]
) -> None:
    with another_processor(native._FAMILY, tmp_path_factory.getbasetemp()):
        assert_same(x, *fmt)


@pytest.mark.parametrize("name", NAMES)
def test_a_value_of_the_table_is_never_rounded_away_from(name: str) -> None:
    """Nor is what lies beyond its ends, however small the noise."""
    table = codebook(name, "cpu")
    x = torch.cat((table, torch.tensor([-2.0, 2.0])))
    codes = torch.empty(len(x), dtype=torch.uint8)
    rule, ordered = codebook_cpu._rule(name, "cpu"), codebook_cpu._ordered(name, "cpu")
    assert native.draw(x, torch.ones(1), torch.zeros(len(x)), ordered, codes, len(x), rule)
    assert torch.equal(table[codes.long()], x.clamp(float(table.min()), 1.0))


def test_strides_gradients_and_inference_mode() -> None:
    x = randn(6, 50, 7).permute(2, 0, 1)[:, ::2]
    options = {"codebook": "nf4", "block_size": 64}
    for mode in (torch.enable_grad, torch.inference_mode):
        with mode():
            absmax = ops.block_absmax(x, 64)
            wanted = x.clone().requires_grad_(mode is torch.enable_grad)
            results = []
            for way in (without_native, fine_grained):
                with way() if way is without_native else way(3):
                    codes = ops.quantize_codebook(wanted, absmax, **options)
                    results.append((codes, ops.fake_quantize_codebook(wanted, absmax, **options).detach()))
            for one, other in zip(*results, strict=True):
                assert same_bits(one, other)


def test_the_default_device_does_not_matter() -> None:
    x = randn(500)
    expected = everything(x, "nf4", 64, "cpu", None)
    with torch.device("meta"):
        absmax = ops.codebook_absmax_op(x, "nf4", 64, "cpu")
        stored, _ = ops.codebook_quantize_op(x, None, "nf4", 64, "cpu")
        fake = ops.codebook_fake_quantize_op(x, absmax, None, "nf4", 64, "cpu")
        back = ops.codebook_dequantize_op(stored, absmax, 500, "nf4", 64, torch.float32)
    for one, other in zip((absmax, stored, back, fake), (*expected[:2], expected[3], expected[4]), strict=True):
        assert same_bits(one, other)


def test_no_float_or_code_of_full_size_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps of PyTorch's path are not reached."""
    for name in ("_codes", "_pack", "_keep_nan", "_copy_abs", "chunks"):
        monkeypatch.setattr(codebook_cpu, name, lambda *_: pytest.fail("a step of PyTorch's path"))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        everything(randn(1000).to(dtype), "nf4", 64, "cpu", None)


def test_what_there_is_no_kernel_for() -> None:
    rule = codebook_cpu._rule("nf4", "cpu")
    for x in (randn(8).double(), torch.empty(0)):
        assert not native.quantize(x, None, torch.empty(1), torch.empty(4, dtype=torch.uint8), 64, rule)
        assert not native.block_absmax(x, torch.empty(1), 64, 0.0)
    assert not native.gradient(randn(8).bfloat16(), randn(8), torch.ones(1), torch.empty(8), 64)

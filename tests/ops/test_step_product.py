"""The product of a training step in integers is exact, and taken where it pays alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensors import randn

from lightning_qat.ops import step_product
from lightning_qat.ops.integer_linear import MAX_TERMS
from lightning_qat.ops.step_product import codes_product, product_pays

needs_kernel = pytest.mark.skipif(not step_product._takes_plain_weights(), reason="no exact kernel here")


@needs_kernel
@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 300), st.sampled_from([64, 128, 192, 320]), st.integers(1, 130),
    st.integers(0, 255) | st.just(0), st.booleans(), st.booleans(), st.integers(0, 2**16),
)  # fmt: skip
def test_the_sums_are_those_of_int64(tokens, columns, rows, zero_point, per_row, has_bias, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (tokens, columns), generator=generator).to(torch.uint8)
    weight = torch.randint(-128, 128, (columns, rows), generator=generator).to(torch.int8)
    scale = randn(rows if per_row else 1, seed=seed).abs() * 0.01 + 1e-4
    bias = randn(rows, seed=seed + 1) if has_bias else None
    found = codes_product(codes, 0.25, zero_point, weight, scale, bias)
    sums = (codes.long() - zero_point) @ weight.long()
    exact = sums.double() * 0.25 * scale.double() + (0.0 if bias is None else bias.double())
    assert found.dtype == torch.float32
    assert found.shape == (tokens, rows)
    # Two or three roundings of float32, of the sum's own size.
    torch.testing.assert_close(found.double(), exact, rtol=4e-7, atol=4e-7 * float(exact.abs().max() + 1e-3))


@needs_kernel
def test_powers_of_two_leave_nothing_to_round():
    codes, weight = torch.full((64, 4096), 255, dtype=torch.uint8), torch.full((4096, 64), -128, dtype=torch.int8)
    codes[1], weight[:, 1] = 0, 127
    found = codes_product(codes, 0.5, 7, weight, torch.full((64,), 2.0), None)
    assert torch.equal(found.double(), ((codes.long() - 7) @ weight.long()).float().double())


@needs_kernel
@pytest.mark.parametrize("columns", [64, 100, 136, 160, 256, 288, 320, 784, 832, 1000])
@pytest.mark.parametrize("rows", [64, 300])
def test_sums_without_a_zero_point_where_the_product_pays(rows, columns):
    """As after ReLU. Kernels for blocks that are not full were wrong there, and there alone."""
    tokens = 2**24 // (columns * rows) + 64
    codes, weight = torch.randint(0, 256, (tokens, columns)), torch.randint(-128, 128, (columns, rows))
    if product_pays(tokens, rows, columns):
        one = torch.ones(1)
        found = codes_product(codes.to(torch.uint8), 1.0, 0, weight.to(torch.int8), one, None)
        assert torch.equal(found, codes.float() @ weight.float())  # every sum is below 2**24
    else:
        assert columns % 64 != 0


@needs_kernel
def test_a_shape_whose_sums_are_wrong_is_not_taken(monkeypatch, caplog):
    product = step_product.codes_product

    def wrong(codes, *others):
        result = product(codes, *others)
        result[-1, -1] += 1.0
        return result

    monkeypatch.setattr(step_product, "codes_product", wrong)
    assert not product_pays(700, 200, 320)
    assert "1023 x 320 codes with a weight of 200 rows" in caplog.text
    monkeypatch.undo()
    assert not product_pays(700, 200, 320)  # it is remembered
    step_product._is_right.cache_clear()
    state = torch.get_rng_state()
    assert product_pays(700, 200, 320)
    assert torch.equal(torch.get_rng_state(), state)


@needs_kernel
def test_batches_of_every_length_are_few_trials():
    step_product._is_right.cache_clear()
    assert all(product_pays(tokens, 512, 576) for tokens in range(64, 3000, 7))
    assert step_product._is_right.cache_info().misses <= 5
    step_product._is_right.cache_clear()


def test_it_is_for_large_products_of_many_tokens(monkeypatch):
    monkeypatch.setattr(step_product, "_takes_plain_weights", lambda: True)
    monkeypatch.setattr(step_product, "_is_right", lambda *shape: True)
    assert product_pays(1024, 256, 256)
    assert not product_pays(1024, 8, 256)
    assert not product_pays(32, 4096, 4096)  # making the codes of the weight takes longer than they save
    assert not product_pays(1024, 256, (MAX_TERMS // 64 + 1) * 64)  # sums may leave int32
    assert product_pays(1024, 256, 768)
    assert not product_pays(1024, 256, 784)  # blocks of the kernel that are not full
    monkeypatch.setattr(step_product, "_takes_plain_weights", lambda: False)
    assert not product_pays(1024, 256, 256)

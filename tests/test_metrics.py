"""SQNR, error and agreement against their definitions, and over batches as over the whole."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_qat import quantization_error, sqnr
from lightning_qat.metrics import SQNR, Agreement, Cosine, QuantizationError, perplexity

shapes = st.lists(st.integers(1, 5), min_size=1, max_size=3)
seeds = st.integers(0, 2**16)


def pair(shape: list[int], seed: int, noise: float = 0.1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    original = torch.randn(shape, generator=generator)
    return original, original + noise * torch.randn(shape, generator=generator)


@given(shapes, seeds)
def test_error_is_the_mean_square(shape: list[int], seed: int) -> None:
    a, b = pair(shape, seed)
    assert float(quantization_error(a, b)) == pytest.approx(float(((a.double() - b.double()) ** 2).mean()))
    assert float(quantization_error(a, a)) == 0
    assert float(quantization_error(a, b)) == float(quantization_error(b, a))


@given(shapes, seeds, st.floats(0.01, 100))
def test_sqnr_does_not_depend_on_the_scale(shape: list[int], seed: int, scale: float) -> None:
    a, b = (t.double() for t in pair(shape, seed))  # in float32 the products round, which is noise of their own
    assert float(sqnr(a * scale, b * scale)) == pytest.approx(float(sqnr(a, b)), abs=1e-6)


@given(shapes, seeds)
def test_ten_times_the_noise_costs_20_db(shape: list[int], seed: int) -> None:
    a, b = (t.double() for t in pair(shape, seed))
    assert float(sqnr(a, b) - sqnr(a, a + 10 * (b - a))) == pytest.approx(20, abs=1e-6)


def test_known_values() -> None:
    assert float(sqnr(torch.ones(4), torch.full((4,), 0.9))) == pytest.approx(20, abs=1e-5)
    assert float(quantization_error(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]))) == 2


def test_sqnr_at_the_limits() -> None:
    zeros, ones = torch.zeros(3), torch.ones(3)
    assert float(sqnr(ones, ones)) == math.inf
    assert float(sqnr(zeros, zeros)) == math.inf
    assert float(sqnr(zeros, ones)) == -math.inf


def test_low_precision_and_integers_are_compared_in_float64() -> None:
    a = torch.tensor([1.0, 300.0], dtype=torch.float16)
    assert float(quantization_error(a, a + 1)) == 1
    assert float(quantization_error(torch.tensor([1, 2]), torch.tensor([1, 4]))) == 2
    assert sqnr(a, a).dtype == torch.float64


@pytest.mark.parametrize("function", [sqnr, quantization_error])
def test_unequal_shapes_and_nothing_are_errors(function: object) -> None:
    assert callable(function)
    with pytest.raises(ValueError, match=r"\(2,\) and \(3,\)"):
        function(torch.ones(2), torch.ones(3))
    with pytest.raises(ValueError, match="at least one element"):
        function(torch.ones(0), torch.ones(0))


class Stored:
    """What a quantized tensor looks like from outside."""

    def __init__(self, codes: torch.Tensor, scale: float) -> None:
        self.codes, self.scale = codes, scale

    def dequantize(self) -> torch.Tensor:
        return self.codes * self.scale


def test_quantized_tensors_are_compared_by_their_values() -> None:
    original = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    scale = float(original.abs().max() / 127)
    stored = Stored((original / scale).round().char(), scale)
    for function in (sqnr, quantization_error):
        assert function(original, stored) == function(original, stored.dequantize())
        assert function(stored, original) == function(stored.dequantize(), original)
    assert float(sqnr(stored, stored)) == math.inf
    assert 30 < float(sqnr(original, stored)) < 60
    metric = SQNR()
    metric.update(original, stored)
    assert metric.compute() == sqnr(original, stored)
    assert float(sqnr(original, torch.quantize_per_tensor(original, scale, 0, torch.qint8))) > 30  # torch's own


def test_sums_do_not_round_in_float32() -> None:
    # 2**24 + 1 is no float32: sums of squares in float32 would stand still.
    n = 2**24 + 2
    ones = torch.ones(n)
    assert float(quantization_error(ones, torch.zeros(n))) == 1
    assert float(sqnr(ones, ones * 0.5)) == pytest.approx(20 * math.log10(2), rel=1e-15)
    wide = torch.tensor([1.0, 1e-30])
    assert float(quantization_error(wide, torch.tensor([1.0, 0.0]))) == pytest.approx(5e-61, rel=1e-6)


@pytest.mark.parametrize("function", [sqnr, quantization_error])
def test_what_is_no_real_tensor_is_an_error(function: object) -> None:
    assert callable(function)
    with pytest.raises(TypeError, match="quantized is a list"):
        function(torch.ones(2), [1.0, 1.0])
    with pytest.raises(ValueError, match="original has dtype torch.complex64"):
        function(torch.ones(2, dtype=torch.complex64), torch.ones(2))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), seeds)
def test_metrics_over_batches_equal_the_whole(sizes: list[int], seed: int) -> None:
    a, b = pair([sum(sizes), 4], seed, noise=1.0)
    metrics = SQNR(), QuantizationError(), Agreement()
    for metric in metrics:
        for part_a, part_b in zip(a.split(sizes), b.split(sizes), strict=True):
            metric.update(part_a, part_b)
    assert float(metrics[0].compute()) == pytest.approx(float(sqnr(a, b)))
    assert float(metrics[1].compute()) == pytest.approx(float(quantization_error(a, b)))
    assert float(metrics[2].compute()) == pytest.approx(float((a.argmax(1) == b.argmax(1)).double().mean()))


def test_metrics_start_anew_after_reset() -> None:
    metric = Agreement()
    metric.update(torch.eye(3), torch.eye(3).flip(0))
    assert float(metric.compute()) == pytest.approx(1 / 3)
    metric.reset()
    metric.update(torch.eye(3), 5 * torch.eye(3))
    assert float(metric.compute()) == 1


def test_agreement_along_another_dimension() -> None:
    logits = torch.randn(2, 5, 3, 3, generator=torch.Generator().manual_seed(0))
    metric = Agreement(dim=1)
    metric.update(logits, logits + 1)
    assert float(metric.compute()) == 1
    assert int(metric.count) == 2 * 3 * 3


def test_metrics_do_not_keep_a_graph() -> None:
    a = torch.ones(3, requires_grad=True)
    metric = SQNR()
    metric.update(a, a * 0.5)
    assert not metric.compute().requires_grad


def test_cosine_is_the_mean_over_vectors() -> None:
    a, b = pair([7, 5], 0)
    metric = Cosine()
    metric.update(a[:3], b[:3])
    metric.update(a[3:], b[3:])
    expected = [
        float(x.double() @ y.double() / (x.double().norm() * y.double().norm())) for x, y in zip(a, b, strict=True)
    ]
    assert float(metric.compute()) == pytest.approx(sum(expected) / 7)
    same = Cosine()
    same.update(a, 3 * a)
    assert float(same.compute()) == pytest.approx(1)


@pytest.mark.parametrize("batch_size", [1, 2, 9])
def test_perplexity_is_what_torchmetrics_has(batch_size: int) -> None:
    from torchmetrics.text import Perplexity

    torch.manual_seed(0)
    model = torch.nn.Embedding(11, 11)
    windows = torch.randint(11, (3, 6))
    metric = Perplexity()
    metric.update(model(windows)[:, :-1], windows[:, 1:])
    assert perplexity(model, windows, batch_size=batch_size) == pytest.approx(float(metric.compute()), rel=1e-6)
    uniform = torch.nn.Embedding.from_pretrained(torch.zeros(11, 11))
    assert perplexity(uniform, windows) == pytest.approx(11)
    with pytest.raises(ValueError, match=r"windows has shape \(3,\)"):
        perplexity(model, windows[:, 0])

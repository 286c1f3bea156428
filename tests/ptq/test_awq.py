"""AWQ's search against the published one with stored activations, and what its options promise."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensors import randn
from torch import Tensor

from lightning_qat.ptq.awq import AWQOptions, awq_scale, scaled_loss, search_scales, weight_magnitude
from lightning_qat.schemes import TensorFormat

SYMMETRIC = TensorFormat("int4", 4, True, group_size=16)
ASYMMETRIC = TensorFormat("int4", 4, False, group_size=16)


def problem(rows: tuple[int, ...] = (24, 8), size: int = 64, seed: int = 0) -> tuple[list[Tensor], Tensor]:
    """Return weights that share an input, and these inputs: some channels are much larger, all are correlated."""
    spread = 0.1 + 5 * randn(size, seed=seed).abs() ** 3
    x = (randn(300, size, seed=seed + 1) + 0.5 * randn(300, 1, seed=seed + 2)) * spread
    return [randn(n, size, seed=seed + 3 + i) * 0.1 for i, n in enumerate(rows)], x


def plain_quantize(weight: Tensor, fmt: TensorFormat) -> Tensor:
    """Round to nearest in groups as the grids are defined, with nothing of the library."""
    groups = weight.reshape(-1, fmt.group_size or weight.shape[1])
    if fmt.symmetric:
        scale = groups.abs().amax(1, keepdim=True) / (2 ** (fmt.bits - 1) - 0.5)
        codes = (groups / scale).round().clamp(-(2 ** (fmt.bits - 1)), 2 ** (fmt.bits - 1) - 1)
        return (codes * scale).reshape(weight.shape)
    low, high, most = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True), 2**fmt.bits - 1
    scale = (high.clamp_min(0) - low.clamp_max(0)) / most
    zero = (-low.clamp_max(0) / scale).round().clamp(0, most)
    return ((((groups / scale).round() + zero).clamp(0, most) - zero) * scale).reshape(weight.shape)


def published_search(weights: list[Tensor], x: Tensor, fmt: TensorFormat, balanced: bool) -> list[float]:
    """Return the loss of each of the 20 points: each quantizes and runs the layers on the stored inputs."""
    whole = torch.cat(weights)
    groups = whole.abs().view(-1, fmt.group_size or whole.shape[1])
    w_mean = (groups / (groups.amax(1, keepdim=True) + 1e-6)).view(whole.shape).mean(0)
    x_mean = x.abs().mean(0)
    expected = x.double() @ whole.double().t()
    losses = []
    for point in range(20):
        ratio = point / 20
        if balanced:
            scales = (x_mean.pow(ratio) / (w_mean.pow(1 - ratio) + 1e-4)).clamp(min=1e-4)
        else:
            scales = x_mean.pow(ratio).clamp(min=1e-4)
        scales = scales / (scales.max() * scales.min()).sqrt()
        quantized = torch.cat([plain_quantize(w * scales, fmt) / scales for w in weights])
        losses.append(float((expected - x.double() @ quantized.double().t()).square().sum()))
    return losses


@pytest.mark.parametrize("fmt", [SYMMETRIC, ASYMMETRIC, TensorFormat("int8", 3, False, axis=0)], ids=str)
@pytest.mark.parametrize("balanced", [False, True])
def test_every_point_of_the_grid_has_the_loss_of_the_published_search(fmt: TensorFormat, balanced: bool) -> None:
    weights, x = problem()
    if balanced:
        # Magnitudes of weights are then summed in the same order. A symmetric group's extreme lies between two codes:
        # a scale that differs in its last place takes the other one.
        weights = [torch.cat(weights)]
    formats = [fmt] * len(weights)
    expected = published_search(weights, x, fmt, balanced)
    assert min(expected) < 0.7 * expected[0]  # the witness finds something on this problem
    options = AWQOptions(balanced=balanced, refine=False)
    found = search_scales(weights, x.t() @ x, x.abs().mean(0), formats, options)
    assert [point.alpha for point in found.grid] == [i / 20 for i in range(20)]
    assert [point.loss for point in found.grid] == pytest.approx(expected, rel=1e-4)
    assert found.alpha == expected.index(min(expected)) / 20
    assert found.loss == pytest.approx(min(expected), rel=1e-4)
    plain = sum(float(((w - plain_quantize(w, fmt)).double() @ x.double().t()).square().sum()) for w in weights)
    assert found.plain_loss == pytest.approx(plain, rel=1e-4)


@given(seed=st.integers(0, 1000), bits=st.sampled_from((2, 3, 4, 8)), symmetric=st.booleans(), data=st.data())
@settings(max_examples=15, deadline=None)
def test_the_loss_never_grows(seed: int, bits: int, symmetric: bool, data: st.DataObject) -> None:
    size = data.draw(st.sampled_from((16, 48, 96)))
    weights, x = problem((5, 1), size, seed)
    x[:, data.draw(st.integers(0, size - 1))] = 0.0
    weights[0][:, data.draw(st.integers(0, size - 1))] = 0.0
    group = data.draw(st.sampled_from((None, 8, 16)))
    fmt = TensorFormat("int8", bits, symmetric, axis=None if group else 0, group_size=group)
    gram = x.t() @ x
    plain = search_scales(weights, gram, x.abs().mean(0), [fmt] * 2, AWQOptions(refine=False))
    found = search_scales(weights, gram, x.abs().mean(0), [fmt] * 2, AWQOptions(refinement_steps=20))
    assert found.loss <= plain.loss <= plain.plain_loss
    assert torch.isfinite(found.scales).all()
    assert (found.scales > 0).all()
    assert found.loss == sum(scaled_loss(w, found.scales, gram, fmt) for w in weights)


def test_refining_finds_better_scales() -> None:
    # Uncorrelated, as the expectation has it; inputs and weights have nothing to do with each other.
    x = randn(400, 128, seed=5) * (2 * randn(128, seed=6)).exp()
    weights = [randn(n, 128, seed=7) * randn(128, seed=8).exp() for n in (300, 100)]
    statistics = x.t() @ x, x.abs().mean(0), [SYMMETRIC] * 2
    grid = search_scales(weights, *statistics, AWQOptions(refine=False))
    found = search_scales(weights, *statistics)
    assert found.refined
    assert found.loss < 0.97 * grid.loss


def test_sampled_rows_rank_and_all_rows_decide() -> None:
    weights, x = problem((96, 40))
    gram, magnitude = x.t() @ x, x.abs().mean(0)
    whole = search_scales(weights, gram, magnitude, [SYMMETRIC] * 2, AWQOptions(refine=False))
    found = search_scales(weights, gram, magnitude, [SYMMETRIC] * 2, AWQOptions(refine=False, sampled_rows=16))
    estimates = torch.tensor([[a.loss, b.loss] for a, b in zip(found.grid, whole.grid, strict=True)])
    assert (estimates[:, 0] / estimates[:, 1] - 1).abs().max() < 0.5
    assert found.loss <= 1.05 * whole.loss
    assert found.loss == pytest.approx(sum(scaled_loss(w, found.scales, gram, SYMMETRIC) for w in weights))


def test_tied_inputs_get_one_scale() -> None:
    weights, x = problem((24,), 64)
    tied = torch.arange(16).repeat(4)  # four heads of queries read one head of values
    for options in (AWQOptions(), AWQOptions(refine=False), AWQOptions(codes="gptq")):
        found = search_scales(weights, x.t() @ x, x.abs().mean(0), [SYMMETRIC], options, tied)
        assert torch.equal(found.scales, found.scales[:16].repeat(4))
        assert found.scales.unique().numel() > 8


def test_codebooks_and_whole_tensors_are_searched_too() -> None:
    weights, x = problem((24,), 64)
    for fmt in (TensorFormat("nf4", 4, True, block_size=32), TensorFormat("int8", 8, True)):
        found = search_scales(weights, x.t() @ x, x.abs().mean(0), [fmt])
        assert found.loss < found.plain_loss


def test_pieces_of_rows_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, x = problem((24,), 64)
    gram, scale = x.t() @ x, awq_scale(x.abs().mean(0), 0.5, weight_magnitude(weights, [SYMMETRIC]))
    whole = scaled_loss(weights[0], scale, gram, SYMMETRIC)
    monkeypatch.setattr("lightning_qat.ptq.awq._PIECE", 64 * 5)
    assert scaled_loss(weights[0], scale, gram, SYMMETRIC) == pytest.approx(whole, rel=1e-5)
    assert torch.allclose(awq_scale(x.abs().mean(0), 0.5, weight_magnitude(weights, [SYMMETRIC])), scale)


def test_half_precision_and_strided_weights_are_taken() -> None:
    weights, x = problem((24,), 64)
    gram, magnitude = x.t() @ x, x.abs().mean(0)
    half = weights[0].to(torch.bfloat16)
    strided = half.t().contiguous().t()
    found = search_scales([strided], gram, magnitude, [SYMMETRIC])
    assert torch.equal(found.scales, search_scales([half.float()], gram, magnitude, [SYMMETRIC]).scales)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": []}, "0 weights have 1 formats"),
        ({"weights": [torch.zeros(4, 3)]}, r"gram has shape \(8, 8\).*weights of 3 columns"),
        ({"magnitude": torch.zeros(7)}, r"magnitudes \(7,\)"),
    ],
)
def test_what_does_not_belong_together(arguments: dict[str, object], message: str) -> None:
    given = {"weights": [torch.zeros(4, 8)], "magnitude": torch.zeros(8), **arguments}
    with pytest.raises(ValueError, match=message):
        search_scales(given["weights"], torch.eye(8), given["magnitude"], [SYMMETRIC])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid_points": 0}, "grid_points=0 is not allowed"),
        ({"codes": "gptk"}, "codes='gptk' is not known; use one of: 'gptq'"),
        ({"damping": 1.0}, "damping=1.0"),
        ({"refine": 1}, "refine=1"),
    ],
)
def test_options_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AWQOptions(**options)

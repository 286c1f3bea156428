"""Expected errors: gradients against autograd, the minimum against random scales, variances against least squares."""

from __future__ import annotations

import pytest
import torch
from tensors import randn
from torch import Tensor

from lightning_qat.ptq.awq import scaled_loss
from lightning_qat.ptq.expected_error import (
    _error_and_gradient,
    conditional_variances,
    first_of_each,
    least_expected_error,
)
from lightning_qat.schemes import TensorFormat

SYMMETRIC = TensorFormat("int4", 4, True, group_size=8)
ASYMMETRIC = TensorFormat("int4", 3, False, group_size=8)


def expected_error(weight: Tensor, fmt: TensorFormat, cost: Tensor, logs: Tensor) -> Tensor:
    """Return the definition, row by row and column by column, for autograd."""
    scale, total = logs.exp(), logs.new_zeros(())
    for row in weight.double():
        for first in range(0, len(row), 8):
            scaled = row[first : first + 8] * scale[first : first + 8]
            if fmt.symmetric:
                step = 2 * scaled.abs().max() / (2**fmt.bits - 1)
            else:
                step = (scaled.max().clamp_min(0) - scaled.min().clamp_max(0)) / (2**fmt.bits - 1)
            total = total + step**2 * (cost[first : first + 8] / scale[first : first + 8] ** 2).sum()
    return total


@pytest.mark.parametrize("fmt", [SYMMETRIC, ASYMMETRIC], ids=str)
def test_error_and_gradient_are_those_of_the_definition(fmt: TensorFormat) -> None:
    weight, cost = randn(5, 24), randn(24, seed=1).abs()
    weight[2] = weight[2].abs()  # a group above zero
    logs = (randn(24, seed=2) * 0.3).double().requires_grad_()
    expected = expected_error(weight, fmt, cost.double(), logs)
    expected.backward()
    error, gradient = _error_and_gradient([weight], [fmt], cost, logs.detach().exp().float())
    assert error == pytest.approx(float(expected.detach()), rel=1e-5)
    assert torch.allclose(gradient.double(), logs.grad, rtol=1e-4, atol=1e-4 * error)


@pytest.mark.parametrize("fmt", [SYMMETRIC, ASYMMETRIC], ids=str)
def test_descent_from_anywhere_ends_at_the_same_least_error(fmt: TensorFormat) -> None:
    weight, cost = randn(30, 24), randn(24, seed=1).abs() ** 3
    ends = [
        least_expected_error([weight], [fmt], cost, (randn(24, seed=s) * 0.5).exp(), steps=400) for s in range(3)
    ]  # fmt: skip
    errors = [_error_and_gradient([weight], [fmt], cost, end)[0] for end in ends]
    assert max(errors) < 1.005 * min(errors)
    for seed in range(20):
        other = ends[0] * (randn(24, seed=10 + seed) * 0.1).exp()
        assert _error_and_gradient([weight], [fmt], cost, other)[0] > min(errors)


def test_the_expectation_is_met_by_rounding() -> None:
    weight, cost = randn(400, 64), randn(64, seed=1).abs() ** 3
    fmt, scale = TensorFormat("int8", 6, True, group_size=32), (randn(64, seed=2) * 0.3).exp()
    predicted = _error_and_gradient([weight], [fmt], cost, scale)[0] / 12
    assert scaled_loss(weight, scale, torch.diag(cost), fmt) == pytest.approx(predicted, rel=0.1)


def test_variances_are_residuals_of_least_squares() -> None:
    x = (randn(200, 6) @ randn(6, 6, seed=1)).double()
    gram = (x.t() @ x).float()
    found = conditional_variances(gram, 0.0)
    order = gram.diagonal().argsort(descending=True).tolist()
    for place, column in enumerate(order):
        later = x[:, order[place + 1 :]]
        left = x[:, column]
        if later.shape[1]:
            left = left - later @ torch.linalg.lstsq(later, left.unsqueeze(1)).solution.squeeze(1)
        assert float(found[column]) == pytest.approx(float(left.square().sum()), rel=1e-3)


@pytest.mark.parametrize("gram", [torch.zeros(4, 4), torch.ones(4, 4)])
def test_singular_matrices_have_variances(gram: Tensor) -> None:
    found = conditional_variances(gram, 0.0)
    assert torch.isfinite(found).all()
    assert (found > 0).all()


def test_first_of_each() -> None:
    assert first_of_each(torch.tensor([1, 0, 1, 2, 0])).tolist() == [1, 0, 3]

"""GPTQ with Gram matrices that are hard to decompose: the codes of float64 arithmetic, whatever the inputs are like."""

from __future__ import annotations

import pytest
import torch
from tensors import randn
from torch import Tensor

from lightning_qat import QuantizationConfig
from lightning_qat.ptq.chosen import output_error
from lightning_qat.ptq.gptq import GPTQOptions, choose_gptq
from lightning_qat.schemes import weight_format

#: Two blocks of columns and a part of one, and more than one panel of the decomposition.
COLUMNS = 300


def inputs(kind: str) -> Tensor:
    x = randn(900, COLUMNS)
    if kind == "correlated":
        directions = torch.linalg.qr(randn(COLUMNS, COLUMNS, seed=1))[0]
        return x * torch.logspace(0, -4, COLUMNS) @ directions
    if kind == "of low rank":
        return x[:, :40] @ randn(40, COLUMNS, seed=1)
    if kind == "fewer than columns":
        return x[:70]
    if kind == "one":
        return x[:1]
    if kind == "around a mean":
        return 0.01 * x + 3 * randn(COLUMNS, seed=1)
    if kind == "twice the same":
        return torch.cat((x[:, : COLUMNS // 2],) * 2, 1)
    x[:, 5] *= 1e5
    x[:, 77] *= 300
    return x  # of huge outliers


def in_double(weight: Tensor, gram: Tensor, damping: float, scale: Tensor, *, ordered: bool) -> Tensor:
    """Return the integers of the published algorithm with symmetric 4-bit codes of rows, all but the grid in float64.

    The matrix is the one that is decomposed: in units of the mean power, in float32.
    """
    hessian = (gram / gram.diagonal().double().mean().float()).double()
    hessian.diagonal().copy_((hessian.diagonal().float() + damping).double())
    order = torch.argsort(gram.diagonal(), descending=True, stable=True) if ordered else torch.arange(len(gram))
    root = torch.linalg.cholesky(hessian[order][:, order].flip(0, 1)).flip(0, 1)
    factor = torch.linalg.solve_triangular(root, torch.eye(len(gram), dtype=torch.float64), upper=True)
    left, codes = weight.double()[:, order], torch.empty_like(weight)
    for j, column in enumerate(order.tolist()):
        codes[:, column] = (left[:, j].float() / scale).round().clamp(-8, 7)
        error = (left[:, j] - (codes[:, column] * scale).double()) / factor[j, j]
        left[:, j:] -= error[:, None] * factor[j, j:]
    return codes


@pytest.mark.parametrize(("damping", "ordered"), [(0.01, True), (1e-4, False)])
@pytest.mark.parametrize(
    "kind",
    ["correlated", "of low rank", "fewer than columns", "one", "around a mean", "twice the same", "with outliers"],
)
def test_codes_are_those_of_float64(kind: str, damping: float, ordered: bool) -> None:
    x, weight = inputs(kind), randn(24, COLUMNS, seed=2) * 0.05
    gram = x.t() @ x
    fmt = weight_format(QuantizationConfig("int4", per_channel=True), weight.shape)
    chosen = choose_gptq(weight, gram, fmt, GPTQOptions.published(damping=damping, activation_order=ordered))
    assert chosen.damping == damping
    scale = chosen.scale.reshape(-1)
    wanted = in_double(weight, gram, damping, scale, ordered=ordered)
    assert (chosen.codes == wanted).float().mean() >= 0.999
    best = output_error(weight.double(), wanted.double() * scale.double()[:, None], gram)
    found = output_error(weight.double(), chosen.values().double(), gram)
    assert found <= 1.001 * best + 1e-6 * chosen.nearest_loss

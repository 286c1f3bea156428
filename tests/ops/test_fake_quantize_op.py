"""The op as a citizen of PyTorch: schema, tracing, autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_qat.ops.fake_quantize import fake_quantize, fake_quantize_backward_op, fake_quantize_op
from lightning_qat.ops.layout import resolve_layout

#: Options and the shape of the scale for x of shape [4, 6, 5].
GRANULARITIES: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "tensor": ({}, ()),
    "channel": ({"axis": 1}, (6,)),
    "group": ({"group_size": 15}, (4, 2)),
    "token": ({}, (4, 6, 1)),
}


@pytest.mark.parametrize("granularity", list(GRANULARITIES))
@pytest.mark.parametrize("zero", ["none", "int", "float"])
def test_opcheck(granularity: str, zero: str) -> None:
    kwargs, shape = GRANULARITIES[granularity]
    x, scale = torch.randn(4, 6, 5, requires_grad=True), torch.rand(shape).add(0.1).requires_grad_()
    zero_point = None if zero == "none" else torch.full(shape, 3, dtype=torch.int32)
    if zero == "float" and zero_point is not None:
        zero_point = zero_point.float().requires_grad_()
    grid = resolve_layout(x, scale, zero_point, kwargs.get("axis"), kwargs.get("group_size"))
    torch.library.opcheck(fake_quantize_op, (x, scale, zero_point, 0, 15, *grid))
    tensors = [None if t is None else t.detach() for t in (x, scale, zero_point)]
    needs = [True, granularity != "group", zero == "float"]
    torch.library.opcheck(fake_quantize_backward_op, (torch.randn(4, 6, 5), *tensors, 0, 15, *grid, needs))


@pytest.mark.parametrize(
    ("granularity", "backend", "dynamic"),
    [(g, "aot_eager", False) for g in GRANULARITIES] + [("token", "aot_eager", True), ("channel", "inductor", False)],
)
def test_compiles_in_one_graph(granularity: str, backend: str, dynamic: bool) -> None:
    kwargs, shape = GRANULARITIES[granularity]

    def step(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        return fake_quantize(x * 2, scale, zero_point, bits=4, symmetric=False, **kwargs).sin()

    inputs = torch.randn(4, 6, 5), torch.rand(shape) + 0.1, torch.full(shape, 3.0)
    results = []
    for function in (step, torch.compile(step, backend=backend, fullgraph=True, dynamic=dynamic)):
        leaves = [t.clone().requires_grad_() for t in inputs]
        y = function(*leaves)
        results.append((y.detach(), *torch.autograd.grad(y.sum(), leaves)))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("granularity", list(GRANULARITIES))
def test_saves_its_inputs_and_nothing_else(granularity: str) -> None:
    kwargs, shape = GRANULARITIES[granularity]
    x, scale = torch.randn(4, 6, 5, requires_grad=True), torch.rand(shape).add(0.1).requires_grad_()
    zero_point = torch.full(shape, 3, dtype=torch.int32)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):  # type: ignore[func-returns-value]
        fake_quantize(x, scale, zero_point, symmetric=False, **kwargs)
    assert set(saved) == {x.data_ptr(), scale.data_ptr(), zero_point.data_ptr()}


def test_gradients_come_in_their_own_dtype_and_shape() -> None:
    x = torch.randn(4, 6, dtype=torch.bfloat16, requires_grad=True)
    scale = torch.rand(4, 1, dtype=torch.float64).add(0.1).requires_grad_()
    y = fake_quantize(x, scale, axis=0)
    gradients = torch.autograd.grad(y, (x, scale), torch.ones_like(y))
    assert [(g.dtype, g.shape) for g in gradients] == [(t.dtype, t.shape) for t in (x, scale)]

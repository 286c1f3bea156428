"""Benchmark group ``fake_quantize``: the op against PyTorch's own, and against what torch.compile makes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_qat.ops.fake_quantize import fake_quantize, reference_fake_quantize, reference_fake_quantize_backward

from ._benchmark_peers import silenced, told
from ._timing import Case, Conditions, Results, rated

_GRID = (-127, 127, 0, 0)  # codes from and to, the axis, no groups
_PLAIN, _LEARNED = "fake_quantize forward", "fake_quantize backward, scale gradient"
_BOTH = "fake_quantize forward and backward"

#: Bytes that have to move, in multiples of the tensor's.
_PASSES = {_PLAIN: 2, _BOTH: 5, _LEARNED: 3}


def fake_quantize_group(conditions: Conditions) -> Results:
    """Time a square weight with a scale per output channel: forward, with backward, and the scale's gradient too.

    Float32 on the CPU and bfloat16 on a GPU. The definition compiled by torch.compile, which on a CPU takes a C++
    compiler, is timed besides; PyTorch's own op for learned scales is private and finds the zero point's gradient as
    well.

    Raises:
        RuntimeError: if the op is not PyTorch's, where theirs is exact, or not the definition.
    """
    side, device, dtype = conditions.side, conditions.device, conditions.dtype
    x, grad = (_normal(side, seed).to(device, dtype) for seed in (0, 1))
    scale = x.float().abs().amax(dim=1) / 127
    verify(x, grad, scale)
    cases, notes = _cases(x, grad, scale)
    results = Results(notes=notes)
    for group, alternatives in cases.items():
        moved = dict.fromkeys(alternatives, _PASSES[group] * x.nbytes)
        results += Results(rated(group, alternatives, conditions, baseline=next(iter(alternatives)), moved=moved))
    return results


def _normal(side: int, seed: int) -> Tensor:
    return torch.randn(side, side, generator=torch.Generator().manual_seed(seed))


def _ours(values: Tensor, scale: Tensor) -> Tensor:
    return fake_quantize(values, scale, axis=0)


def _torch_own(values: Tensor, scale: Tensor) -> Tensor:
    zero_point = torch.zeros(len(scale), dtype=torch.int32, device=scale.device)
    return torch.fake_quantize_per_channel_affine(values, scale, zero_point, 0, -127, 127)


def _torch_learned(values: Tensor, scale: Tensor) -> Tensor:
    zero_point = torch.zeros(len(scale), device=scale.device)
    learned: Tensor = torch._fake_quantize_learnable_per_channel_affine(values, scale, zero_point, 0, -127, 127, 1.0)
    return learned


def _reference(values: Tensor, scale: Tensor) -> Tensor:
    return reference_fake_quantize(values, scale, None, *_GRID)


def _reference_backward(grad: Tensor, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return reference_fake_quantize_backward(grad, x, scale, None, *_GRID, [True, True, False])


def _cases(x: Tensor, grad: Tensor, scale: Tensor) -> tuple[dict[str, dict[str, Case]], list[str]]:
    """Return group -> alternative -> what is timed, the baseline first, and why one is missing."""
    weight = x.clone().requires_grad_()

    def learned(function: Callable[[Tensor, Tensor], Tensor]) -> Case:
        step = scale.clone().requires_grad_()
        result = function(weight, step)
        return lambda: torch.autograd.grad(result, (weight, step), grad, retain_graph=True)

    def both(function: Callable[[Tensor, Tensor], Tensor]) -> Case:
        return lambda: torch.autograd.grad(function(weight, scale), weight, grad)

    compiled, compiled_backward = torch.compile(_reference), torch.compile(_reference_backward)
    wanted: dict[str, dict[str, Callable[[], Case]]] = {
        _PLAIN: {
            "torch": lambda: lambda: _torch_own(x, scale),
            "torch.compile": lambda: lambda: compiled(x, scale),
            "lightning_qat": lambda: lambda: _ours(x, scale),
        },
        _BOTH: {"torch": lambda: both(_torch_own), "lightning_qat": lambda: both(_ours)},
        _LEARNED: {
            "torch": lambda: learned(_torch_learned),
            "torch.compile": lambda: lambda: compiled_backward(grad, x, scale),
            "lightning_qat": lambda: learned(_ours),
        },
    }
    cases: dict[str, dict[str, Case]] = {group: {} for group in wanted}
    notes = []
    for group, makers in wanted.items():
        for name, make in makers.items():
            try:
                with silenced():
                    case = make()
                    case()
            except Exception as error:
                if name == "lightning_qat":
                    raise
                notes.append(f"{name} is not timed in {group}: {told(error)}")
            else:
                cases[group][name] = case
    return cases, notes


def verify(x: Tensor, grad: Tensor, scale: Tensor) -> None:
    """Compare with PyTorch at a power of two as the scale, where its product with the reciprocal is exact.

    And with the definition, forward and backward, at the scale that is timed. The scale's gradient may differ by the
    order of its summation.

    Raises:
        RuntimeError: if something differs.
    """
    powers = torch.full((len(x),), 2.0**-5, device=x.device)
    # In float32: PyTorch rounds what it computes in bfloat16 in between.
    if not torch.equal(_ours(x.float(), powers), _torch_own(x.float(), powers)):
        raise RuntimeError("fake_quantize differs from torch.fake_quantize_per_channel_affine; not timed")
    weight, step = x.clone().requires_grad_(), scale.clone().requires_grad_()
    result = _ours(weight, step)
    if not torch.equal(result, _reference(x, scale)):
        raise RuntimeError("fake_quantize differs from reference_fake_quantize; not timed")
    found, found_scale = torch.autograd.grad(result, (weight, step), grad)
    expected, expected_scale, _ = _reference_backward(grad, x, scale)
    if not torch.equal(found, expected):
        raise RuntimeError("the gradient of fake_quantize differs from reference_fake_quantize_backward; not timed")
    # With this scale nothing is cut, so that no term of a sum is larger than its gradient.
    if not bool(((found_scale - expected_scale).abs() <= 1e-6 * grad.float().abs().sum(1)).all()):
        raise RuntimeError("the scale's gradient differs from reference_fake_quantize_backward; not timed")

"""Benchmark group ``adapters``: forward and backward through a packed Linear that does not train, as adapters do."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qat.transforms import convert, prepare

from ._benchmark_peers import silenced, told
from ._memory import kept_bytes
from ._timing import Conditions, Results, compared

#: Tokens of a step: few, as one short sequence has, and those of a training batch.
_TOKENS = (16, 512)
_PRESETS = {"lightning_qat, nf4": "nf4", "lightning_qat, int4": "w4a16", "lightning_qat, int8": "int8_weight_only"}
_FLOAT = "float"


def adapters_group(conditions: Conditions, tokens: tuple[int, ...] = _TOKENS) -> Results:
    """Time a square Linear without gradients of its own, and what its input's gradient keeps beside the weight.

    Float32 on the CPU and bfloat16 on a GPU. Gradients are those of the dequantized weight, which is checked first.

    Raises:
        RuntimeError: if a gradient of ours is another.
    """
    side, device, dtype = conditions.side, conditions.device, conditions.dtype
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(side, side, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(side, side, generator=generator) / side**0.5)
    layer = layer.to(device, dtype).requires_grad_(False)
    forms: dict[str, nn.Module] = {_FLOAT: layer}
    for name, preset in _PRESETS.items():
        forms[name] = _converted(layer, preset)
    results = Results()
    inputs = {many: torch.randn(many, side, generator=generator).to(device, dtype) for many in tokens}
    peers, notes = _peers(layer, inputs[tokens[0]])
    for many, x in inputs.items():
        grad = torch.randn(many, side, generator=generator).to(device, dtype)
        for name in _PRESETS:
            _verify(name, forms[name], x, grad)
        group = f"adapters {side}x{side}, {many} tokens"
        cases = {name: _step(form, x, grad) for name, form in (forms | peers).items()}
        timings = compared(group, cases, conditions.rounds, baseline=_FLOAT, device=device)
        if device.type == "cpu":
            leaf = x.detach().requires_grad_()
            kept = {name: kept_bytes(partial(form, leaf)) for name, form in (forms | peers).items()}
            timings = [replace(t, kept=kept[t.name] / kept[_FLOAT]) for t in timings]
        results += Results(timings)
    return results + Results(notes=notes)


def _converted(layer: nn.Linear, preset: str) -> nn.Module:
    source = nn.Linear(layer.in_features, layer.out_features, bias=False, device=layer.weight.device)
    source.weight.data.copy_(layer.weight)
    made: nn.Module = convert(prepare(nn.Sequential(source), preset))[0]
    return made.to(layer.weight.dtype)


def _peers(layer: nn.Linear, x: Tensor) -> tuple[dict[str, nn.Module], list[str]]:
    """Return the installed peers that give a gradient, and why each other one is not timed."""
    found: dict[str, nn.Module] = {}
    notes = []
    for name, (package, build) in _BUILDERS.items():
        if importlib.util.find_spec(package) is None:
            continue
        try:
            with silenced():
                made = build(layer)
                _step(made, x, torch.ones_like(x))()
        except Exception as error:  # noqa: BLE001 - another library fails in any way it likes; the table says how
            notes.append(f"{name} is not timed: {told(error)}")
        else:
            found[name] = made
    return found, notes


def _bitsandbytes(layer: nn.Linear) -> nn.Module:
    from bitsandbytes.nn import Linear4bit, Params4bit

    rows, columns = layer.weight.shape
    options: dict[str, Any] = {"quant_type": "nf4", "compress_statistics": False}
    made: Any = Linear4bit(columns, rows, False, layer.weight.dtype, **options)
    made.weight = Params4bit(layer.weight.detach().cpu().clone(), requires_grad=False, **options)
    moved: nn.Module = made.to(layer.weight.device)
    return moved


class _TorchaoNF4(nn.Module):
    """As torchtune trains adapters: the weight is an NF4 tensor with nested scales, and its product keeps it packed."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        from torchao.quantization import NF4Tensor

        self.weight = nn.Parameter(NF4Tensor.from_tensor(layer.weight.detach(), 64, 256), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import linear_nf4

        result: Tensor = linear_nf4(x, self.weight)
        return result


_BUILDERS: dict[str, tuple[str, Callable[[nn.Linear], nn.Module]]] = {
    "bitsandbytes, nf4": ("bitsandbytes", _bitsandbytes),
    "torchao, nf4": ("torchao", _TorchaoNF4),
}


def _verify(name: str, form: Any, x: Tensor, grad: Tensor) -> None:
    """Raise unless the input's gradient is that of the float weight that the codes stand for."""
    leaf = x.detach().requires_grad_()
    (found,) = torch.autograd.grad(form(leaf), leaf, grad)
    expected = grad @ form.weight.clone()
    error = float((found - expected).norm() / expected.norm())
    if not error <= torch.finfo(x.dtype).eps:
        raise RuntimeError(f"{name}: the gradient is {error:.1e} of its length from that of its own weight; not timed")


def _step(form: nn.Module, x: Tensor, grad: Tensor) -> Callable[[], object]:
    leaf = x.detach().requires_grad_()
    return lambda: torch.autograd.grad(form(leaf), leaf, grad)

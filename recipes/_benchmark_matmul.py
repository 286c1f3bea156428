"""Benchmark group ``matmul``: one large Linear layer with quantized weights against the float one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from lightning_qat.metrics import sqnr

from ._benchmark_peers import MATMUL_PEERS, MATMUL_PEERS_GPU, Peer, Run, forward_of, silenced, told
from ._benchmark_products import Product, exact_product, kernel_products, our_products
from ._timing import Conditions, Results, rated

#: Against the product in float64 of the numbers that our codes stand for: what rounding allows, in dB.
_LEAST_EXACT = {torch.float32: 80.0, torch.bfloat16: 40.0, torch.float16: 50.0}
#: Against the float layer in float64: below this, neither ours nor a peer computes the layer, in dB.
_LEAST_SQNR = 15.0


def matmul_group(conditions: Conditions, batches: tuple[int, ...] | None = None) -> Results:
    """Time a square Linear, float32 on the CPU and bfloat16 on a GPU, at several batch sizes.

    Bytes of a case: the weights as they are stored, the input and the output. Operations: two for each weight and
    sample.

    Args:
        conditions: how.
        batches: None is 1, 16 and 256, on a GPU also the side of the weight.

    Raises:
        RuntimeError: if one of our products is not that of its codes, or too far from float's.
    """
    side, on_gpu = conditions.side, conditions.device.type == "cuda"
    sizes = batches or ((1, 16, 256, side) if on_gpu else (1, 16, 256))
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(side, side)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(side, side, generator=generator) / side**0.5)
    layer = layer.to(conditions.device, conditions.dtype).eval()
    inputs = [torch.randn(size, side, generator=generator).to(layer.weight) for size in sizes]
    products = our_products(layer, inputs[-1])
    if on_gpu:
        products |= kernel_products(layer)
    others, notes = _peers(MATMUL_PEERS_GPU if on_gpu else MATMUL_PEERS, layer, inputs[-1])
    if not on_gpu:
        notes.append("torch.compile of one float Linear is not timed on the CPU: it ends in the same library call")
    measured = [_measured(layer, products, others, x, conditions) for x in inputs]
    return sum(measured, Results(notes=notes))


def _peers(peers: tuple[Peer, ...], layer: nn.Linear, samples: Tensor) -> tuple[dict[str, Product], list[str]]:
    """Return the installed peers that take the layer, and why each other one is not timed.

    Each has a copy of its own: bitsandbytes' forward pass repacks weights in place on CPUs with AVX512-BF16.
    """
    found, notes = {}, []
    for peer in peers:
        if not peer.installed:
            continue
        try:
            with silenced():
                run = peer.build(nn.Sequential(copy.deepcopy(layer)), samples)
                run(samples)
        except Exception as error:  # noqa: BLE001 - another library fails in any way it likes; the notes say how
            notes.append(f"{peer.name} is not timed: {told(error)}")
            continue
        bits = 8 * layer.weight.element_size() if peer.bits is None else peer.bits
        found[peer.name] = Product(run, int(layer.weight.numel() * bits / 8))
    return found, notes


def _measured(
    layer: nn.Linear, products: dict[str, Product], peers: dict[str, Product], x: Tensor, conditions: Conditions
) -> Results:
    """Verify every product at this batch size, for paths differ between them, and time them."""
    baseline = f"float, {str(layer.weight.dtype).removeprefix('torch.')}"
    forms = {baseline: Product(forward_of(layer), layer.weight.nbytes), **products}
    with torch.inference_mode():
        expected = exact_product(x, layer.weight, layer.bias)
    group = f"matmul Linear {layer.in_features}, batch {len(x)}"
    decibels = {name: _verified(name, form, x, expected) for name, form in forms.items()}
    notes = []
    for name, form in peers.items():
        try:
            with silenced():
                decibels[name] = _verified(name, form, x, expected)
        except Exception as error:  # noqa: BLE001 - as above
            notes.append(f"{name} is not timed in {group}: {told(error)}")
        else:
            forms[name] = form
    cases = {name: _case(form.run, x) for name, form in forms.items()}
    moved = {name: form.weight_bytes + 2 * x.nbytes for name, form in forms.items()}  # the output is like the input
    operations = 2 * layer.weight.numel() * len(x)
    with silenced():  # bitsandbytes logs a warning with each call
        timings = rated(group, cases, conditions, baseline=baseline, moved=moved, operations=operations)
    return Results([replace(timing, sqnr_db=decibels[timing.name]) for timing in timings], notes)


def _verified(name: str, form: Product, x: Tensor, expected: Tensor) -> float:
    """Return the SQNR of a product against the float layer in float64, after comparing it with its own codes'."""
    result = form.run(x)
    if form.exact is not None:
        exact, least = float(sqnr(form.exact(x), result)), _LEAST_EXACT[x.dtype]
        if not exact >= least:
            raise RuntimeError(
                f"{name} at batch {len(x)} is {exact:.1f} dB from the product of its codes, where rounding allows "
                f"{least:.0f}; not timed"
            )
    decibels = float(sqnr(expected, result))
    if not decibels >= _LEAST_SQNR:
        raise RuntimeError(f"{name} at batch {len(x)} is {decibels:.1f} dB from the float layer; not timed")
    return decibels


def _case(run: Run, x: Tensor) -> Callable[[], Tensor]:
    return lambda: run(x)

"""What each layer loses at each number of bits, from the Gram matrices that its codes are chosen with: one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qat.config import PlanLike
from lightning_qat.nn import QATLayer
from lightning_qat.nn.computed_weight import weight_now
from lightning_qat.ptq.adopt import problem_of
from lightning_qat.ptq.bit_allocation import LayerSensitivity
from lightning_qat.ptq.chosen import output_error
from lightning_qat.ptq.methods import METHODS, PTQOptions, choose_codes, reason_for_nearest
from lightning_qat.ptq.statistics import InputStatistics
from lightning_qat.ptq.watch import find_shared_inputs, gather_statistics
from lightning_qat.transforms.calibrate import _call
from lightning_qat.transforms.calibrated_mode import as_calibrated
from lightning_qat.transforms.padding import Padding
from lightning_qat.transforms.phase import float_forward
from lightning_qat.transforms.prepare import copy_model, prepare, qat_layers
from lightning_qat.validation import check_choice


@torch.no_grad()
def gram_sensitivity(
    model: nn.Module,
    batches: Iterable[Any],
    plan: PlanLike = "int8_weight_only",
    bits: Sequence[int] = (2, 3, 4, 6, 8),
    method: str = "clip",
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    options: PTQOptions | None = None,
) -> list[LayerSensitivity]:
    """Return what each layer of ``model`` loses at each of ``bits``, for :func:`allocate_bits` and :func:`mixed_plan`.

    Each batch runs once, in float. The loss of a layer is the power of the change of its own outputs, as a share of
    their power: ``tr((W - Q) G (W - Q)^T) / tr(W G W^T)``. Where :func:`measure_sensitivity` runs the whole model for
    every layer and number of bits, this is a product with the Gram matrix, and knows nothing of what follows the layer.

    Args:
        model: float; stays as it is.
        batches: as :func:`calibrate` takes them.
        plan: which layers, and how: schemes whose bits can change.
        bits: candidates, each 2 to 8.
        method: what chooses the codes: ``"clip"`` or ``"gptq"``.
        forward: called as ``forward(model, batch)`` to run a batch otherwise.
        options: of the method.

    Raises:
        ValueError: there is no batch or no candidate, or a layer has no Gram matrix or fixed bits.
    """
    candidates, known = sorted(set(bits)), tuple(n for n, m in METHODS.items() if m.choose and not m.scaling)
    check_choice("method", method, known)
    kept = list(batches)
    if not candidates or not kept:
        what = "bits is empty; give numbers of bits" if not candidates else "there is no batch; give at least one"
        raise ValueError(f"{what} to choose from")
    original: nn.Module = getattr(model, "_orig_mod", model)
    replica = prepare(copy_model(original, {id(p): p for p in original.parameters()}), plan).eval()
    layers = dict(qat_layers(replica))
    for name, layer in layers.items():
        reason = reason_for_nearest(layer, layer.weight_quantizer.format, method)
        if reason:
            raise ValueError(f"layer {name!r} has no loss to compare: {reason}; leave it out of the plan")
    options = options or PTQOptions()
    padding = Padding(replica, forward or _call)
    runs = [partial(padding.run, batch) for batch in kept]
    with float_forward(replica), as_calibrated(replica), torch.compiler.set_stance("force_eager"):
        padding.look_at(kept, across_ranks=options.across_ranks)
        shared = find_shared_inputs(layers, runs[0], runs[1:])
        seen = gather_statistics(layers, shared, lambda: runs, across_ranks=options.across_ranks, padding=padding)
    missing = [name for name in layers if name not in seen]
    if missing:
        raise ValueError(f"no calibration batch reached {', '.join(map(repr, missing[:5]))}; leave it out of the plan")
    return [_sensitivity(name, layer, seen[name], candidates, method, options) for name, layer in layers.items()]


def _sensitivity(
    name: str,
    layer: QATLayer,
    statistics: InputStatistics,
    candidates: list[int],
    method: str,
    options: PTQOptions,
) -> LayerSensitivity:
    problem = problem_of(layer, statistics)
    power = _power(problem.weight, statistics.gram)
    losses = {}
    for value in candidates:
        layer.weight_quantizer.scheme.check_bits(value, problem.fmt)
        fmt = replace(problem.fmt, bits=value)
        chosen = choose_codes(layer, replace(problem, fmt=fmt), METHODS[method], options)
        losses[value] = chosen.loss / max(power, 1e-300)
    activation = None if layer.input_quantizer is None else layer.input_quantizer.config
    return LayerSensitivity(name, weight_now(layer).numel(), losses, layer.weight_quantizer.config, activation)


def _power(weight: Tensor, gram: Tensor) -> float:
    """Return the power of all outputs."""
    if gram.dim() == 2:
        return output_error(weight, torch.zeros_like(weight), gram)
    parts = weight.unflatten(0, (len(gram), -1))
    return sum(output_error(part, torch.zeros_like(part), one) for part, one in zip(parts, gram, strict=True))

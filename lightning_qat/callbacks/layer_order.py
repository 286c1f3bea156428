"""Layers in the order of what fewer bits cost, measured while a model trains, on the batch at hand."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from lightning_qat.callbacks.calibration_run import call_step, without_effects
from lightning_qat.nn import QATLayer
from lightning_qat.nn.computed_weight import weight_now
from lightning_qat.transforms.padding import output_tensors
from lightning_qat.transforms.prepare import qat_layers
from lightning_qat.transforms.ranges import static_quantizers


@torch.no_grad()
def order_by_loss(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    batch: Any,
    batch_idx: int,
    names: list[str],
    bits: int,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    *,
    weights: bool = True,
    activations: bool = False,
) -> list[str]:
    """Return ``names`` with the layer first that changes the output least where it has ``bits`` bits.

    As :func:`measure_sensitivity` does it, for a model in training: the output is that of the module's ``forward``
    where ``training_step`` calls it, else the loss; all other layers stay as they train; evaluation mode. It runs once,
    and once for each layer. On several ranks each takes its own batch, and all get the order of the sum. Nothing in
    the module, its metrics, logs or the random state changes.
    """
    layers = dict(qat_layers(module))
    with contextlib.ExitStack() as stack:
        stack.enter_context(isolate_rng())
        stack.enter_context(without_effects(module))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(_evaluating(module))
        stack.enter_context(trainer.precision_plugin.train_step_context())
        expected = _outputs(module, batch, batch_idx, forward)
        noise = []
        for name in names:
            with _with_bits(layers[name], bits, weights, activations):
                actual = _outputs(module, batch, batch_idx, forward)
            pairs = zip(actual, expected, strict=True)
            noise.append(sum(float((a.double() - e.double()).square().sum()) for a, e in pairs))
    losses = torch.tensor(noise, dtype=torch.float32, device=trainer.strategy.root_device)
    if trainer.world_size > 1:
        losses = trainer.strategy.reduce(losses, reduce_op="mean")
    found = losses.nan_to_num(nan=float("inf")).tolist()
    return [name for _, _, name in sorted(zip(found, range(len(names)), names, strict=True))]


def _outputs(
    module: pl.LightningModule, batch: Any, batch_idx: int, forward: Callable[[nn.Module, Any], Any] | None
) -> list[Tensor]:
    seen: list[Any] = []
    handle = module.register_forward_hook(lambda _, args, output: seen.append(output))
    try:
        result = call_step(module.training_step, batch, batch_idx) if forward is None else forward(module, batch)
    finally:
        handle.remove()
    return [t.detach().clone() for t in output_tensors(seen if seen else result)]


@contextlib.contextmanager
def _with_bits(layer: QATLayer, bits: int, weights: bool, activations: bool) -> Iterator[None]:
    """Let the weight of ``layer``, its input or both have ``bits`` bits inside."""
    weight, activation = layer.weight_quantizer, layer.input_quantizer
    before = [(q, copy.deepcopy(q.state_dict())) for q in (weight, activation) if q is not None]
    try:
        if weights:
            weight.set_bits(bits, weight_now(layer))
        if activations and activation is not None:
            activation.set_bits(bits)
        yield
    finally:
        for quantizer, state in before:
            quantizer.load_state_dict(state)


@contextlib.contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode, in which layers that have no range yet stay in float."""
    modes = {child: child.training for child in module.modules()}
    without_range = [q for q in static_quantizers(module) if q.quantizing and not q.calibrated]
    try:
        module.eval()
        for quantizer in without_range:
            quantizer.quantizing = False
        yield
    finally:
        for quantizer in without_range:
            quantizer.quantizing = True
        for child, training in modes.items():
            child.training = training

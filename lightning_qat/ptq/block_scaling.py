"""Scaling the channels of one block before its codes are chosen: AWQ and SmoothQuant in the engine.

:func:`scale_block` changes the float weights so that the block computes what it did, and returns the statistics of the
inputs as they are then; any algorithm may choose codes after it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qat.nn import QATLayer
from lightning_qat.ptq.adopt import arranges_input, takes_any_order
from lightning_qat.ptq.awq import AWQOptions, rows_are_independent, scaled_loss, search_scales
from lightning_qat.ptq.channels import multiply_columns
from lightning_qat.ptq.expected_error import conditional_variances
from lightning_qat.ptq.folding import Fold, apply_fold, declined_scale, find_folds, still_holding
from lightning_qat.ptq.smoothing import SmoothingOptions, search_smoothing
from lightning_qat.ptq.statistics import InputStatistics
from lightning_qat.ptq.watch import Run, of_every_rank

#: A scale that is kept at the input costs a multiplication at every call: it has to bring the loss below this share.
_LEAST_GAIN = 0.95


@dataclass(frozen=True, eq=False)
class GroupScaling:
    """What became of the layers that share an input.

    Args:
        fold: which layers, and where their scale went or why nowhere.
        scales: float32 ``[K]``: weights were multiplied by them, the source divided, or without one the input; None if
            nothing was changed.
        loss: of the weights rounded to nearest, with the scales.
        plain_loss: the same without.
        alpha: exponent of the inputs' magnitude.
    """

    fold: Fold
    scales: Tensor | None = None
    loss: float | None = None
    plain_loss: float | None = None
    alpha: float | None = None

    @property
    def note(self) -> str:
        """What a reader of the report should know."""
        known = self.scales is not None and self.loss is not None and self.plain_loss is not None
        share = f"{self.loss / max(self.plain_loss, 1e-30):.3f} of the loss without" if known else ""  # type: ignore[operator,type-var]
        if self.fold.source is None:
            return f"scale kept at the input, {self.fold.reason}: {share}" if known else f"no scale: {self.fold.reason}"
        return f"scale in {self.fold.source.name!r}: {share}" if known else "no scale: none is better"


@dataclass(frozen=True, eq=False)
class BlockScaling:
    """What :func:`scale_block` did.

    Args:
        groups: in the order of the groups that were given; where scales are kept at the inputs, one for each layer.
        statistics: of the layers' inputs as they are now: what comes to the layers, before these multiply it.
    """

    groups: tuple[GroupScaling, ...]
    statistics: Mapping[str, InputStatistics]

    @property
    def folds(self) -> tuple[Fold, ...]:
        """For the next block: ``like``."""
        return tuple(group.fold for group in self.groups)

    @property
    def changed(self) -> dict[str, nn.Module]:
        """Modules that took in a scale, by name within the block: their parameters are others now."""
        sources = [group.fold.source for group in self.groups if group.scales is not None]
        return {source.name: source.module for source in sources if source is not None}

    @property
    def notes(self) -> dict[str, str]:
        """Layer -> what a reader of the report should know."""
        return {name: group.note for group in self.groups for name in group.fold.layers}


def scale_block(
    block: nn.Module,
    layers: Mapping[str, QATLayer],
    groups: Sequence[Sequence[str]],
    statistics: Mapping[str, InputStatistics],
    run: Run,
    options: AWQOptions | SmoothingOptions | None = None,
    *,
    untouchable: frozenset[int] = frozenset(),
    like: Sequence[Fold] = (),
    others: Sequence[Run] = (),
    across_ranks: bool = False,
) -> BlockScaling:
    """Multiply the weights of layers that share an input by the scales of least loss and divide what makes the input.

    Where nothing can be divided before a plain Linear, it divides its input itself, with scales of its own, if that
    gains enough and the options say so. The block computes the same in float. Parameters are replaced, not written to.

    Args:
        block: in evaluation mode; a whole model where it has no blocks.
        layers: prepared, by name.
        groups: names of layers that share an input, see :func:`lightning_qat.ptq.watch.find_shared_inputs`.
        statistics: of the layers' inputs; a group without is left alone.
        run: runs ``block`` on a batch and returns its output, the same each time.
        options: of AWQ or of SmoothQuant.
        untouchable: see :func:`lightning_qat.ptq.channels.shared_parameters`.
        like: folds of a block built alike, which spare most of the tries.
        others: run ``block`` on batches that call layers which the first one does not: folds have to hold there too.
        across_ranks: leave out folds that not every rank has found; each calls this.
    """
    options = options or AWQOptions()
    able = [tuple(group) for group in groups if not _kept_apart(group, layers, statistics)]
    found = find_folds(block, layers, able, run, untouchable=untouchable, allowed=_takes_rows, like=like)
    for other in others:
        found = still_holding(block, layers, found, other)
    folds = {fold.layers: fold for fold in found}
    if across_ranks:
        folds = _agreed(folds)
    changed = dict(statistics)
    scalings = []
    for group in map(tuple, groups):
        fold = folds.get(group) or Fold(group, reason=_kept_apart(group, layers, statistics))
        if fold.source is None and _may_keep(group, layers, statistics, options, untouchable):
            scalings += [_kept(Fold((name,), reason=fold.reason), layers, statistics, options) for name in group]
            continue
        scaling = GroupScaling(fold) if fold.source is None else _search(fold, layers, statistics, options)
        if scaling.scales is not None:
            apply_fold(fold, layers, scaling.scales)
            divided = statistics[group[0]].divided_by(scaling.scales)
            changed |= dict.fromkeys(group, divided)
        scalings.append(scaling)
    return BlockScaling(tuple(scalings), changed)


def _agreed(folds: dict[tuple[str, ...], Fold]) -> dict[tuple[str, ...], Fold]:
    """Return the folds with those left out that are others on another rank, whose batch shows something else."""
    told = {
        group: None if fold.source is None or fold.channels is None
        else (fold.source.name, fold.source.offset, fold.channels.tolist())
        for group, fold in folds.items()
    }  # fmt: skip
    ranks = of_every_rank(told)
    same = {group for group in folds if all(rank.get(group) == told[group] for rank in ranks)}
    other = "not all ranks find the same module before it"
    return {group: fold if group in same else Fold(group, reason=other) for group, fold in folds.items()}


def _kept_apart(group: Sequence[str], layers: Mapping[str, QATLayer], statistics: Mapping[str, InputStatistics]) -> str:
    """Return why a group is not scaled whatever makes its inputs, or nothing."""
    for name in group:
        if name not in statistics:
            return f"{name!r} got no input, or one without a Gram matrix"
        if statistics[name].gram.dim() != 2:
            return f"{name!r} has several groups of channels"
        if _has_given_grid(layers[name]):
            return f"the scales of {name!r} are given"
        if arranges_input(layers[name]):
            return f"{name!r} scales or orders its input already"
    return ""


def _may_keep(
    group: Sequence[str],
    layers: Mapping[str, QATLayer],
    statistics: Mapping[str, InputStatistics],
    options: AWQOptions | SmoothingOptions,
    untouchable: frozenset[int],
) -> bool:
    """Return whether layers of a group can divide their inputs themselves."""
    if not options.keep_scales or _kept_apart(group, layers, statistics):
        return False
    return all(takes_any_order(layers[n]) for n in group) and not declined_scale(group, layers, untouchable)


def _kept(
    fold: Fold,
    layers: Mapping[str, QATLayer],
    statistics: Mapping[str, InputStatistics],
    options: AWQOptions | SmoothingOptions,
) -> GroupScaling:
    """Let a layer divide its input by the scales of least loss, if they gain enough."""
    found = _search(fold, layers, statistics, options)
    if found.scales is None or found.loss is None or found.plain_loss is None:
        return found
    if isinstance(options, AWQOptions) and options.codes == "gptq":  # the losses are of codes rounded to nearest
        found = _left_to_gptq(found, layers, statistics, options)
    if found.loss > _LEAST_GAIN * found.plain_loss:  # type: ignore[operator]
        return GroupScaling(replace(fold, reason=f"{fold.reason}; kept at the input it gains too little"))
    layer, scales = layers[fold.layers[0]], found.scales
    multiply_columns(layer, scales)  # type: ignore[arg-type]
    layer.weight_quantizer.arrange_input(None, scales.reciprocal())  # type: ignore[union-attr]
    return found


def _left_to_gptq(
    found: GroupScaling,
    layers: Mapping[str, QATLayer],
    statistics: Mapping[str, InputStatistics],
    options: AWQOptions,
) -> GroupScaling:
    """Return the same with losses as they are expected where later columns make up for an error."""
    scales: Any = found.scales
    name = found.fold.layers[0]
    weight, fmt = layers[name].weight.detach(), layers[name].weight_quantizer.format
    cost = conditional_variances(statistics[name].gram, options.damping)
    loss, plain = (scaled_loss(weight, scale, cost, fmt) for scale in (scales, torch.ones_like(scales)))
    return replace(found, loss=loss, plain_loss=plain)


def _has_given_grid(layer: QATLayer) -> bool:
    quantizer = layer.weight_quantizer
    return quantizer.frozen or (quantizer.learned is not None and quantizer.learned.ready)


def _takes_rows(module: nn.Module) -> bool:
    """Return whether a module's rows can be divided without changing how it is quantized itself."""
    if not isinstance(module, QATLayer):
        return True
    fmt = module.weight_quantizer.format
    return rows_are_independent(fmt, module.weight.shape) and not _has_given_grid(module)


def _search(
    fold: Fold,
    layers: Mapping[str, QATLayer],
    statistics: Mapping[str, InputStatistics],
    options: AWQOptions | SmoothingOptions,
) -> GroupScaling:
    weights = [layers[name].weight.detach() for name in fold.layers]
    formats = [layers[name].weight_quantizer.format for name in fold.layers]
    seen = statistics[fold.layers[0]]
    tied = None if fold.tied is None else fold.tied.to(seen.gram.device)
    if isinstance(options, SmoothingOptions):
        inputs = [q.format for name in fold.layers if (q := layers[name].input_quantizer) is not None]
        if not inputs:
            return GroupScaling(Fold(fold.layers, reason="inputs that stay in float need no smoothing"))
        token = all(fmt.dynamic and fmt.dynamic_range == "token" for fmt in inputs)
        bits, shared = min(fmt.bits for fmt in inputs), "token" if token else "tensor"
        own = replace(options, activation_bits=bits, activation_range=shared)
        calibrated = any(not fmt.dynamic for fmt in inputs)
        smooth = search_smoothing(weights, seen, formats, own, tied, calibrated=calibrated)
        scales = None if smooth.alpha is None else smooth.scales
        return GroupScaling(fold, scales, smooth.loss, smooth.plain_loss, smooth.alpha)
    found = search_scales(weights, seen.gram, seen.mean_magnitude, formats, options, tied)
    scales = None if found.alpha is None and not found.refined else found.scales
    return GroupScaling(fold, scales, found.loss, found.plain_loss, found.alpha)

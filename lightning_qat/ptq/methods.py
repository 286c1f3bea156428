"""The algorithms that choose codes, by name, and what each of them needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qat.config import QuantizationPlan, QuantizationScheme
from lightning_qat.nn.recurrent import RecurrentWeight
from lightning_qat.ptq.awq import AWQOptions
from lightning_qat.ptq.channels import computes_weight
from lightning_qat.ptq.chosen import ChosenCodes
from lightning_qat.ptq.clipping import ClippingOptions, choose_clipped
from lightning_qat.ptq.column_grid import check_target
from lightning_qat.ptq.equalizing_scales import EqualizationOptions
from lightning_qat.ptq.gptq import GPTQOptions, choose_gptq, choose_ordered
from lightning_qat.ptq.many_small import choose_many_small
from lightning_qat.ptq.nearest import choose_nearest
from lightning_qat.ptq.smoothing import SmoothingOptions
from lightning_qat.ptq.statistics import InputStatistics, has_own_forward, input_geometry
from lightning_qat.schemes import TensorFormat
from lightning_qat.validation import check_bool, check_choice

#: In which order layers are quantized, from the most exact to the fastest.
ORDERS = ("sublayers", "blocks", "one_pass")

#: Groups of channels that are problems of their own; more of them, as a depthwise convolution has, are solved at once.
_MOST_GROUPS = 64


@dataclass(frozen=True, kw_only=True)
class PTQOptions:
    """How layers are quantized with statistics.

    Args:
        order: ``"sublayers"``: within a block, layers that share an input are quantized before the inputs of those that
            follow are looked at (the "true sequential" order); ``"blocks"``: each block sees what the quantized blocks
            before it return; ``"one_pass"``: all inputs are those of the float model.
        gptq: of ``"gptq"``, ``"awq+gptq"`` and ``"smoothquant+gptq"``.
        awq: of ``"awq"`` and ``"awq+gptq"``.
        clipping: of ``"clip"`` and ``"awq"``.
        smoothing: of ``"smoothquant"`` and ``"smoothquant+gptq"``.
        equalization: of the channels of convolutions, before all else and with any method; None leaves them, see
            :func:`lightning_qat.ptq.equalization.equalize`.
        across_ranks: every rank of ``torch.distributed`` calls this with batches of its own; all get the same model.
    """

    order: str = "sublayers"
    gptq: GPTQOptions = field(default_factory=GPTQOptions)
    awq: AWQOptions = field(default_factory=AWQOptions)
    clipping: ClippingOptions = field(default_factory=ClippingOptions)
    smoothing: SmoothingOptions = field(default_factory=SmoothingOptions)
    equalization: EqualizationOptions | None = None
    across_ranks: bool = False

    def __post_init__(self) -> None:
        check_choice("order", self.order, ORDERS)
        check_bool("across_ranks", self.across_ranks)
        if not isinstance(self.equalization, (EqualizationOptions, type(None))):
            raise ValueError(f"equalization={self.equalization!r} is not allowed; use EqualizationOptions() or None")


@dataclass(frozen=True, eq=False)
class LayerProblem:
    """What an algorithm decides about.

    Args:
        weight: ``[N, K]``.
        statistics: of the inputs.
        fmt: of the codes.
        scale, zero_point: of a grid that is given, as QAT learned it; None leaves it to the algorithm.
        orders: whether the layer can take its input features in another order.
    """

    weight: Tensor
    statistics: InputStatistics
    fmt: TensorFormat
    scale: Tensor | None = None
    zero_point: Tensor | None = None
    orders: bool = False


Choose = Callable[[LayerProblem, PTQOptions], ChosenCodes]


@dataclass(frozen=True)
class Method:
    """How one method works.

    Args:
        choose: of one layer; None rounds to nearest without any statistics.
        check: raises ``ValueError`` for a format that it has no codes for.
        solves_many: whether the many small matrices of a depthwise convolution are solved instead.
        scaling: how channels are scaled before, see :func:`lightning_qat.ptq.block_scaling.scale_block`; None leaves
            them.
    """

    choose: Choose | None = None
    check: Callable[[TensorFormat], None] | None = None
    scaling: Callable[[PTQOptions], AWQOptions | SmoothingOptions] | None = None
    solves_many: bool = False

    @property
    def needs_statistics(self) -> bool:
        """Whether batches have to be run."""
        return self.choose is not None


def _nearest(problem: LayerProblem, options: PTQOptions) -> ChosenCodes:
    gram = problem.statistics.gram
    return choose_nearest(problem.weight, gram, problem.fmt, problem.scale, problem.zero_point)


def _gptq(problem: LayerProblem, options: PTQOptions) -> ChosenCodes:
    grid = {"scale": problem.scale, "zero_point": problem.zero_point}
    choose = choose_ordered if problem.orders else choose_gptq
    return choose(problem.weight, problem.statistics.gram, problem.fmt, options.gptq, **grid)


def _clipped(problem: LayerProblem, options: PTQOptions) -> ChosenCodes:
    gram = problem.statistics.gram
    return choose_clipped(problem.weight, gram, problem.fmt, options.clipping, problem.scale, problem.zero_point)


def _nearest_or_clipped(problem: LayerProblem, options: PTQOptions) -> ChosenCodes:
    return (_clipped if options.awq.clip else _nearest)(problem, options)


#: What ``quantize_model`` takes as ``method``.
METHODS: dict[str, Method] = {
    "rtn": Method(),
    "clip": Method(_clipped),
    "gptq": Method(_gptq, check_target, solves_many=True),
    "awq": Method(_nearest_or_clipped, None, lambda options: options.awq),
    "awq+gptq": Method(_gptq, check_target, lambda options: replace(options.awq, codes="gptq"), True),
    "smoothquant": Method(_nearest, None, lambda options: options.smoothing),
    "smoothquant+gptq": Method(_gptq, check_target, lambda options: replace(options.smoothing, codes="gptq"), True),
}


def reason_for_nearest(layer: nn.Module, fmt: TensorFormat, method: str) -> str:
    """Return why ``layer`` is rounded to nearest whatever ``method`` would do, or ``""``."""
    if not METHODS[method].needs_statistics:
        return ""
    geometry = input_geometry(layer)
    if geometry is None:
        kind = "an embedding looks rows up" if isinstance(layer, nn.Embedding) else "a transposed convolution"
        kind = "a recurrent layer reads it" if isinstance(layer, RecurrentWeight) else kind
        kind = "a forward of its own reads it" if has_own_forward(layer) else kind
        return f"{kind}: there is no Gram matrix of its inputs"
    if computes_weight(layer):
        return "its weight is computed (pruned, normed or parametrized); make it a parameter to have codes chosen"
    groups = geometry[0]
    if groups > _MOST_GROUPS and not METHODS[method].solves_many:
        return f"{groups} groups of channels: each has few weights and a Gram matrix of its own"
    if groups > 1 and fmt.axis is None and fmt.group_size is None:
        return "scales are shared by several groups of channels"
    check = METHODS[method].check
    try:
        if check is not None:
            check(fmt)
    except ValueError as error:
        return str(error)
    return ""


def choose_codes(layer: nn.Module, problem: LayerProblem, method: Method, options: PTQOptions) -> ChosenCodes:
    """Return the codes of a layer; each group of a grouped convolution is a problem of its own."""
    choose: Any = method.choose
    geometry = input_geometry(layer)
    groups = 1 if geometry is None else geometry[0]
    if groups > _MOST_GROUPS and method.solves_many:
        grams = problem.statistics.gram
        return choose_many_small(problem.weight, grams, problem.fmt, problem.scale, problem.zero_point)
    if groups == 1:
        chosen: ChosenCodes = choose(problem, options)
        return chosen
    parts = []
    statistics = problem.statistics
    rows = problem.weight.shape[0] // groups
    for index in range(groups):
        here = slice(index * rows, (index + 1) * rows)
        own = replace(
            statistics,
            gram=statistics.gram[index],
            mean_magnitude=statistics.mean_magnitude[index],
            max_magnitude=statistics.max_magnitude[index],
        )
        scale, zero_point = (None if t is None else t[here] for t in (problem.scale, problem.zero_point))
        parts.append(choose(LayerProblem(problem.weight[here], own, problem.fmt, scale, zero_point), options))
    notes = dict.fromkeys(note for part in parts for note in part.notes)
    zero_points: Any = [part.zero_point for part in parts]
    return ChosenCodes(
        torch.cat([part.codes for part in parts]),
        torch.cat([part.scale for part in parts]),
        None if zero_points[0] is None else torch.cat(zero_points),
        problem.fmt,
        sum(part.loss for part in parts),
        sum(part.nearest_loss for part in parts),
        max(part.damping for part in parts),
        tuple(notes),
    )


#: Schemes that say by their name which algorithm chooses the codes.
_METHOD_OF = {QuantizationScheme.GPTQ: "gptq", QuantizationScheme.AWQ: "awq"}


def method_of(plan: QuantizationPlan) -> str:
    """Return the method that the schemes of a plan name."""
    weights: list[Any] = [rule.weight for rule in plan.rules] + [getattr(plan.base, "scheme", None)]
    schemes = [getattr(weight, "scheme", weight) for weight in weights if weight is not None]
    named = dict.fromkeys(_METHOD_OF[scheme] for scheme in schemes if scheme in _METHOD_OF)
    if len(named) > 1:
        raise ValueError(f"the plan names several algorithms, {', '.join(named)}; say which with method=...")
    return next(iter(named), "rtn")

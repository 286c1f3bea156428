"""Learned scales in the user's optimizer: in groups of their own, whatever was made of the rest.

Weight decay would pull a scale's exponent to 0, which is the scale 1. So scales have none, and a learning rate of
their own. Schedulers keep one number for each group of their optimizer and get one for each group more.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lightning_qat.nn import QATLayer
from lightning_qat.quantizers.learned_scale import LearnedScale

#: What a scheduler keeps for each group: learning rates, and what is no learning rate.
_RATES = ("base_lrs", "_last_lr", "max_lrs", "min_lrs", "eta_mins")
_OTHERS = ("lr_lambdas", "base_momentums", "max_momentums")

#: Optimizers that update matrices alone, which scales are not (``Muon`` is there from torch 2.9 on).
_MATRICES_ALONE: tuple[type[Optimizer], ...] = tuple(filter(None, [getattr(torch.optim, "Muon", None)]))

#: Learning rates that schedulers keep in the group itself.
_GROUP_RATES = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr")


def learned_scales(model: nn.Module) -> list[LearnedScale]:
    """Return what holds the learned scales of ``model``, each once."""
    return [module for module in model.modules() if isinstance(module, LearnedScale)]


def _scale_ids(model: nn.Module) -> dict[int, nn.Parameter]:
    return {id(p): p for learned in learned_scales(model) for p in learned.parameters()}


def quantization_param_groups(
    module: nn.Module, lr: float, quantization_lr: float, **options: Any
) -> list[dict[str, Any]]:
    """Return parameter groups for an optimizer: everything else, and the learned scales without weight decay.

    ``torch.optim.AdamW(quantization_param_groups(model, 1e-3, 1e-4), weight_decay=0.01)``. Without learned scales
    there is the first group alone. Parameters that take no gradient are left out.

    Args:
        module: a prepared model.
        lr: of everything else.
        quantization_lr: of the scales. With Adam about the share of itself that a scale moves by in a step.
        **options: of the group of everything else, such as ``weight_decay``.

    Raises:
        ValueError: for a learning rate that is not positive.
    """
    for name, value in (("lr", lr), ("quantization_lr", quantization_lr)):
        if not isinstance(value, (int, float, Tensor)) or not float(value) > 0:
            raise ValueError(f"{name}={value!r} is not allowed; use a positive number")
    scales = _scale_ids(module)
    rest = [p for p in module.parameters() if p.requires_grad and id(p) not in scales]
    groups: list[dict[str, Any]] = [{"params": rest, "lr": lr, **options}]
    if scales:
        groups.append({"params": list(scales.values()), "lr": quantization_lr, "weight_decay": 0.0})
    return groups


def separate_scales(
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    schedulers: Iterable[Any] = (),
    lr: float | None = None,
) -> int:
    """Give the learned scales of ``model`` groups of their own in ``optimizers``, each where its layer's weight is.

    Groups that hold scales alone, as of :func:`quantization_param_groups`, stay as they are. A new group is a copy of
    the one with the layer's weight (of the first, where no optimizer has the weight), with ``lr`` and without
    weight decay. Where ``Muon`` has the weight, it is that of the bias, or the first of another optimizer. Doing it
    again changes nothing.

    Args:
        model: a prepared model.
        optimizers: of any kind with ``param_groups``.
        schedulers: that were made of them; they get a number for each new group.
        lr: of the scales, in place of the one that the group was made with; schedules multiply it as they do that.
            Of ``OneCycleLR`` and ``CyclicLR``, which set it anew, the highest. LBFGS has one for all parameters.

    Returns:
        How many groups were added.

    Raises:
        ValueError: if a scheduler keeps numbers for each group that are not known here, for an ``lr`` with LBFGS, or
            if there is no optimizer but ``Muon``.
    """
    scales, added = _scale_ids(model), 0
    optimizers = [optimizer for optimizer in optimizers if optimizer.param_groups]  # Lightning's stand-in for none
    for optimizer in optimizers:
        if isinstance(optimizer, LBFGS):
            _leave_whole(optimizer, scales, lr)
    optimizers = [optimizer for optimizer in optimizers if not isinstance(optimizer, LBFGS)]
    if not scales or not optimizers:
        return 0
    optimizers = _without_matrices_alone(optimizers, scales)
    homes = _homes(model, optimizers)
    for optimizer in optimizers:
        groups = [{id(p) for p in group["params"]} for group in optimizer.param_groups]
        apart = set().union(*(group for group in groups if group <= scales.keys()))
        wanted: dict[int, list[nn.Parameter]] = {}
        for key, parameter in scales.items():
            home, index = homes[key]
            if home is optimizer and key not in apart:
                wanted.setdefault(index, []).append(parameter)
        moved = {id(p) for several in wanted.values() for p in several}
        for group in optimizer.param_groups:
            if moved & {id(p) for p in group["params"]}:
                group["params"] = [p for p in group["params"] if id(p) not in moved]
        for index, several in wanted.items():
            _add_group(optimizer, index, several, lr, _of(optimizer, schedulers))
            added += 1
    return added


def _leave_whole(optimizer: Optimizer, scales: dict[int, nn.Parameter], lr: float | None) -> None:
    """Take out of ``scales`` those of an LBFGS: it takes its steps in one group, and decays no weight."""
    held = scales.keys() & {id(p) for group in optimizer.param_groups for p in group["params"]}
    if held and lr is not None:
        raise ValueError(
            f"lr={lr} of the learned scales is not possible with LBFGS, which has one learning rate for all "
            "parameters; leave lr out, or use another optimizer"
        )
    for key in held:
        del scales[key]


def _without_matrices_alone(optimizers: Sequence[Optimizer], scales: dict[int, nn.Parameter]) -> list[Optimizer]:
    """Return the optimizers that take scales, and take scales out of the others: those of groups are matrices."""
    others = [optimizer for optimizer in optimizers if not isinstance(optimizer, _MATRICES_ALONE)]
    if not others:
        raise ValueError(
            f"{type(optimizers[0]).__name__} updates matrices alone, and learned scales are none; return a second "
            "optimizer for the other parameters from configure_optimizers, such as AdamW for the biases"
        )
    for optimizer in optimizers:
        if isinstance(optimizer, _MATRICES_ALONE):
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if id(p) not in scales]
    return others


def _homes(model: nn.Module, optimizers: Sequence[Optimizer]) -> dict[int, tuple[Optimizer, int]]:
    """Return for each scale the optimizer and the group that it belongs to: its own, else its layer's weight's."""
    held = {
        id(p): (optimizer, index)
        for optimizer in reversed(optimizers)
        for index, group in enumerate(optimizer.param_groups)
        for p in group["params"]
    }
    homes: dict[int, tuple[Optimizer, int]] = {}
    for layer in model.modules():
        inside = [m for child in layer.children() for m in (child, *child.children()) if isinstance(m, LearnedScale)]
        own = [*layer._parameters.values(), *(layer.weight_parameters() if isinstance(layer, QATLayer) else ())]
        weight = next((held[id(p)] for p in own if id(p) in held), None)
        for parameter in (p for learned in inside for p in learned.parameters()):
            found = held.get(id(parameter)) or homes.get(id(parameter)) or weight
            if found is not None:
                homes[id(parameter)] = found
    return {key: homes.get(key, (optimizers[0], 0)) for key in _scale_ids(model)}


def _of(optimizer: Optimizer, schedulers: Iterable[Any]) -> list[Any]:
    """Return the schedulers of ``optimizer``, with those inside of others, each once."""
    found: dict[int, Any] = {}
    waiting = list(schedulers)
    while waiting:
        scheduler = waiting.pop()
        waiting += list(getattr(scheduler, "_schedulers", ()))
        if getattr(scheduler, "optimizer", None) is optimizer:
            found[id(scheduler)] = scheduler
    return list(found.values())


def _add_group(
    optimizer: Optimizer, index: int, parameters: list[nn.Parameter], lr: float | None, schedulers: list[Any]
) -> None:
    template, before = optimizer.param_groups[index], len(optimizer.param_groups)
    made_with = _made_with(template, index, schedulers)
    factor = 1.0 if lr is None or not float(made_with) else lr / float(made_with)
    group = {key: value for key, value in template.items() if key not in ("params", "param_names", "name")}
    group |= {key: _times(group[key], factor) for key in _GROUP_RATES if key in group}
    if lr is not None and not float(made_with):
        group["lr"] = lr
    if "weight_decay" in group:
        group["weight_decay"] = 0.0
    rates = [_rates_of(scheduler, optimizer) for scheduler in schedulers]
    for scheduler, known in zip(schedulers, rates, strict=True):
        _check_known(scheduler, before, known)
    if "param_names" in template:
        group["params"] = [(f"quantization_scale.{before}.{i}", p) for i, p in enumerate(parameters)]
    else:
        group["params"] = parameters
    optimizer.add_param_group(group)
    for scheduler, known in zip(schedulers, rates, strict=True):
        for name in (*known, *_OTHERS):
            values = getattr(scheduler, name, None)
            if isinstance(values, list) and len(values) == before:
                values.append(_times(values[index], 1.0 if name in _OTHERS else factor))
        _check_answer(scheduler, before + 1)


def _rates_of(scheduler: Any, optimizer: Optimizer) -> list[str]:
    """Return the names of what ``scheduler`` keeps for each group and is a learning rate.

    In a scheduler that is not PyTorch's also lists of exactly the rates that the groups have or were made with.
    """
    names = list(_RATES)
    if type(scheduler).__module__ != LRScheduler.__module__:
        held = [[float(g[key]) for g in optimizer.param_groups if key in g] for key in ("lr", "initial_lr")]
        for name, value in vars(scheduler).items():
            numbers = isinstance(value, list) and value and all(isinstance(v, (float, Tensor)) for v in value)
            if numbers and name not in names and [float(v) for v in value] in held:
                names.append(name)
    return names


def _made_with(group: dict[str, Any], index: int, schedulers: list[Any]) -> Any:
    """Return the learning rate that says how large the others of a group are.

    ``OneCycleLR`` and ``CyclicLR`` take no notice of the one that the group was made with: theirs is the highest.
    """
    highest = [rates[index] for s in schedulers if isinstance(rates := getattr(s, "max_lrs", None), list)]
    return max([*highest, group.get("max_lr", 0.0)], key=float) or group.get("initial_lr", group["lr"])


def _times(value: Any, factor: float) -> Any:
    """Return a number of its own: a learning rate may be a tensor that is changed in place."""
    if isinstance(value, Tensor):
        return value * factor
    return value if factor == 1.0 else value * factor


def _check_known(scheduler: Any, groups: int, rates: list[str]) -> None:
    if type(scheduler).__module__ == LRScheduler.__module__:
        return
    known = (*rates, *_OTHERS)
    for name, value in vars(scheduler).items():
        if name in known or not isinstance(value, (list, tuple)) or len(value) != groups:
            continue
        numbers = all(isinstance(v, (int, float, Tensor)) or callable(v) for v in value)
        if numbers and isinstance(scheduler, (LRScheduler, ReduceLROnPlateau)) and groups > 1:
            raise _cannot_be_extended(scheduler, f"keeps {name!r} for each of the {groups} parameter groups")


def _check_answer(scheduler: Any, groups: int) -> None:
    """Raise where a scheduler that is not PyTorch's has no rate for the new group: a list of one may mean anything."""
    if not isinstance(scheduler, LRScheduler) or type(scheduler).__module__ == LRScheduler.__module__:
        return
    twin: Any = copy.copy(scheduler)
    twin._get_lr_called_within_step = True  # PyTorch warns of any other call
    try:
        rates = len(list(twin.get_lr()))
    except NotImplementedError:  # one that sets the rates of all groups in its own step()
        return
    except (IndexError, ValueError):
        rates = 0
    if rates < groups:
        raise _cannot_be_extended(scheduler, "keeps numbers for each parameter group")


def _cannot_be_extended(scheduler: Any, what: str) -> ValueError:
    return ValueError(
        f"the scheduler {type(scheduler).__name__} {what}, which cannot be extended for the learned scales; make the "
        "optimizer with quantization_param_groups(module, lr, quantization_lr), so that they have a group when the "
        "scheduler is made"
    )

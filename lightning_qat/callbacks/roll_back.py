"""The weights and the optimizers' state of an earlier step, to go back to."""

from __future__ import annotations

import copy
from typing import Any

import lightning.pytorch as pl
from torch import Tensor
from torch.utils._pytree import tree_map_only


def _kept(tree: Any) -> Any:
    """Return a copy whose tensors are on the CPU: memory of the device is short, and a checkpoint holds it too."""
    return tree_map_only(Tensor, lambda t: t.detach().to("cpu", copy=True), copy.copy(tree))


def take_snapshot(trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Any]:
    """Return, in builtins and tensors, the state of ``module`` and of its optimizers."""
    optimizers = [_kept(optimizer.state_dict()["state"]) for optimizer in trainer.optimizers]
    return {"module": _kept(dict(module.state_dict())), "optimizers": optimizers}


def roll_back(trainer: pl.Trainer, module: pl.LightningModule, snapshot: dict[str, Any]) -> None:
    """Put what :func:`take_snapshot` returned back, which is used up by that.

    Learning rates stay those of the step that is reached: schedules, like the data, go on.
    """
    module.load_state_dict(snapshot["module"], strict=False)
    for optimizer, state in zip(trainer.optimizers, snapshot["optimizers"], strict=True):
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})
    for parameter in module.parameters():
        parameter.grad = None

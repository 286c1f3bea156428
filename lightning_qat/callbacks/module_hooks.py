"""Standing in for a hook of one LightningModule, where Lightning has none for a callback."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl

from lightning_qat.config import PlanLike
from lightning_qat.transforms.prepare import prepare, prepared_plan

#: Marks our stand-in and holds what it stands before.
_REPLACED = "_lightning_qat_replaced"


def _stand_in(module: pl.LightningModule, name: str, hook: Callable[..., None]) -> None:
    """Let Lightning call ``hook`` for the hook ``name`` of ``module``, until :func:`restore_hook`.

    An attribute of the instance comes before the class's method. It is no ``functools.wraps``, which
    Lightning would see through.
    """
    restore_hook(module, name)  # left by a setup that failed
    setattr(hook, _REPLACED, module.__dict__.get(name))
    module.__dict__[name] = hook


def restore_hook(module: pl.LightningModule, name: str) -> None:
    """Give ``module`` its own hook ``name`` back. Nothing is done if it has it."""
    hook = module.__dict__.get(name)
    if not hasattr(hook, _REPLACED):
        return
    del module.__dict__[name]
    original = getattr(hook, _REPLACED)
    if original is not None:
        module.__dict__[name] = original


def prepare_after_configure_model(module: pl.LightningModule, plan: PlanLike | None, then: Callable[[], None]) -> None:
    """Prepare ``module`` when Lightning calls its ``configure_model``.

    Layers may be built in the module's own ``setup`` or ``configure_model``, which run after the
    callbacks' ``setup``; no callback hook lies between them and ``configure_optimizers``.

    Args:
        module: in the ``setup`` of a callback.
        plan: what to prepare with; None leaves a prepared module as it is.
        then: called afterwards.
    """

    def setup(stage: str) -> None:
        # Not before: ``WeightAveraging.setup`` calls a ``configure_model`` that is not Lightning's own.
        restore_hook(module, "setup")
        module.setup(stage)
        _stand_in(module, "configure_model", configure_model)

    def configure_model() -> None:
        restore_hook(module, "configure_model")
        module.configure_model()
        if plan is not None or prepared_plan(module) is None:
            prepare(module, "int8" if plan is None else plan)
        then()

    _stand_in(module, "setup", setup)


def check_before_loading(module: pl.LightningModule, check: Callable[[dict[str, Any]], None]) -> None:
    """Call ``check`` with a checkpoint before Lightning loads its weights into ``module``.

    A callback's ``on_load_checkpoint`` comes after that: names that do not fit have raised by then.
    """

    def on_load_checkpoint(checkpoint: dict[str, Any]) -> None:
        restore_hook(module, "on_load_checkpoint")
        check(checkpoint)
        module.on_load_checkpoint(checkpoint)

    _stand_in(module, "on_load_checkpoint", on_load_checkpoint)

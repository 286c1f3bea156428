"""``lightning.pytorch`` and ``pytorch_lightning``: one library under two names, whose classes do not know each other.

Projects that import the second get the same callbacks.
"""

from __future__ import annotations

import operator
import sys
from typing import Any

import lightning.pytorch as pl


def in_both(name: str) -> tuple[type, ...]:
    """Return the class ``name``, such as ``"callbacks.WeightAveraging"``, of each library that is imported."""
    other = sys.modules.get("pytorch_lightning")
    return tuple(operator.attrgetter(name)(library) for library in (pl, other) if library is not None)


def own_class(instance: Any, name: str) -> type:
    """Return the class ``name`` of the library that ``instance`` is of."""
    return next((known for known in in_both(name) if isinstance(instance, known)), in_both(name)[0])


def serve_both(callback_class: type, name: str = "Callback") -> None:
    """Make ``callback_class`` a callback of ``pytorch_lightning`` too, once that is imported.

    Its Trainer refuses callbacks of ``lightning.pytorch``, and importing it here would cost everybody else the time.

    Args:
        callback_class: of ``lightning.pytorch``.
        name: of the class in ``pytorch_lightning.callbacks`` that it becomes a subclass of.
    """
    other = getattr(getattr(sys.modules.get("pytorch_lightning"), "callbacks", None), name, None)
    if other is not None and not issubclass(callback_class, other):
        callback_class.__bases__ = (*callback_class.__bases__, other)

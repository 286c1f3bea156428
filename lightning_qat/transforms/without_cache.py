"""Models of transformers without the keys and values that they keep from one call to the next."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn


@contextlib.contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Let ``model`` return no keys and values inside: in its configs ``use_cache`` is False, and then as it was.

    Whoever calls it once has no use for them, and they come in objects that cannot be traced.
    """
    configs: dict[int, Any] = {
        id(c): c for m in model.modules() if hasattr(c := getattr(m, "config", None), "use_cache")
    }
    before = [(config, config.use_cache) for config in configs.values()]
    try:
        for config, _ in before:
            config.use_cache = False
        yield
    finally:
        for config, value in before:
            config.use_cache = value

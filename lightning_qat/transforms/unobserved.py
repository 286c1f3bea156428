"""Layers that no batch reached, and the rules that leave such layers in float."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase

#: Rules that a message names.
_MOST = 6


def float_rules(names: Iterable[str], others: Collection[str]) -> str:
    """Return the code of the fewest rules that leave the layers ``names`` in float and none of ``others``."""
    names = list(names)
    rules: dict[str, None] = {}
    for name in names:
        glob = re.sub(r"\b\d+\b", "*", name)
        alone = sum(fnmatchcase(each, glob) for each in names) == 1
        rules[name if alone or any(fnmatchcase(each, glob) for each in others) else glob] = None
    shown = ", ".join(f"LayerRule({rule!r})" for rule in list(rules)[:_MOST])
    return shown + (f" and {len(rules) - _MOST} more" if len(rules) > _MOST else "")


def unobserved(names: Collection[str], layers: Iterable[str]) -> ValueError:
    """Return the error for the layers ``names`` of ``layers``, whose inputs no batch has shown."""
    first, *rest = names
    also = f" (and of {len(rest)} more)" if rest else ""
    others = set(layers).difference(names)
    return ValueError(
        f"the input of layer {first!r}{also} was never observed, so it has no range to convert with; run "
        f"calibrate(model, batches) with batches that reach it, or leave {'them' if rest else 'it'} in float with "
        f"{float_rules(names, others)}"
    )

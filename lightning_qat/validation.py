"""Checks of single values: each names the field, the value and what is allowed."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Collection, Iterable
from importlib.metadata import entry_points
from typing import Any, TypeAlias, Union

#: An optimizer step (``1000``), a fraction of the run (``0.3``), epochs (``"3 epochs"``).
Step: TypeAlias = Union[int, float, str]


def nearest_first(name: str, known: Iterable[str]) -> list[str]:
    """Return ``known`` with the names most like ``name`` first."""
    return sorted(known, key=lambda k: -difflib.SequenceMatcher(None, str(name).lower(), k.lower()).ratio())


def check_choice(field_name: str, value: Any, known: Collection[str]) -> str:
    """Return ``value`` if it is one of ``known``; raise ``ValueError`` listing them, nearest first."""
    if isinstance(value, str) and str(value) in known:
        return str(value)
    listed = ", ".join(repr(n) for n in nearest_first(str(value), known))
    raise ValueError(f"{field_name}={value!r} is not known; use one of: {listed}")


def check_int(field_name: str, value: Any, lowest: int, highest: int | None = None) -> int:
    """Return ``value`` if it is an integer in ``[lowest, highest]``; raise ``ValueError`` otherwise."""
    is_int = isinstance(value, int) and not isinstance(value, bool)
    if is_int and value >= lowest and (highest is None or value <= highest):
        return int(value)
    allowed = f"from {lowest} to {highest}" if highest is not None else f"of {lowest} or more"
    raise ValueError(f"{field_name}={value!r} is not allowed; use an integer {allowed}")


def check_number(field_name: str, value: Any, use: str, fits: Callable[[float], bool]) -> float:
    """Return ``value`` if it is a finite number that ``fits``; raise ``ValueError`` saying what to ``use``."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not fits(value):
        raise ValueError(f"{field_name}={value!r} is not allowed; use {use}")
    return float(value)


def check_bool(field_name: str, value: Any) -> None:
    """Raise ``ValueError`` unless ``value`` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{field_name}={value!r} is not allowed; use True or False")


def check_dynamic(value: Any) -> bool | str:
    """Return what ``activation_dynamic`` means, True for ``"token"``; raise ``ValueError`` otherwise."""
    if not isinstance(value, bool) and value not in ("token", "tensor"):
        raise ValueError(f"activation_dynamic={value!r} is not allowed; use True or False, 'token' or 'tensor'")
    return True if value == "token" else value


def check_pact_decay(decay: Any, learns: bool, needs: str) -> None:
    """Raise ``ValueError`` unless ``decay`` is None, or 0 or more where activations have a range to learn."""
    if decay is None:
        return
    check_number("pact_decay", decay, "a number of 0 or more, or None", lambda value: value >= 0)
    if not learns:
        raise ValueError(f"pact_decay={decay!r} needs {needs}")


def check_fraction(field_name: str, value: Any, *, include_one: bool) -> None:
    """Raise ``ValueError`` unless ``value`` is a number in ``[0, 1)``, or ``[0, 1]`` with ``include_one``."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    end = "1]" if include_one else "1)"
    if not is_number or not 0 <= value <= 1 or (value == 1 and not include_one):
        raise ValueError(f"{field_name}={value!r} is not allowed; use a number in [0, {end}")


_EPOCHS = re.compile(r"\s*(\d+(?:\.\d+)?)\s*epochs?\s*")


def epochs_of(step: Step) -> float | None:
    """Return the number of epochs in ``"3 epochs"``, or None for a step or a fraction."""
    return float(m.group(1)) if isinstance(step, str) and (m := _EPOCHS.fullmatch(step)) else None


def check_step(field_name: str, step: Any) -> Step:
    """Return ``step`` if it is a step, a fraction of the run or epochs; raise ``ValueError`` otherwise."""
    is_step = isinstance(step, int) and not isinstance(step, bool) and step >= 0
    is_fraction = isinstance(step, float) and 0.0 <= step <= 1.0
    if is_step or is_fraction or epochs_of(step) is not None:
        return step
    ways = "an optimizer step (1000), a fraction of the run (0.3) or epochs ('3 epochs')"
    raise ValueError(f"{field_name}={step!r} is not allowed; use {ways}")


#: Entry points of other packages that hold number formats: ``name = "package.module"``, importing which registers them.
ENTRY_POINT_GROUP = "lightning_qat.schemes"

#: Registry of scheme name -> its own bits, the fewest and the most; ``schemes.register_scheme`` adds to it.
SCHEME_BITS: dict[str, tuple[int, int, int]] = {
    "int8": (8, 2, 16),
    "int4": (4, 4, 4),
    "nf4": (4, 4, 4),
    "fp4": (4, 4, 4),
    "llm_int8": (8, 8, 8),
    "dynamic_tree": (8, 8, 8),
    "dynamic": (8, 2, 16),
    "gptq": (4, 2, 8),
    "awq": (4, 2, 8),
}


def load_entry_point(scheme: str) -> None:
    """Import what another installed package registers as ``scheme``; nothing where none does."""
    for entry in entry_points(group=ENTRY_POINT_GROUP, name=scheme):
        try:
            entry.load()
        except (ImportError, AttributeError) as error:
            raise ValueError(
                f"scheme {scheme!r} is the entry point {entry.value!r} of another package, which cannot be imported: "
                f"{error}"
            ) from error


def check_scheme_bits(scheme: Any, bits: int | None) -> tuple[str, int]:
    """Return a scheme's name and its bits, its own where ``bits`` is None; raise ``ValueError`` if they do not fit."""
    if isinstance(scheme, str) and str(scheme) not in SCHEME_BITS:
        load_entry_point(str(scheme))
    name = check_choice("scheme", scheme, SCHEME_BITS)
    own, fewest, most = SCHEME_BITS[name]
    if bits is None:
        return name, own
    if isinstance(bits, bool) or not isinstance(bits, int) or not fewest <= bits <= most:
        span = str(fewest) if fewest == most else f"{fewest} to {most}"
        raise ValueError(f"bits={bits!r} is not allowed with scheme={name!r}; it takes {span}")
    return name, int(bits)

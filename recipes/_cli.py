"""``lightning-qat VERB [hydra overrides]``: each verb is a file of this package."""

from __future__ import annotations

import ast
import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import resources

from rich.console import Console
from rich.table import Table

from ._errors import explain, nearest
from ._quiet import quiet

_PACKAGE = "lightning_qat.recipes"

#: Groups whose class the user may bring, and the keys that hold its arguments.
_OPEN_GROUPS = {"data": ("data",), "model": ("model",), "task": ("task", "qat_task")}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code: 0, or 2 for a mistake in what was asked for."""
    verb, *overrides = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if verb in ("-h", "--help"):
        _show_verbs()
        return 0
    if verb not in (known := verbs()):
        _complain(f"{verb!r} is not a verb of lightning-qat{nearest(verb, known)}")
        return 2
    # A class of the user's in the folder the command is run from can be named, as with `python -m`.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    full_error = "HYDRA_FULL_ERROR" in os.environ
    with _hydra_called_as(f"lightning-qat {verb}", expand_custom(overrides)), quiet():
        try:
            importlib.import_module(f"{_PACKAGE}.{verb}").main()
        except Exception as error:
            told = explain(error)
            if told is None or full_error:
                raise
            _complain(told)
            return 2
        except SystemExit as stop:  # Hydra ends --help with it, a sweep that cannot run ends with a message
            if isinstance(stop.code, str):
                _complain(stop.code)
            return 2 if isinstance(stop.code, str) else int(stop.code or 0)
    return 0


def verbs() -> dict[str, str]:
    """Return verb -> what it does, read from the files of the recipes without importing them."""
    found = {}
    for file in sorted(resources.files(_PACKAGE).iterdir(), key=lambda file: file.name):
        if file.name.endswith(".py") and not file.name.startswith("_"):
            summary = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
            found[file.name.removesuffix(".py")] = summary.partition("\n")[0]
    return found


def expand_custom(overrides: Sequence[str]) -> list[str]:
    """Spell out what ``task._target_=my.Task task.width=3`` means to Hydra.

    A class of the user's takes none of the arguments that stand in the config of the built-in one, and has
    arguments that stand in no config: ``task=custom task._target_=my.Task ++task.width=3``. The same for data
    and model. Nothing is changed where the group itself is chosen.
    """
    spelled = list(overrides)
    for group, owners in _OPEN_GROUPS.items():
        given = [override.split("=", 1)[0] for override in overrides]
        if f"{group}._target_" not in given or group in given:
            continue
        prefixes = tuple(f"{owner}." for owner in owners)
        spelled = [f"++{o}" if o.startswith(prefixes) and not o.startswith(f"{group}._target_") else o for o in spelled]
        spelled.insert(0, f"{group}=custom")
    return spelled


@contextmanager
def _hydra_called_as(program: str, arguments: Sequence[str]) -> Iterator[None]:
    """Let a function of ``hydra.main`` read these arguments, and raise its errors instead of printing them."""
    argv, full_error = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = [program, *arguments]
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        sys.argv = argv
        if full_error is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = full_error


def _show_verbs() -> None:
    console = Console()
    console.print("lightning-qat VERB [OVERRIDES]", markup=False, highlight=False)
    console.print("quantization-aware training for PyTorch Lightning\n")
    table = Table.grid(padding=(0, 3))
    for verb, summary in verbs().items():
        table.add_row(f"  {verb}", summary)
    console.print(table)
    console.print(
        "\nOverrides are Hydra's: data=mnist5k quantization.bits=4, or -m quantization.bits=8,6,4 for a sweep."
    )
    console.print("lightning-qat VERB --help shows the whole config of a verb.")


def _complain(text: str) -> None:
    console = Console(stderr=True)
    console.print("error:", style="bold red", end=" ")
    console.print(text, markup=False, highlight=False, soft_wrap=True)

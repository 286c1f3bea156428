"""Imports run one way only, files stay small, and a third-party package is imported where it belongs."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MOST_LINES = 400

#: From left to right: a layer imports from those on its left, and from itself.
LAYERS = [
    "validation",
    "config",
    "native",
    "kernels",
    "ops",
    "schemes",
    "quantizers",
    "nn",
    "transforms",
    "ptq|formats",
    "callbacks",
]

#: What the benchmark measures beside this library.
PEERS = {"torchao", "onnxruntime", "bitsandbytes", "triton", "gptqmodel"}

#: What may be imported besides the standard library.
THIRD_PARTY = {
    "validation": set(),
    "config": {"torch"},
    "native": {"torch"},
    "kernels": {"torch", "triton"},
    "ops": {"torch"},
    "schemes": {"torch"},
    "quantizers": {"torch"},
    "nn": {"torch"},
    "transforms": {"torch", "safetensors"},
    "ptq": {"torch", "safetensors"},
    "formats": {"torch", "safetensors", "onnx"},
    # Metrics of the user's module are left as they were by calibration, so callbacks know what a metric is.
    "callbacks": {"torch", "lightning", "torchmetrics"},
    "testing": {"torch", "lightning", "pytest", "safetensors"},
    "metrics": {"torch", "torchmetrics"},
    "tracking": {"lightning", "wandb"},
    "report": {"matplotlib", "jinja2", "rich"},
    # Real models and data come inside packages, which are imported lazily, or only looked for.
    "tasks": {"torch", "lightning", "torchmetrics", "numpy", "transformers", "tokenizers"},
    "data": {"torch", "lightning", "torchmetrics", "numpy", "sklearn", "tokenizers", "PIL"},
    # Recipes write the float weights that the quantized model is compared with, hence torch and safetensors.
    # The benchmark measures the peers that are installed.
    "recipes": {"torch", "safetensors", "hydra", "omegaconf", "yaml", "lightning", "rich", *PEERS},
    "conf": set(),
    # lightning_qat/__init__.py and __main__.py: the facade in front of all layers.
    "": set(),
}

#: Rooms that only recipes enter and that enter none themselves.
SIDE_ROOMS = ("metrics", "tracking", "report", "tasks", "data", "conf")


def allowed_rooms() -> dict[str, set[str]]:
    """Return room -> rooms it may import from, itself included."""
    allowed: dict[str, set[str]] = {}
    left: set[str] = set()
    for layer in LAYERS:
        rooms = set(layer.split("|"))
        for room in rooms:
            allowed[room] = left | {room}
        left |= rooms
    for room in SIDE_ROOMS:
        allowed[room] = {room}
    everything = set(allowed)
    allowed["testing"] = left | {"testing"}  # what users test their modules with runs callbacks and all they need
    allowed["callbacks"] |= {"metrics", "tracking"}  # they may monitor what they do, and tell any logger
    allowed["recipes"] = everything | {"recipes", ""}
    allowed[""] = everything | {"recipes", ""}
    return allowed


def module_name(path: Path, root: Path) -> str:
    """Return the dotted name that a file has once installed."""
    parts = list(path.relative_to(root).with_suffix("").parts)
    if parts[0] in ("conf", "recipes"):
        parts.insert(0, "lightning_qat")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """Return the room of ``lightning_qat.room.anything``, or ``""`` for the facade."""
    room = [*module.split("."), ""][1]
    return "" if room == "__main__" else room


def imported(tree: ast.AST, module: str, *, is_package: bool) -> Iterator[tuple[int, str]]:
    """Yield line and dotted name of everything imported, wherever it stands (``if TYPE_CHECKING`` included)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".") if is_package else module.split(".")[:-1]
                base = ".".join([*package[: len(package) - node.level + 1], *([base] if base else [])])
            # `from lightning_qat import nn` enters the room nn.
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def is_room(root: Path, name: str) -> bool:
    package = root / "lightning_qat"
    if name in ("recipes", "conf"):
        return (root / name).is_dir()
    return (package / name).is_dir() or (package / f"{name}.py").is_file()


def violations(root: Path) -> list[str]:
    """Return every broken rule in the package under ``root``."""
    allowed = allowed_rooms()
    found = []
    for path in sorted(p for top in ("lightning_qat", "recipes", "conf") for p in (root / top).rglob("*.py")):
        shown = path.relative_to(root)
        text = path.read_text(encoding="utf-8")
        module = module_name(path, root)
        room = room_of(module)
        if room not in allowed:
            found.append(f"{shown}: the room {room!r} is in no layer")
            continue
        for line, name in imported(ast.parse(text), module, is_package=path.name == "__init__.py"):
            top, *rest = name.split(".")
            if top == "lightning_qat":
                target = rest[0] if rest and is_room(root, rest[0]) else ""
                if target not in allowed[room]:
                    found.append(f"{shown}:{line}: {room or 'the facade'} may not import {name}")
            elif top not in sys.stdlib_module_names and top not in THIRD_PARTY[room]:
                found.append(f"{shown}:{line}: {top} does not belong in {room or 'the facade'}")
    return found


def long_files(root: Path) -> list[str]:
    tops = ("lightning_qat", "recipes", "conf", "tests")
    files = sorted(path for top in tops for path in (root / top).rglob("*.py"))
    counts = {str(path.relative_to(root)): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    return [f"{name}: {count} lines" for name, count in counts.items() if count > MOST_LINES]


def test_imports_run_one_way() -> None:
    assert violations(ROOT) == []


def test_files_are_small() -> None:
    assert long_files(ROOT) == []


def test_every_file_of_the_package_is_seen() -> None:
    names = {module_name(path, ROOT) for path in (ROOT / "lightning_qat").rglob("*.py")}
    assert {"lightning_qat", "lightning_qat.config", "lightning_qat.data.digits"} <= names


@pytest.mark.parametrize(
    ("path", "text", "expected"),
    [
        ("lightning_qat/ops/planted.py", "from lightning_qat.nn import QATLinear", "may not import"),
        ("lightning_qat/ops/planted.py", "import lightning_qat.nn.linear", "may not import"),
        ("lightning_qat/ops/planted.py", "from lightning_qat import nn", "may not import"),
        ("lightning_qat/ops/planted.py", "from lightning_qat import QATLinear", "may not import"),
        ("lightning_qat/ops/planted.py", "from ..nn import QATLinear", "may not import"),
        ("lightning_qat/config.py", "from . import nn", "may not import"),
        (
            "lightning_qat/ops/planted.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from lightning_qat.nn import QATLinear",
            "may not import",
        ),
        ("lightning_qat/ops/planted.py", "def f():\n    from lightning_qat.callbacks import x", "may not import"),
        ("lightning_qat/data/planted.py", "from lightning_qat.config import QATConfig", "may not import"),
        ("lightning_qat/tasks/planted.py", "import lightning_qat", "may not import"),
        ("lightning_qat/nn/planted.py", "from lightning_qat.recipes import train", "may not import"),
        ("lightning_qat/nn/planted.py", "import safetensors.torch", "does not belong"),
        ("lightning_qat/config.py", "import numpy as np", "does not belong"),
        ("lightning_qat/report.py", "def f():\n    import wandb", "does not belong"),
        ("lightning_qat/attic/planted.py", "import torch", "in no layer"),
        ("recipes/planted.py", "import wandb", "does not belong"),
    ],
)
def test_a_planted_violation_is_found(tmp_path: Path, path: str, text: str, expected: str) -> None:
    for room in ("nn", "ops", "callbacks", "data", "tasks"):
        (tmp_path / "lightning_qat" / room).mkdir(parents=True)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "lightning_qat" / "config.py").touch()
    assert violations(tmp_path) == []
    planted = tmp_path / path
    planted.parent.mkdir(exist_ok=True)
    planted.write_text(text)
    found = violations(tmp_path)
    assert len(found) == 1
    assert expected in found[0]


def test_what_is_allowed_is_allowed(tmp_path: Path) -> None:
    for path, text in {
        "lightning_qat/config.py": "import torch\nfrom dataclasses import dataclass",
        "lightning_qat/nn/layer.py": "from lightning_qat.config import QATConfig\nfrom . import layer",
        "lightning_qat/callbacks/base.py": "import lightning\nfrom lightning_qat.nn.layer import x",
        "recipes/train.py": "import hydra\nfrom lightning_qat import convert\nfrom lightning_qat.recipes import _build",
    }.items():
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    assert violations(tmp_path) == []


def test_a_long_file_is_found(tmp_path: Path) -> None:
    file = tmp_path / "recipes" / "long.py"
    file.parent.mkdir()
    file.write_text("\n" * (MOST_LINES + 1))
    assert long_files(tmp_path) == [f"{Path('recipes') / 'long.py'}: {MOST_LINES + 1} lines"]

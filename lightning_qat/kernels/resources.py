"""Registers, spills and shared memory of every tuned kernel, measured by its compiler; no GPU needed.

``python -m lightning_qat.kernels.resources`` compiles all of them and says what each takes;
``--write`` keeps the table in ``resources.json`` beside this file.
"""

from __future__ import annotations

import importlib
import json
import logging
import pkgutil
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lightning_qat import kernels
from lightning_qat.kernels.launch import Tuned

TABLE = Path(__file__).with_name("resources.json")

Resources = dict[str, int]

_logger = logging.getLogger(__name__)


def tuned_kernels() -> dict[str, Tuned]:
    """Return every tuned configuration by name, ``file/configuration``."""
    found: dict[str, Tuned] = {}
    for module in sorted(info.name for info in pkgutil.iter_modules(kernels.__path__)):
        if module == "resources":
            continue  # itself, which may be running as __main__
        table = getattr(importlib.import_module(f"{kernels.__name__}.{module}"), "TUNED", {})
        found |= {f"{module}/{name}": tuned for name, tuned in table.items()}
    return found


def compile_for(tuned: Tuned, capability: int) -> Any:
    """Return Triton's compiled kernel for ``capability`` (such as 90); its ``asm`` holds ``ptx`` and ``cubin``.

    Raises:
        RuntimeError: if the kernel was defined under TRITON_INTERPRET=1, which leaves nothing to compile.
    """
    if not isinstance(tuned.kernel, triton.JITFunction):
        raise RuntimeError("the kernels were imported under TRITON_INTERPRET=1; compile them in a process without it")
    types = {name: text.split(":")[0] for name, text in tuned.signature.items()}
    names = tuned.kernel.arg_names
    attrs = {(names.index(n),): [["tt.divisibility", 16]] for n, t in tuned.signature.items() if t.endswith(":16")}
    signature = {name: types.get(name, "constexpr") for name in names}
    source = ASTSource(tuned.kernel, signature, dict(tuned.constexprs), attrs)
    options = {"num_warps": tuned.num_warps, "num_stages": tuned.num_stages, **tuned.options}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def measure(tuned: Tuned, capability: int) -> Resources:
    """Return registers and spilled bytes per thread, and shared memory bytes per program."""
    compiled = compile_for(tuned, capability)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    used = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", text)}
    # What does not fit the registers lives in the stack frame, in local memory.
    return {
        "registers": used["REG"],
        "spills": used["STACK"] + used["LOCAL"],
        "shared": int(compiled.metadata.shared) + used["SHARED"],
    }


def measure_all(tuned: dict[str, Tuned] | None = None) -> dict[str, Any]:
    """Return ``{"triton": version, "kernels": {name: {"sm_90": resources}}}``, by default of every tuned kernel."""
    chosen = tuned_kernels() if tuned is None else tuned
    table = {name: {f"sm_{c}": measure(chosen[name], c) for c in chosen[name].capabilities} for name in chosen}
    return {"triton": triton.__version__, "kernels": table}


def main(arguments: list[str]) -> None:
    """Compile everything, tell what it takes, and keep the table if ``--write`` is among the arguments."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    measured = measure_all()
    for name, row in measured["kernels"].items():
        for target, r in row.items():
            _logger.info(
                "%-48s %-6s %3d registers %4d bytes spilled %6d bytes shared",
                name,
                target,
                r["registers"],
                r["spills"],
                r["shared"],
            )
    if "--write" in arguments:
        TABLE.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])

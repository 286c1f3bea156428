"""Ahead-of-time compilation of tuned kernels in tests: no GPU, no launch.

from kernels import aot
aot.check(Tuned(kernel=k, signature={"x": "*bf16:16", "n": "i32"}, constexprs={"BLOCK": 1024}))
"""

from __future__ import annotations

from lightning_qat.kernels.launch import CAPABILITIES, Tuned
from lightning_qat.kernels.resources import Resources, compile_for, measure

__all__ = ["CAPABILITIES", "check", "ptx"]

#: What a thread may take, and a program on each target.
MOST_REGISTERS = 255
MOST_SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


def check(tuned: Tuned, capabilities: tuple[int, ...] | None = None) -> dict[str, Resources]:
    """Compile and return the resources by target; fail where something spills or does not fit."""
    found = {f"sm_{c}": measure(tuned, c) for c in capabilities or tuned.capabilities}
    for target, r in found.items():
        assert r["spills"] == 0, f"{target} spills: {r}"
        assert r["registers"] <= MOST_REGISTERS and r["shared"] <= MOST_SHARED[int(target[3:])], f"{target}: {r}"  # noqa: PT018
    return found


def ptx(tuned: Tuned, capability: int = 90) -> str:
    """Return the assembly, to look for an instruction that must or must not be there."""
    return str(compile_for(tuned, capability).asm["ptx"])

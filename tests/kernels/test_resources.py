"""What the compiler gives each tuned kernel: nothing spills, and the table says how it is."""

from __future__ import annotations

import json

import pytest
import triton
from kernels import aot

from lightning_qat.kernels.launch import Tuned
from lightning_qat.kernels.resources import TABLE, compile_for, tuned_kernels


def names() -> list[str]:
    return sorted(tuned_kernels())


def table() -> dict[str, dict[str, dict[str, int]]]:
    return json.loads(TABLE.read_text(encoding="utf-8"))["kernels"]


@pytest.mark.parametrize("name", names())
def test_compiles_as_the_table_says(compiler: None, name: str) -> None:
    measured = aot.check(tuned_kernels()[name])
    if json.loads(TABLE.read_text(encoding="utf-8"))["triton"] == triton.__version__:
        assert measured == table()[name], "run python -m lightning_qat.kernels.resources --write"


def test_the_table_is_complete() -> None:
    assert sorted(table()) == names()
    tuned = tuned_kernels()
    for name, row in table().items():
        assert list(row) == [f"sm_{c}" for c in tuned[name].capabilities]
        assert all(set(r) == {"registers", "spills", "shared"} and r["spills"] == 0 for r in row.values())


def test_a_spill_is_found(compiler: None) -> None:
    tuned = tuned_kernels()["fake_quantize_backward/tensor-bf16"]
    squeezed = Tuned(
        kernel=tuned.kernel,
        signature=tuned.signature,
        constexprs=tuned.constexprs,
        num_warps=tuned.num_warps,
        options={**tuned.options, "maxnreg": 24},
    )
    with pytest.raises(AssertionError, match="spills"):
        aot.check(squeezed, (90,))


@pytest.mark.parametrize("name", [n for n in names() if n.startswith(("fake_quantize", "observe", "token"))])
def test_memory_is_walked_in_accesses_of_16_bytes(compiler: None, name: str) -> None:
    text = aot.ptx(tuned_kernels()[name])
    assert "ld.global.v4.b32" in text
    assert "st.global.v4.b32" in text
    assert "atom" not in text.replace(".atom", "")


@pytest.mark.parametrize("name", ["fake_quantize/tensor-bf16", "fake_quantize_backward/tensor-bf16-zero"])
def test_only_the_fused_multiply_adds_that_are_written(compiler: None, name: str) -> None:
    # Three for each quotient: another one would be a rounding that the definition has.
    text = aot.ptx(tuned_kernels()[name])
    assert "div.full" not in text
    assert "div.approx" not in text
    assert ".ftz" not in text
    tuned = tuned_kernels()[name]
    elements = tuned.constexprs["ROWS"] * tuned.constexprs["COLUMNS"] // (32 * tuned.num_warps)
    assert text.count("fma.rn.f32") == 3 * elements + 1


def test_interpreted_kernels_cannot_be_compiled(compiler: None) -> None:
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        compile_for(Tuned(kernel=lambda: None, signature={}), 90)

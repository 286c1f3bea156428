"""The README's table of number formats: every row is a config that works, every number is measured again.

Bits are counted in the file that ``save_quantized`` writes, the SQNR is worked out in float64 with nothing of ours.
"""

from __future__ import annotations

import copy
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import lightning_qat as lq
from lightning_qat.config import PlanLike
from lightning_qat.native.library import without_native
from lightning_qat.nn.triton_linear import triton_execution
from lightning_qat.ops.fake_quantize_cuda import HAS_TRITON
from lightning_qat.ops.integer_linear import linear_is_exact

README = Path(__file__).parent.parent / "README.md"
HEAD = "| preset or config |"
SIZE = 4096


@dataclass(frozen=True)
class Row:
    """What one config of the table is said to have."""

    call: str
    config: PlanLike
    bits: str
    decibel: str
    cpu: str
    cuda: str


def read_rows(text: str) -> list[Row]:
    """Return the rows of the table; one for several ``n`` is several."""
    table = re.search(rf"^{re.escape(HEAD)}.*\n\|[-| :]+\n((?:\|.*\n?)+)", text, re.MULTILINE)
    rows = []
    for line in table.group(1).splitlines() if table else []:
        name, _, _, bits, decibel, *runs = (cell.strip() for cell in line.strip().strip("|").split("|"))
        call, several = re.fullmatch(r"`([^`]+)`(?:, n = ([\d, ]+))?", name).groups()  # type: ignore[union-attr]
        numbers = several.split(", ") if several else ["0"]
        for n, b, db in zip(numbers, bits.split(", "), decibel.split(", "), strict=True):
            config = eval(call, {**vars(lq), "n": int(n)})  # what a reader would type
            rows.append(Row(call.replace("bits=n", f"bits={n}"), config, b, db, *(run.strip("`") for run in runs)))
    return rows


ROWS = read_rows(README.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def weight() -> Tensor:
    return torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def measured() -> dict[Any, tuple[Tensor, float]]:
    """Packed codes and SQNR by weight format: the weight of several presets is one, and is compared to be."""
    return {}


def converted(weight: Tensor, config: PlanLike) -> nn.Sequential:
    layer = nn.Linear(1, 1, bias=False)  # its own weight would take longer to draw than all the rest
    layer.in_features, layer.out_features, layer.weight = SIZE, SIZE, nn.Parameter(weight)
    model = lq.prepare(nn.Sequential(layer), config)
    if model[0].input_quantizer is not None:
        lq.calibrate(model, [weight[:8]])
    return lq.convert(model.eval())


def decibels(original: Tensor, values: Tensor) -> float:
    """Return ``10 log10(sum of squares / sum of squared errors)``, sums in float64."""
    signal, noise = (torch.linalg.vector_norm(t, dtype=torch.float64).item() for t in (original, values - original))
    return 20 * math.log10(signal / noise)


def test_the_witness_of_the_sqnr() -> None:
    x = torch.full((5, 20), 1000.0)
    assert decibels(x, x + 1) == pytest.approx(60)
    assert decibels(x, x * 1.1) == pytest.approx(20, abs=1e-4)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.call)
def test_a_row(row: Row, weight: Tensor, measured: dict[Any, tuple[Tensor, float]], tmp_path: Path) -> None:
    model = converted(weight, row.config)
    layer: Any = model[0]
    lq.save_quantized(model, tmp_path / "model")
    (file,) = (tmp_path / "model").glob("*.safetensors")
    assert f"{8 * file.stat().st_size / weight.numel():.2f}" == row.bits
    packed = load_file(file)["0.weight_packed"]
    if layer.weight_format not in measured:
        measured[layer.weight_format] = packed, decibels(weight, layer.weight)
    assert torch.equal(packed, measured[layer.weight_format][0])
    assert f"{measured[layer.weight_format][1]:.1f}" == row.decibel
    assert row.cuda == (triton_execution(layer) or "float") or not HAS_TRITON
    if linear_is_exact():  # else many a row says "reference"
        with without_native():
            without_compiler = layer.execution
        float_alone = row.cpu == "float" and without_compiler.startswith("reference: weights")
        assert row.cpu in (layer.execution, without_compiler) or float_alone


@pytest.mark.parametrize(
    ("start", "most"),
    [("QuantizationConfig(\"nf4\"", 4.13), ('"w4a16"', 4.26), ('"int8"', 8.05), ('"int8_weight_only"', 8.05)],
)  # fmt: skip
def test_bits_are_few_enough(start: str, most: float, weight: Tensor, tmp_path: Path) -> None:
    (row,) = [row for row in ROWS if row.call.startswith(start)]
    lq.save_quantized(converted(weight, row.config), tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    assert SIZE**2 / 2 < file.stat().st_size <= most * SIZE**2 / 8
    assert sum(f.stat().st_size for f in (tmp_path / "model").iterdir()) <= most * SIZE**2 / 8  # the manifest too


def test_every_preset_has_a_row_and_what_else_is_said() -> None:
    assert {row.config for row in ROWS if isinstance(row.config, str)} == set(lq.PRESETS)
    assert [row.config.bits for row in ROWS if "bits=n" not in row.call and "bits=" in row.call][1:] == [2, 3, 5, 6, 7]
    schemes = {lq.PRESETS[c].scheme if isinstance(c, str) else c.scheme for c in (row.config for row in ROWS)}  # type: ignore[union-attr]
    assert schemes == {"int8", "int4", "llm_int8", "dynamic_tree", "nf4", "fp4"}


def test_what_is_said_of_other_layers() -> None:
    if not linear_is_exact():
        pytest.skip("no exact integer products on this CPU")
    layer = nn.Linear(512, 512).to(torch.bfloat16)
    with without_native():
        assert lq.convert(lq.prepare(nn.Sequential(layer), "w4a16").eval())[0].execution == "packed int4, weight-only"
    for name in lq.PRESETS:
        if name == "w4a16":
            continue  # 9 weights have no group of 128
        model = lq.prepare(nn.Sequential(nn.Conv2d(16, 16, 3)), name)
        lq.calibrate(model, [torch.randn(2, 16, 8, 8)])
        execution = lq.convert(model.eval())[0].execution
        assert execution.startswith("onednn int8") == (name in ("int8", "w4a8", "w4a4")), name


@pytest.mark.parametrize("scheme", ["gptq", "awq"])
def test_chosen_codes_are_stored_and_computed_with_as_int4(scheme: str) -> None:
    layer = nn.Linear(64, 32)
    x, converted = torch.randn(3, 64), {}
    for name in (scheme, "int4"):
        config = lq.QATConfig(name, group_size=32, activation_bits=None)
        converted[name] = lq.convert(lq.prepare(nn.Sequential(copy.deepcopy(layer)), config).eval())
    assert torch.equal(converted[scheme](x), converted["int4"](x))
    assert converted[scheme][0].execution == converted["int4"][0].execution


def test_a_table_is_read() -> None:
    text = f"x\n\n{HEAD} a | b | c | d | e | f |\n|---|---|---|---|---|---|---|\n"
    text += '| `"nf4"` | x | y | 4.50 | 20.7 | float | `t` |\n'
    text += "| `QuantizationConfig(bits=n)`, n = 2, 3 | x | y | 1, 2 | 3.0, 4.0 | `k, l` | float |\n\n| `z` |\n"
    first, *others = read_rows(text)
    assert first == Row('"nf4"', "nf4", "4.50", "20.7", "float", "t")
    assert [(row.config.bits, row.bits, row.decibel, row.cpu) for row in others] == [  # type: ignore[union-attr]
        (2, "1", "3.0", "k, l"), (3, "2", "4.0", "k, l"),
    ]  # fmt: skip
    assert read_rows("| a |\n|---|\n| b |\n") == []
    with pytest.raises(ValueError, match="shorter"):
        read_rows(text.replace("1, 2 |", "1 |"))

"""The table, the JSON and the picture of a few variants."""

from __future__ import annotations

import json
from dataclasses import replace
from io import StringIO
from pathlib import Path
from unittest import mock

import pytest
from PIL import Image
from rich.console import Console

from lightning_qat.report import Variant, distance_line, draw_results, main_metric, results_table, write_results

VARIANTS = [
    Variant("float", {"test/loss": 0.01, "test/acc": 0.99}, 1_000_000),
    Variant("PTQ", {"test/loss": 0.02, "test/acc": 0.97}, 250_000, 0.98),
    Variant("QAT", {"test/loss": 0.02, "test/acc": 0.98}, None, 0.99),
    Variant("converted", {"test/loss": 0.02, "test/acc": 0.98}, 250_000, 0.99, float("inf")),
]


def rendered(variants: list[Variant]) -> str:
    console = Console(file=StringIO(), width=120)
    console.print(results_table(variants))
    file = console.file
    assert isinstance(file, StringIO)
    return file.getvalue()


def test_table_has_every_number() -> None:
    text = rendered(VARIANTS)
    for shown in ("float", "PTQ", "QAT", "converted", "0.9700", "1,000.0", "250.0", "4.00x", "98.00 %", "inf"):
        assert shown in text


def test_missing_numbers_are_dashes() -> None:
    row = next(line for line in rendered(VARIANTS).splitlines() if "QAT" in line)
    assert row.split() == ["QAT", "0.0200", "0.9800", "-", "-", "99.00", "%", "-"]


def test_a_table_of_nothing_and_without_metrics() -> None:
    assert "KB on" in rendered([])
    assert "alone" in rendered([Variant("alone")])


def test_times_have_columns_where_there_are_any() -> None:
    timed = [replace(VARIANTS[0], milliseconds={1: 0.5, 64: 1234.5}), *VARIANTS[1:]]
    lines = rendered(timed).splitlines()
    assert lines[0].split()[-4:] == ["ms", "for", "ms", "for"]
    assert lines[1].split()[-2:] == ["1", "64"]
    assert next(line for line in lines if line.startswith("float ")).split()[-2:] == ["0.50", "1,234.50"]
    assert next(line for line in lines if "converted" in line).split()[-2:] == ["-", "-"]
    assert "ms" not in rendered(VARIANTS)
    assert timed[0].row()["ms_batch_64"] == 1234.5


def test_the_table_fits_into_80_columns() -> None:
    console = Console(file=StringIO(), width=80)
    console.print(results_table([replace(variant, milliseconds={1: 99.99, 64: 999.99}) for variant in VARIANTS]))
    file = console.file
    assert isinstance(file, StringIO)
    text = file.getvalue()
    assert "…" not in text
    assert len(text.splitlines()) == 3 + len(VARIANTS)


def test_the_distance_from_float_is_told_where_it_is_known() -> None:
    assert distance_line(VARIANTS) is None
    told = [VARIANTS[0], replace(VARIANTS[1], float_sqnr_db=12.34), replace(VARIANTS[2], float_sqnr_db=float("inf"))]
    assert distance_line(told) == "SQNR of the outputs with float's: PTQ 12.3 dB, QAT inf dB"
    assert told[1].row()["sqnr_with_float_db"] == 12.34


def test_json_is_valid_and_holds_all(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_results(VARIANTS, path, seed=3, ratio=float("nan"))
    content = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert content["seed"] == 3
    assert content["ratio"] == "nan"
    assert [row["variant"] for row in content["variants"]] == ["float", "PTQ", "QAT", "converted"]
    assert content["variants"][3] == {
        "variant": "converted",
        "test/loss": 0.02,
        "test/acc": 0.98,
        "bytes": 250_000,
        "agreement_with_float": 0.99,
        "sqnr_db": "inf",
        "sqnr_with_float_db": None,
    }


def test_json_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_results(VARIANTS, path)
    before = path.read_text()
    with mock.patch("os.replace", side_effect=OSError("disk")), pytest.raises(OSError, match="disk"):
        write_results(VARIANTS[:1], path)
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]


def test_picture(tmp_path: Path) -> None:
    path = tmp_path / "results.png"
    draw_results(VARIANTS, path)
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.width > 600
        colors = image.convert("RGB").getcolors(maxcolors=2**24)
    assert colors is not None
    assert len(colors) > 4  # more than a blank page


@pytest.mark.parametrize(
    "variants",
    [[Variant("alone")], [Variant("nan", {"loss": float("nan")}, 1)], [Variant("a", {"x": 1.0}), Variant("b", {}, 3)]],
)
def test_a_picture_with_gaps(tmp_path: Path, variants: list[Variant]) -> None:
    draw_results(variants, tmp_path / "results.png")
    assert (tmp_path / "results.png").stat().st_size > 0


def test_without_matplotlib_the_picture_says_what_to_install(tmp_path: Path) -> None:
    missing = mock.patch.dict("sys.modules", {"matplotlib.figure": None})
    with missing, pytest.raises(ModuleNotFoundError, match="pip install matplotlib"):
        draw_results(VARIANTS, tmp_path / "results.png")


def test_main_metric_is_the_accuracy() -> None:
    assert main_metric(VARIANTS) == "test/acc"
    assert main_metric([Variant("a", {"mse": 1.0})]) == "mse"
    assert main_metric([Variant("a")]) is None

"""The number formats from the command line: trained, converted, saved and evaluated again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lightning_qat import PRESETS, QuantizationConfig, quantize

from .conftest import TINY, Run

FORMATS: dict[str, list[str]] = {
    "nf4": [],
    "nf4 nested": ["quantization.bnb.nested_quantization=true"],
    "fp4": ["quantization.bnb.block_size=32"],
    "dynamic_tree": [],
    "llm_int8": ["quantization.bnb.outlier_threshold=0.9"],
}


def manifest_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "model" / "manifest.json").read_text())


def variants(folder: Path) -> dict[str, dict[str, Any]]:
    return {row["variant"]: row for row in json.loads((folder / "results.json").read_text())["variants"]}


@pytest.mark.parametrize("name", FORMATS)
def test_train_and_evaluate(name: str, run: Run) -> None:
    scheme = name.split()[0]
    folder = run("train", *TINY, f"quantization={scheme}", *FORMATS[name], "logger=none")
    weights = {layer: entry["weight"] for layer, entry in manifest_of(folder)["layers"].items()}
    assert "model.head" in weights
    assert len(weights) >= 5
    assert {fmt["scheme"] for fmt in weights.values()} == {scheme}
    assert {fmt.get("nested", False) for fmt in weights.values()} == {name.endswith("nested")}
    blocks = {"nf4": 64, "fp4": 32, "dynamic_tree": 256, "llm_int8": None}
    assert {fmt.get("block_size") for fmt in weights.values()} == {blocks[scheme]}
    inputs = [entry["input"] for entry in manifest_of(folder)["layers"].values()]
    assert [fmt["outlier_threshold"] for fmt in inputs if fmt] == ([0.9] if scheme == "llm_int8" else [])  # the head's
    trained, evaluated = variants(folder), variants(run("evaluate", f"model_path={folder}"))
    assert trained["converted"]["sqnr_db"] == "inf" or trained["converted"]["sqnr_db"] > 40
    for metric in ("test/acc", "test/loss"):
        assert evaluated["quantized"][metric] == pytest.approx(trained["converted"][metric], rel=1e-5)
    assert evaluated["quantized"]["bytes"] == trained["converted"]["bytes"]
    assert (folder / "model" / "model.safetensors").stat().st_size < (folder / "float.safetensors").stat().st_size


def test_what_is_saved_is_what_the_library_quantizes_to(run: Run) -> None:
    # With so small a rate the weights stay those of the float model.
    folder = run("train", *TINY, "quantization=nf4", "logger=none", "qat_task.lr=1e-30")
    trained, saved = load_file(folder / "float.safetensors"), load_file(folder / "model" / "model.safetensors")
    held = quantize(trained["model.head.weight"], QuantizationConfig("nf4", bnb=PRESETS["nf4"].bnb))
    assert torch.equal(saved["model.head.weight_packed"], held.packed)
    assert torch.equal(saved["model.head.weight_scale"], held.scale)

"""Weights that are read block by block give the bytes of a run with all of them, and take less memory."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from llamas import llama
from ptq import streamed
from ptq_models import MODELS, Llama, Mixture, built, some_rows, tokens
from safetensors.torch import load_file, save_file, save_model
from torch import nn

import lightning_qat as lq

W4 = lq.QATConfig("int8", bits=4, per_channel=True, activation_bits=None)
SCRIPT = Path(__file__).parent / "streamed.py"


def empty(make: Any, **arguments: Any) -> Any:
    torch.manual_seed(7)
    with lq.without_weights():
        return make(**arguments).eval()


def assert_same(found: nn.Module, expected: nn.Module) -> None:
    ours, theirs = found.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert not isinstance(value, torch.Tensor) or torch.equal(ours[name], value), name
    assert not any(tensor.is_meta for tensor in (*found.parameters(), *found.buffers()))
    same = ("name", "method", "bits", "loss", "nearest_loss", "damping", "notes")
    rows = [[[row[key] for key in same] for row in lq.ptq_report(made).rows()] for made in (found, expected)]
    assert rows[0] == rows[1]


def assert_same_journal(found: Path, expected: Path) -> None:
    assert (found / "fingerprint.json").read_text() == (expected / "fingerprint.json").read_text()
    names = sorted(file.name for file in expected.glob("*.safetensors"))
    assert sorted(file.name for file in found.glob("*.safetensors")) == names
    for name in names:
        ours, theirs = load_file(found / name), load_file(expected / name)
        assert ours.keys() == theirs.keys(), name
        assert all(torch.equal(ours[key], value) for key, value in theirs.items()), name


@pytest.mark.parametrize(("kind", "method"), list(itertools.product(MODELS, ["gptq", "awq", "rtn"])))
def test_it_is_the_run_with_all_weights(kind: str, method: str, tmp_path: Path) -> None:
    make, batches = MODELS[kind][0], MODELS[kind][1]()
    model = built(make)
    save_model(model, str(tmp_path / "model.safetensors"))
    journals = [{} if method == "rtn" else {"journal": tmp_path / name} for name in ("whole", "streamed")]
    expected = lq.quantize_model(model, W4, batches, method, **journals[0])
    given = empty(make)
    found = lq.quantize_model(given, W4, batches, method, weights=tmp_path, **journals[1])
    assert_same(found, expected)
    assert all(parameter.is_meta for parameter in given.parameters())
    if method != "rtn":
        assert_same_journal(tmp_path / "streamed", tmp_path / "whole")


# Of MobileNet, the classifier sees what convolutions with folded BatchNorm return, which is not the same to the bit.
@pytest.mark.parametrize(
    ("kind", "method"), [("llama", "gptq"), ("vit", "gptq"), ("llama", "rtn"), ("mobilenet", "rtn")]
)
def test_ranges_of_activations(kind: str, method: str, tmp_path: Path) -> None:
    make, batches = MODELS[kind][0], MODELS[kind][1]()
    save_model(built(make), str(tmp_path / "model.safetensors"))
    expected = lq.quantize_model(built(make), "int8", batches, method)
    assert_same(lq.quantize_model(empty(make), "int8", batches, method, weights=tmp_path), expected)


@pytest.mark.parametrize(("order", "tie"), [("blocks", True), ("sublayers", False)])
def test_a_folder_of_transformers_in_parts(order: str, tie: bool, tmp_path: Path) -> None:
    model = llama(tie=tie)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    batches = [{"input_ids": torch.randint(0, 96, (2, 8), generator=torch.Generator().manual_seed(i))} for i in (0, 1)]
    # The tied head is quantized by itself, and the embedding stays.
    config, options = lq.QuantizationConfig("int4", group_size=32), lq.PTQOptions(order=order)
    expected = lq.quantize_model(model, config, batches, "awq+gptq", options=options)
    with lq.without_weights():
        given = type(model)(model.config).eval()
    found = lq.quantize_model(given, config, batches, "awq+gptq", options=options, weights=tmp_path)
    assert_same(found, expected)


class Wrapped(nn.Module):
    """As a LightningModule around a network."""

    def __init__(self) -> None:
        super().__init__()
        self.network = Llama()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.network(ids)


def test_names_that_begin_otherwise_and_another_dtype(tmp_path: Path) -> None:
    wrapped = built(Wrapped).to(torch.bfloat16)
    save_model(wrapped.network, str(tmp_path / "part.safetensors"))
    save_model(wrapped, str(tmp_path / "whole.safetensors"))
    expected = lq.quantize_model(wrapped.float(), W4, tokens(), "gptq")
    inside = lq.quantize_model(empty(Wrapped), W4, tokens(), "gptq", weights=tmp_path / "part.safetensors")
    assert_same(inside, expected)
    part = lq.quantize_model(empty(Llama), W4, tokens(), "gptq", weights=tmp_path / "whole.safetensors")
    for name, value in part.state_dict().items():
        assert torch.equal(value, expected.state_dict()[f"network.{name}"]), name


def test_experts_that_a_later_batch_reaches(tmp_path: Path) -> None:
    batches, config = some_rows([0, 1, 0]), lq.QuantizationConfig("int4", group_size=8)
    save_model(built(Mixture), str(tmp_path / "model.safetensors"))
    expected = lq.quantize_model(built(Mixture), config, batches, "awq+gptq")
    assert_same(lq.quantize_model(empty(Mixture), config, batches, "awq+gptq", weights=tmp_path), expected)


def test_columns_in_activation_order(tmp_path: Path) -> None:
    save_model(built(Llama), str(tmp_path / "model.safetensors"))
    plan = lq.QuantizationPlan([lq.LayerRule("layers.*", lq.QuantizationConfig("int4", group_size=8))])
    options = lq.PTQOptions(gptq=lq.GPTQOptions(static_groups=False))
    expected = lq.quantize_model(built(Llama), plan, tokens(), "gptq", options=options)
    assert_same(lq.quantize_model(empty(Llama), plan, tokens(), "gptq", options=options, weights=tmp_path), expected)


class WithMore(Llama):
    """With a layer that no batch reaches, and a block of another kind that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.unused, self.twice = nn.Linear(16, 3), nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        embed = self.embed
        self.__dict__["embed"] = lambda ids: self.twice(self.twice(embed(ids)))
        try:
            return super().forward(ids)
        finally:
            del self.__dict__["embed"]


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_layers_outside_of_blocks(method: str, tmp_path: Path) -> None:
    save_model(built(WithMore), str(tmp_path / "model.safetensors"))
    plan = lq.QuantizationPlan(base=W4, rules=[lq.LayerRule("embed", "int8_weight_only")])
    expected = lq.quantize_model(built(WithMore), plan, tokens(), method)
    found = lq.quantize_model(empty(WithMore), plan, tokens(), method, weights=tmp_path)
    assert_same(found, expected)
    assert {"unused", "twice.0", "embed", "lm_head"} <= {layer.name for layer in lq.ptq_report(found).layers}


def test_a_run_goes_on_where_one_with_all_weights_was(tmp_path: Path) -> None:
    save_model(built(Llama), str(tmp_path / "model.safetensors"))
    expected = lq.quantize_model(built(Llama), W4, tokens(), "gptq", journal=tmp_path / "journal")
    told: list[str] = []

    class Recorder(lq.PTQObserver):
        def stage_restored(self, name: str, outcomes: Any) -> None:
            told.append(name)

    min((tmp_path / "journal").glob("*layers.1*")).unlink()
    found = lq.quantize_model(
        empty(Llama), W4, tokens(), "gptq", weights=tmp_path, journal=tmp_path / "journal", observer=Recorder()
    )
    assert told == ["layers.0", "layers.2", "after the blocks"]
    assert_same(found, expected)
    save_model(built(Wrapped).network, str(tmp_path / "model.safetensors"))  # other weights
    other = load_file(tmp_path / "model.safetensors")
    save_file({name: value + 1 for name, value in other.items()}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="blocks of a run with another model"):
        lq.quantize_model(empty(Llama), W4, tokens(), "gptq", weights=tmp_path, journal=tmp_path / "journal")


def test_one_block_has_weights_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(built(Llama), str(tmp_path / "model.safetensors"))
    most: list[int] = []

    def counted(self: Any, ids: Any) -> Any:
        def look(*_: Any) -> None:
            floats = [isinstance(layer, nn.Linear) and not layer.weight.is_meta for layer in linears]
            most.append(sum(floats))

        linears = [m for m in self.layers.modules() if isinstance(m, nn.Linear)]
        handles = [layer.register_forward_pre_hook(look) for layer in linears]
        try:
            return forward(self, ids)
        finally:
            for handle in handles:
                handle.remove()

    forward = Llama.forward
    monkeypatch.setattr(Llama, "forward", counted)
    lq.quantize_model(empty(Llama), "int8", tokens(), "rtn", weights=tmp_path)
    assert most
    assert max(most) == 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"verify": True}, "verify=True needs all weights at once"),
        ({"convert": False}, "convert=False needs all weights at once"),
        ({"options": lq.PTQOptions(order="one_pass")}, "order='one_pass' needs all weights at once"),
        ({"weights": None}, "on the meta device; say where its weights are"),
        ({"model": Llama}, "no parameter of Llama is on the meta device"),
        ({"model": lambda: nn.Sequential(nn.Linear(16, 16))}, "no parameter of Sequential is on the meta device"),
    ],
)
def test_what_needs_all_weights_is_told(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    save_model(built(Llama), str(tmp_path / "model.safetensors"))
    model = change["model"]() if "model" in change else empty(Llama)
    arguments = {"weights": tmp_path, **{key: value for key, value in change.items() if key != "model"}}
    with pytest.raises(ValueError, match=message):
        lq.quantize_model(model, W4, tokens(), "gptq", **arguments)


def test_a_model_without_blocks_is_told(tmp_path: Path) -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))

    save_model(make(), str(tmp_path / "model.safetensors"))
    batches = [torch.randn(5, 16)]
    with pytest.raises(ValueError, match="has no blocks of which one follows the other"):
        lq.quantize_model(empty(make), W4, batches, "gptq", weights=tmp_path)
    lq.quantize_model(empty(make), W4, None, "rtn", weights=tmp_path)


def most_memory(folder: Path, mode: str) -> tuple[float, float]:
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parent.parent.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, SCRIPT, folder, mode], env=environment, timeout=240, check=True, capture_output=True, text=True
    )
    most, result = map(float, done.stdout.split())
    return most, result


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_memory_is_that_of_the_result_and_of_few_blocks(tmp_path: Path) -> None:
    streamed.write(tmp_path)
    sizes = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"].values()
    block = (tmp_path / "model-0.safetensors").stat().st_size / 1e6
    whole = sum((tmp_path / name).stat().st_size for name in set(sizes)) / 1e6
    most, result = most_memory(tmp_path, "streamed")
    bound = result + 4 * block + 150  # statistics and the work space of one layer, and what a process takes besides
    assert most < bound < 0.7 * whole
    assert most_memory(tmp_path, "loaded")[0] > 1.5 * bound

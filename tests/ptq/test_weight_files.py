"""Tensors by name in safetensors files, and building a model without memory for its parameters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ptq_models import Llama
from safetensors.torch import save_file
from torch import nn

import lightning_qat as lq


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("kept", torch.arange(3.0))
        self.register_buffer("angles", torch.linspace(0, 1, 3), persistent=False)


def test_parameters_have_no_memory_and_buffers_are_computed() -> None:
    shared = nn.Parameter(torch.zeros(3))
    with lq.without_weights():
        model, others = Tied(), nn.ModuleList(nn.Module() for _ in range(2))
        for other in others:
            other.register_parameter("weight", shared)
        frozen = nn.Module()
        frozen.weight = nn.Parameter(torch.zeros(2), requires_grad=False)
        frozen.register_parameter("bias", None)
        lazy = nn.LazyLinear(3)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.head.weight is model.embed.weight
    assert others[0].weight is others[1].weight
    assert not frozen.weight.requires_grad
    assert frozen.bias is None
    assert type(lazy.weight) is nn.parameter.UninitializedParameter
    assert torch.equal(model.angles, torch.linspace(0, 1, 3))
    assert not nn.Linear(2, 2).weight.is_meta  # it ends with the block


def test_what_is_read_is_a_copy(tmp_path: Path) -> None:
    weight = torch.randn(6, 4)
    save_file({"weight": weight, "empty": torch.zeros(0, 2)}, tmp_path / "one.safetensors")
    files = lq.WeightFiles(tmp_path / "one.safetensors")
    assert sorted(files.names) == ["empty", "weight"]
    assert files.shape("weight") == (6, 4)
    assert files.read("empty").shape == (0, 2)
    read = files.read("weight")
    read += 1
    assert torch.equal(files.read("weight"), weight)
    assert torch.equal(files.read("weight", torch.bfloat16), weight.to(torch.bfloat16))
    assert not any("one.safetensors" in line for line in _mapped())


def _mapped() -> list[str]:
    maps = Path("/proc/self/maps")
    return maps.read_text().splitlines() if maps.is_file() else []


def test_several_files_with_an_index(tmp_path: Path) -> None:
    tensors = {f"layers.{i}.weight": torch.full((2, 2), float(i)) for i in range(4)}
    for i in range(2):
        part = {name: t for j, (name, t) in enumerate(tensors.items()) if j % 2 == i}
        save_file({**part, "unlisted": torch.zeros(1)}, tmp_path / f"part-{i}.safetensors")
    placed = {name: f"part-{j % 2}.safetensors" for j, name in enumerate(tensors)}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": placed}))
    for path in (tmp_path, index):
        files = lq.WeightFiles(path)
        assert sorted(files.names) == sorted(tensors)
        assert all(torch.equal(files.read(name), value) for name, value in tensors.items())


def test_a_buffer_is_that_of_the_files(tmp_path: Path) -> None:
    table = torch.randn(5, 4)
    save_file({"head.weight": table, "kept": torch.ones(3)}, tmp_path / "model.safetensors")
    with lq.without_weights():
        model = Tied()
    matched = lq.WeightFiles(tmp_path).match(model)
    assert torch.equal(matched.value("embed.weight", model.embed.weight), table)  # under its other name
    assert matched.value("kept", model.kept).tolist() == [1, 1, 1]
    assert matched.value("angles", model.angles) is model.angles


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"kept": torch.ones(3)}, "it has no 'embed.weight'"),
        ({"embed.weight": torch.zeros(4, 4)}, r"'embed.weight' has shape \[4, 4\] there and \[5, 4\] in the model"),
        ({"embed.weight": torch.zeros(5, 4, dtype=torch.int8)}, "'embed.weight' is stored as I8, which is quantized"),
        ({"embed.weight": torch.zeros(5, 4), "kept": torch.ones(4)}, r"'kept' has shape \[4\] there and \[3\]"),
    ],
)
def test_other_weights_are_told(tensors: dict[str, torch.Tensor], message: str, tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "model.safetensors")
    with lq.without_weights():
        model = Tied()
    with pytest.raises(ValueError, match=message):
        lq.WeightFiles(tmp_path).match(model)


def test_a_buffer_that_no_file_holds_is_told(tmp_path: Path) -> None:
    save_file({"embed.weight": torch.zeros(5, 4), "kept": torch.ones(3)}, tmp_path / "model.safetensors")
    with torch.device("meta"):
        model = Tied()
    with pytest.raises(ValueError, match="buffer 'angles'.*without_weights"):
        lq.WeightFiles(tmp_path).match(model)


def test_missing_running_statistics_are_told(tmp_path: Path) -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4, track_running_stats=False))

    state = make().state_dict()
    with lq.without_weights():
        model = make()
    kept = {name: value for name, value in state.items() if name != "1.num_batches_tracked"}
    save_file(kept, tmp_path / "model.safetensors")
    assert sorted(lq.WeightFiles(tmp_path).match(model).buffers) == ["1.running_mean", "1.running_var"]
    save_file({name: value for name, value in kept.items() if "mean" not in name}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="it has no '1.running_mean'"):
        lq.WeightFiles(tmp_path).match(model)


def _index(folder: Path, content: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ({"weight_map": {"a": "gone.safetensors"}}, FileNotFoundError, "names 'gone.safetensors', which is not there"),
        ({"weight_map": {"b": "here.safetensors"}}, ValueError, "has no 'b', which the index says"),
        ({"weight_map": {"a": "../here.safetensors"}}, ValueError, "in another folder"),
        ({"weight_map": {"a": 3}}, ValueError, "is damaged"),
        ({"map": {}}, ValueError, "is damaged"),
        ("{", ValueError, "is damaged"),
    ],
)
def test_a_wrong_index_is_told(content: Any, error: type[Exception], message: str, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "here.safetensors")
    _index(tmp_path, content)
    with pytest.raises(error, match=message):
        lq.WeightFiles(tmp_path)


def test_a_wrong_path_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds neither"):
        lq.WeightFiles(tmp_path)
    with pytest.raises(FileNotFoundError, match="is not there"):
        lq.WeightFiles(tmp_path / "nothing.safetensors")
    (tmp_path / "model.safetensors").write_bytes(b"no weights at all")
    with pytest.raises(ValueError, match="is damaged, or no file of safetensors"):
        lq.WeightFiles(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="no parameter of Llama is on the meta device"):
        lq.WeightFiles(tmp_path).match(Llama())

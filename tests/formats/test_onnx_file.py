"""Weights of 4 bits are packed in ONNX files, and onnxruntime multiplies by them as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from onnx_files import converted, onnx, reference, run
from torch import Tensor, nn

import lightning_qat as lq

C = lq.QuantizationConfig


class Rows(nn.Module):
    """A Linear for rows, with a bias, and one for the tokens of a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.tokens = nn.Linear(64, 32), nn.Linear(32, 7, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.rows(x))
        return self.tokens(torch.stack([y, y + 1.0], 1))


def held_by(path: Path) -> dict[str, Any]:
    return {initializer.name: initializer for initializer in onnx.load(path).graph.initializer}


@pytest.mark.parametrize(
    "config",
    [
        C("int4", group_size=32),
        C("int4", group_size=16, symmetric=False),
        C("gptq", bits=3, group_size=32, symmetric=False),
        C("int4", per_channel=True),
        C("int4", symmetric=False),
    ],
    ids=["symmetric groups", "asymmetric groups", "three bits", "channels", "one range"],
)
def test_packed_weights_are_multiplied_as_they_are(tmp_path: Path, config: Any) -> None:
    torch.manual_seed(0)
    model = converted(Rows(), config)
    path = lq.export(model, tmp_path / "model.onnx", "onnx", example=torch.randn(2, 64))
    onnx.checker.check_model(path)
    kind = onnx.TensorProto.INT4 if config.symmetric else onnx.TensorProto.UINT4
    held = held_by(path)
    for name in ("rows", "tokens"):
        codes, layer = held[f"{name}.onnx_codes.{'int4' if config.symmetric else 'uint4'}"], getattr(model, name)
        assert codes.data_type == kind
        assert len(codes.raw_data) == layer.codes.numel() // 2
        assert torch.equal(torch.from_numpy(onnx.numpy_helper.to_array(codes).astype("int8")).t(), layer.codes)
    assert not any(name.endswith("onnx_codes") for name in held)
    x = torch.randn(5, 64)
    expected = reference(model, x)
    for optimized in (False, True):
        found, nodes = run(path, x, optimized=optimized, float_inputs=True)
        assert float((found - expected).abs().max()) < 2e-6
    assert nodes["MatMulNBits"] == 2
    assert not nodes["DequantizeLinear"]
    found, _ = run(path, x, optimized=True)
    assert float((found - expected).abs().max()) < 2e-2  # inputs of both layers in 8 bits, in blocks


def test_other_layers_and_odd_numbers_of_codes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 5, 3), nn.Flatten(), nn.Linear(45, 3), nn.ReLU(), nn.Linear(3, 1)]
    model = converted(nn.Sequential(*layers), C("int4", per_channel=True, symmetric=False))
    path = lq.export(model, tmp_path / "model.onnx", "onnx", example=torch.randn(2, 3, 5, 5))
    onnx.checker.check_model(path)
    x = torch.randn(4, 3, 5, 5)
    for optimized in (False, True):
        found, _ = run(path, x, optimized=optimized, float_inputs=True)
        assert float((found - reference(model, x)).abs().max()) < 1e-6


class Tables(nn.Module):
    """Embeddings of the same words, one beside the other."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(50, size) for size in sizes)

    def forward(self, words: Tensor) -> Tensor:
        return torch.cat([table(words) for table in self.tables], -1)


def test_rows_of_tables_are_picked_before_they_are_dequantized(tmp_path: Path) -> None:
    configs = [
        C("int4", group_size=8),
        C("int4", per_channel=True, symmetric=False),
        C("int4", per_channel=True),  # of 5 columns
        C("int8", symmetric=False),
    ]
    torch.manual_seed(0)
    rules = [lq.LayerRule(f"tables.{i}", config) for i, config in enumerate(configs)]
    model = Tables(16, 6, 5, 7)
    for table in model.tables:
        table.weight.data.add_(0.3)  # zero points are off centre
    words = torch.randint(0, 50, (2, 3))
    model = converted(model, lq.QuantizationPlan(rules))
    path = lq.export(model, tmp_path / "model.onnx", "onnx", example=words)
    words = torch.randint(0, 50, (4, 11))
    for optimized in (False, True):
        found, nodes = run(path, words, optimized=optimized)
        assert torch.equal(found, reference(model, words))
        assert not nodes["DequantizeLinear"]
    held = held_by(path)
    for i, table in enumerate(model.tables):
        stored = held[f"tables.{i}.onnx_codes"]
        assert len(stored.raw_data) == table.codes.numel() // (2 if i < 2 else 1)


def test_what_the_exporter_made_one_is_packed_where_it_may_be(tmp_path: Path) -> None:
    """Zero points that are all 0 are one initializer, read in 8 bits by the layer with quantized inputs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 8))
    model[0].weight.data.abs_()
    int8 = C("int8", per_channel=True), C("int8", symmetric=False)
    rules = [lq.LayerRule("0", C("int4", per_channel=True, symmetric=False)), lq.LayerRule("1", *int8)]
    x = torch.randn(6, 16)
    model = converted(model, lq.QuantizationPlan(rules), x)
    assert not model[0].weight_zero_point.any()
    path = lq.export(model, tmp_path / "model.onnx", "onnx", example=x)
    onnx.checker.check_model(path)
    found, nodes = run(path, x, optimized=True, float_inputs=True)
    assert (nodes["MatMulNBits"], nodes["QGemm"]) == (1, 1)
    assert float((found - reference(model, x)).abs().max()) < 1e-4


def test_the_file_says_nothing_of_the_machine_that_wrote_it(tmp_path: Path) -> None:
    model = converted(nn.Sequential(nn.Linear(16, 8)), "int8", torch.randn(2, 16))
    written = lq.export(model, tmp_path / "model.onnx", "onnx", example=torch.randn(2, 16)).read_bytes()
    for told in (
        b"stack_trace",
        b"forward",
        str(Path(lq.__file__).parent).encode(),
        str(Path(torch.__file__).parent).encode(),
    ):
        assert told not in written

"""Convolutions whose output is read as floats: onnxruntime computes them with integers, whatever their geometry."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from onnx_files import converted, onnx, reference, run
from torch import Tensor, nn

import lightning_qat as lq

C = lq.QuantizationConfig
#: Of weights and inputs.
INT8 = C("int8", per_channel=True), C("int8", symmetric=False)
UNSIGNED = C("int8", symmetric=False, per_channel=True), C("int8", symmetric=False)
SIGNED = C("int8", per_channel=True), C("int8")
FOUR = C("int4", per_channel=True), C("int8", symmetric=False)


class Read(nn.Module):
    """Convolutions of the same input whose outputs are added to something, which no layer quantizes, in one row."""

    def __init__(self, *convs: nn.Module) -> None:
        super().__init__()
        self.convs = nn.ModuleList(convs)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([(conv(x) + 1.0).flatten(x.dim() - 3) for conv in self.convs], -1)


class Characters(nn.Module):
    """A convolution over text of any length."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.conv = nn.Embedding(30, 16), nn.Conv1d(16, 5, 3, padding=1, dilation=1)

    def forward(self, ids: Tensor) -> Tensor:
        return self.conv(self.embedding(ids).transpose(1, 2))


def exported(path: Path, model: nn.Module, plan: Any, x: Tensor) -> nn.Module:
    quantized = converted(model, plan, x)
    lq.export(quantized, path, "onnx", example=x)
    return quantized


def check(model: Any, found: Tensor, expected: Tensor) -> None:
    """Within half a step of the sums, to which biases are rounded, and rounding of float32 for sums in both orders."""
    convs = getattr(model, "convs", None) or [model.conv]
    steps = [0.0 if conv.bias is None else float((conv.input_scale * conv.weight_scale).max()) / 2 for conv in convs]
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= max(steps) + 4e-7 * float(expected.abs().max())


@pytest.mark.parametrize(
    ("convs", "shape", "formats"),
    [
        (
            [
                nn.Conv2d(16, 24, 3, padding=1),
                nn.Conv2d(16, 3, 3, stride=2, bias=False),
                nn.Conv2d(16, 8, (1, 3), stride=(2, 1), padding=(0, 2), dilation=(1, 2)),
                nn.Conv2d(16, 8, (5, 3), padding="same"),
                nn.Conv2d(16, 8, 3, padding=1, padding_mode="reflect"),
            ],
            (9, 7),
            [INT8, INT8, UNSIGNED, SIGNED, FOUR],
        ),
        (
            [nn.Conv2d(4, 8, 1), nn.Conv2d(4, 8, 1, stride=2), nn.Conv2d(4, 8, 1, padding=1)],
            (5, 6),
            [UNSIGNED, INT8, INT8],
        ),
        ([nn.Conv1d(16, 9, 5, stride=3, padding=2)], (14,), [INT8]),
        ([nn.Conv3d(16, 4, (2, 3, 1), padding=(0, 1, 0))], (3, 4, 2), [INT8]),
    ],
    ids=["kernels", "1x1", "one dimension", "three dimensions"],
)
def test_it_is_one_product_of_integers(tmp_path: Path, convs: list[Any], shape: tuple[int, ...], formats: Any) -> None:
    torch.manual_seed(0)
    channels = convs[0].in_channels
    plan = lq.QuantizationPlan([lq.LayerRule(f"convs.{i}", *both) for i, both in enumerate(formats)])
    # Off centre, so that the code of 0.0, with which images are padded, is none of the grid's ends.
    model = exported(tmp_path / "a.onnx", Read(*convs), plan, torch.randn(2, channels, *shape) - 0.5)
    x = torch.randn(3, channels, *shape) - 0.5
    expected = reference(model, x)
    for optimized in (False, True):
        found, nodes = run(tmp_path / "a.onnx", x, optimized=optimized)
        check(model, found, expected)
        assert not nodes["Conv"] + nodes["FusedConv"] + nodes["ConvInteger"]
    assert nodes["QGemm"] + nodes["MatMulIntegerToFloat"] == len(convs)
    assert not nodes["DequantizeLinear"]
    assert not nodes["ConstantOfShape"] + nodes["Mul"]  # which pixel is read was computed when the file was loaded


def test_text_of_any_length(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = exported(tmp_path / "a.onnx", Characters(), "int8", torch.randint(0, 30, (2, 8)))
    for length in (1, 13):
        ids = torch.randint(0, 30, (3, length))
        expected = reference(model, ids)
        found, nodes = run(tmp_path / "a.onnx", ids, optimized=True)
        assert nodes["QGemm"] == 1
        check(model, found, expected)


def test_one_image_without_a_batch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 5, 6)
    model = exported(tmp_path / "a.onnx", Read(nn.Conv2d(16, 4, 3, padding=1)), "int8", x)
    expected = reference(model, x)
    found, nodes = run(tmp_path / "a.onnx", x, optimized=True)
    assert nodes["QGemm"] == 1
    check(model, found, expected)


def test_others_stay_convolutions(tmp_path: Path) -> None:
    """Groups, and too few channels to gather."""
    torch.manual_seed(0)
    x = torch.randn(2, 8, 6, 6)
    convs = [nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 8, 3)]
    model = exported(tmp_path / "a.onnx", Read(*convs), "int8", x)
    found, nodes = run(tmp_path / "a.onnx", x)
    assert nodes["Conv"] == 2
    check(model, found, reference(model, x))


def test_the_file_holds_no_number_for_each_pixel(tmp_path: Path) -> None:
    model = exported(tmp_path / "a.onnx", Read(nn.Conv2d(16, 2, 3, padding=1)), "int8", torch.randn(1, 16, 64, 48))
    held = {i.name: onnx.numpy_helper.to_array(i).size for i in onnx.load(tmp_path / "a.onnx").graph.initializer}
    assert max(held.values()) == model.convs[0].codes.numel()

"""Convolutions whose output is read as floats: onnxruntime computes them with integers, whatever their geometry."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from onnx_files import converted, onnx, reference, run
from torch import Tensor, nn

import lightning_qat as lq

UNSIGNED = lq.QATConfig("int8", symmetric=False, per_channel=True)
SIGNED = lq.QATConfig("int8", per_channel=True, activation_symmetric=True)


class Read(nn.Module):
    """A convolution whose output is added to something, which no layer quantizes."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + 1.0


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


def allowed(conv: Any, expected: Tensor) -> float:
    """Return half a step of the sums, to which biases are rounded, and rounding of float32 for sums of both orders."""
    step = 0.0 if conv.bias is None else float((conv.input_scale * conv.weight_scale).max()) / 2
    return step + 4e-7 * float(expected.abs().max())


@pytest.mark.parametrize(
    ("conv", "shape", "plan"),
    [
        (lambda: nn.Conv2d(16, 24, 3, padding=1), (9, 7), "int8"),
        (lambda: nn.Conv2d(20, 3, 3, stride=2, bias=False), (8, 11), "int8"),
        (lambda: nn.Conv2d(16, 8, (1, 3), stride=(2, 1), padding=(0, 2), dilation=(1, 2)), (5, 6), UNSIGNED),
        (lambda: nn.Conv2d(16, 8, (4, 3), padding="same"), (6, 5), SIGNED),
        (lambda: nn.Conv2d(16, 8, 3, padding=1, padding_mode="reflect"), (6, 5), "int8"),
        (lambda: nn.Conv2d(16, 8, 3, padding=2, padding_mode="circular"), (6, 5), "w4a8"),
        (lambda: nn.Conv2d(4, 8, 1), (3, 2), UNSIGNED),
        (lambda: nn.Conv2d(4, 8, 1, stride=2), (5, 6), "int8"),
        (lambda: nn.Conv2d(4, 8, 1, padding=1), (2, 3), "int8"),
        (lambda: nn.Conv1d(16, 9, 5, stride=3, padding=2), (14,), "int8"),
        (lambda: nn.Conv3d(16, 4, (2, 3, 1), padding=(0, 1, 0)), (3, 4, 2), "int8"),
    ],
)
def test_it_is_one_product_of_integers(tmp_path: Path, conv: Any, shape: tuple[int, ...], plan: Any) -> None:
    torch.manual_seed(0)
    layer = conv()
    # Off centre, so that the code of 0.0, with which images are padded, is none of the grid's ends.
    model = exported(tmp_path / "a.onnx", Read(layer), plan, torch.randn(2, layer.in_channels, *shape) - 0.5)
    x = torch.randn(3, layer.in_channels, *shape) - 0.5
    expected = reference(model, x)
    for optimized in (False, True):
        found, nodes = run(tmp_path / "a.onnx", x, optimized=optimized)
        assert found.shape == expected.shape
        assert float((found - expected).abs().max()) <= allowed(model.conv, expected)
        assert not nodes["Conv"] + nodes["FusedConv"] + nodes["ConvInteger"]
    assert nodes["QGemm"] + nodes["MatMulIntegerToFloat"] == 1
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
        assert found.shape == expected.shape
        assert float((found - expected).abs().max()) <= allowed(model.conv, expected)


def test_one_image_without_a_batch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 5, 6)
    model = exported(tmp_path / "a.onnx", Read(nn.Conv2d(16, 4, 3, padding=1)), "int8", x)
    expected = reference(model, x)
    found, nodes = run(tmp_path / "a.onnx", x, optimized=True)
    assert nodes["QGemm"] == 1
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= allowed(model.conv, expected)


@pytest.mark.parametrize(
    ("conv", "plan"),
    [(nn.Conv2d(16, 8, 3, groups=2), "int8"), (nn.Conv2d(3, 8, 3), "int8"), (nn.Conv2d(16, 8, 3), "int8_dynamic")],
    ids=["groups", "few channels", "dynamic"],
)
def test_others_stay_convolutions(tmp_path: Path, conv: nn.Conv2d, plan: str) -> None:
    x = torch.randn(2, conv.in_channels, 6, 6)
    model = exported(tmp_path / "a.onnx", Read(conv), plan, x)
    found, nodes = run(tmp_path / "a.onnx", x)
    assert nodes["Conv"] == 1
    expected = reference(model, x)
    within = 1e-5 if plan == "int8_dynamic" else allowed(model.conv, expected)
    assert float((found - expected).abs().max()) <= within


def test_the_file_holds_no_number_for_each_pixel(tmp_path: Path) -> None:
    model = exported(tmp_path / "a.onnx", Read(nn.Conv2d(16, 2, 3, padding=1)), "int8", torch.randn(1, 16, 64, 48))
    held = {i.name: onnx.numpy_helper.to_array(i).size for i in onnx.load(tmp_path / "a.onnx").graph.initializer}
    assert max(held.values()) == model.conv.codes.numel()

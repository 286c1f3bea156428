"""ONNX files: onnxruntime computes what we do, with integers where it can."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from onnx_files import converted, onnx, ort, reference, run
from torch import Tensor, nn

import lightning_qat as lq

C = lq.QuantizationConfig


class Residual(nn.Module):
    """Convolution, depthwise convolution and a 1x1 convolution that is added to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.deep, self.norm2 = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16)
        self.point, self.norm3 = nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.head = nn.Linear(16 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm1(self.first(x)))
        y = nn.functional.relu6(self.norm2(self.deep(x)))
        x = x + self.norm3(self.point(y))
        return self.head(nn.functional.avg_pool2d(x, 2).flatten(1))


class Encoder(nn.Module):
    """Embeddings and two layers for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.up, self.down = nn.Embedding(50, 64), nn.Linear(64, 48), nn.Linear(48, 10)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(self.embedding(ids)))) * mask.unsqueeze(-1)


class Up(nn.Module):
    """Other layers: one and three dimensions, transposed, a Linear on vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.line, self.space = nn.ConvTranspose2d(3, 4, 2, stride=2), nn.Conv1d(4, 6, 3), nn.Conv3d(1, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.line(self.up(x).flatten(2))
        return self.space(x.reshape(x.shape[0], 1, 2, 3, -1)).flatten(1)


def residual(plan: Any) -> nn.Module:
    torch.manual_seed(0)
    model = Residual()
    model(torch.randn(16, 3, 8, 8))  # statistics of BatchNorm
    return converted(model, plan, *(torch.randn(4, 3, 8, 8) for _ in range(3)))


@pytest.mark.parametrize("plan", ["int8", "w4a4", "int8_dynamic", "symmetric", "asymmetric weights"])
def test_a_convolutional_network(tmp_path: Path, plan: str) -> None:
    symmetric = lq.QATConfig("int8", per_channel=True, activation_symmetric=True)
    asymmetric = lq.QATConfig("int8", symmetric=False, per_channel=True)
    model = residual({"symmetric": symmetric, "asymmetric weights": asymmetric}.get(plan, plan))
    assert lq.export(model, tmp_path / "model.onnx", "onnx", example=torch.randn(2, 3, 8, 8)) == tmp_path / "model.onnx"
    x = torch.randn(7, 3, 8, 8)
    expected = reference(model, x)
    found, nodes = run(tmp_path / "model.onnx", x)
    # Biases of layers with static inputs are rounded to int32 steps, by which a code of the next layer may change.
    static = plan != "int8_dynamic"
    assert float((found - expected).abs().max()) < (5e-2 if plan == "w4a4" else 3e-3 if static else 2e-6)
    assert not nodes["BatchNormalization"]
    assert nodes["QuantizeLinear"] == (4 if static else 0)
    optimized, nodes = run(tmp_path / "model.onnx", x, optimized=True)
    # The 1x1 convolution before the addition, and the head; of dynamic inputs the head alone.
    assert nodes["QGemm" if static else "MatMulInteger"] == (2 if static else 1)
    assert float((optimized - expected).abs().max()) < (5e-2 if plan == "w4a4" else 5e-3)
    assert torch.equal(optimized.argmax(1), expected.argmax(1)) or plan == "w4a4"


def test_onnxruntime_computes_with_integers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU6(), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Flatten()]
    model = converted(nn.Sequential(*layers, nn.Linear(8 * 36, 5)), "int8", torch.randn(8, 3, 8, 8))
    lq.export(model, tmp_path / "model.onnx", "onnx", example=torch.randn(2, 3, 8, 8))
    x = torch.randn(3, 3, 8, 8)
    found, nodes = run(tmp_path / "model.onnx", x, optimized=True)
    assert (nodes["QLinearConv"], nodes["QGemm"]) == (2, 1)
    assert not nodes["DequantizeLinear"] + nodes["Conv"] + nodes["Relu"] + nodes["Clip"]
    assert float((found - reference(model, x)).abs().max()) < 1e-2


@pytest.mark.parametrize("plan", ["int8", "int8_dynamic", "groups"])
def test_an_encoder_at_any_length(tmp_path: Path, plan: str) -> None:
    groups = lq.QuantizationPlan([lq.LayerRule(nn.Linear, C("int4", group_size=16, symmetric=False))])
    torch.manual_seed(0)
    ids, mask = torch.randint(0, 50, (3, 7)), torch.ones(3, 7, dtype=torch.long)
    model = converted(Encoder(), {"groups": groups}.get(plan, plan), (ids, mask))
    lq.export(model, tmp_path / "model.onnx", "onnx", example={"ids": ids, "mask": mask})
    ids, mask = torch.randint(0, 50, (2, 9)), torch.tensor([[1] * 9, [1] * 4 + [0] * 5])
    expected = reference(model, ids, mask)
    found, _ = run(tmp_path / "model.onnx", ids, mask)
    assert float((found - expected).abs().max()) < 1e-6
    optimized, nodes = run(tmp_path / "model.onnx", ids, mask, optimized=True)
    # Weight-only products are computed by onnxruntime with inputs in int8.
    assert float((optimized - expected).abs().max()) < (1e-6 if plan.startswith("int8") else 2e-2)
    assert nodes["MatMulIntegerToFloat"] == (2 if plan == "int8" else 0)
    assert nodes["MatMulInteger"] == (2 if plan == "int8_dynamic" else 0)


def test_other_layers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = converted(Up(), "int8", torch.randn(4, 3, 4, 4))
    lq.export(model, tmp_path / "model.onnx", "onnx", example=torch.randn(2, 3, 4, 4))
    x = torch.randn(4, 3, 4, 4)
    found, _ = run(tmp_path / "model.onnx", x)
    assert float((found - reference(model, x)).abs().max()) < 5e-3


def test_a_bert_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=99)
    model = transformers.BertModel(transformers.BertConfig(**sizes), add_pooling_layer=False)
    batch = {"input_ids": torch.randint(0, 99, (2, 6)), "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    model = converted(model, "int8", batch)
    lq.export(model, tmp_path / "model.onnx", "onnx", example=batch)
    ids, mask = torch.randint(0, 99, (3, 5)), torch.ones(3, 5, dtype=torch.long)
    found, nodes = run(tmp_path / "model.onnx", ids, mask, optimized=True)
    with torch.no_grad():
        expected = model(ids, mask).last_hidden_state
    assert nodes["MatMulIntegerToFloat"] == 6
    assert float((found - expected).abs().max()) < 5e-2  # one step of an input's grid, where a code falls the other way


def test_a_llama_of_transformers_whose_config_asks_for_a_cache(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=99)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_key_value_heads=1))
    model = converted(model, "int8", {"input_ids": torch.randint(0, 99, (2, 6))})
    lq.export(model, tmp_path / "model.onnx", "onnx", example={"input_ids": torch.randint(0, 99, (2, 6))})
    ids = torch.randint(0, 99, (3, 5))
    found, _ = run(tmp_path / "model.onnx", ids)
    with torch.no_grad():
        expected = model(ids)
    assert onnx.load(tmp_path / "model.onnx").graph.output[0].name == "logits"
    assert expected.past_key_values is not None  # the model's own config is as it was
    assert float((found - expected.logits).abs().max()) < 5e-2


@pytest.mark.parametrize(
    ("model", "example", "message"),
    [
        (
            lambda: converted(Encoder(), "nf4"),
            True,
            "layer 'up' is in nf4 with 4 bits, and ONNX has integers of at most 8",
        ),
        (
            lambda: converted(Encoder(), "int8_weight_only"),
            None,
            "format='onnx' traces the model .* give example=batch",
        ),
        (lambda: lq.prepare(Encoder(), "int8_weight_only"), True, "Encoder is prepared but not converted"),
        (lambda: converted(Encoder().half(), "int8_weight_only"), True, "layer 'up' has weights in torch.float16"),
        (
            lambda: converted(nn.Sequential(nn.Conv2d(8, 4, 3)), C("int4", group_size=8)),
            True,
            "layer '0' is a convolution with groups of 8, .* per_channel=True",
        ),
    ],
)
def test_what_it_cannot_hold_is_named(tmp_path: Path, model, example: Any, message: str) -> None:
    ids = torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(ValueError, match=message):
        lq.export(model(), tmp_path / "model.onnx", "onnx", example=(ids, ids) if example else None)
    assert not any(tmp_path.iterdir())


class Slots(nn.Module):
    """A query for each sample, as many as ``len(x)`` says or the shape does."""

    def __init__(self, by_len: bool) -> None:
        super().__init__()
        self.query, self.line, self.by_len = nn.Parameter(torch.randn(1, 1, 8)), nn.Linear(6, 8), by_len

    def forward(self, x: Tensor) -> Tensor:
        return self.line(x) + self.query.expand(len(x) if self.by_len else x.shape[0], -1, -1)


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("by_len", [False, True], ids=["shape", "len"])
def test_a_size_that_the_code_made_a_number_is_one_in_the_file_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, by_len: bool, size: int
) -> None:
    x = torch.randn(size, 3, 6)
    model = converted(Slots(by_len), "int8", x)
    path = lq.export(model, tmp_path / "model.onnx", "onnx", example=x)
    said = [record.message for record in caplog.records if record.name.startswith("lightning_qat")]
    graph = onnx.load(path).graph
    sizes = [value.type.tensor_type.shape.dim[0].dim_value for value in (*graph.input, *graph.output)]
    assert sizes == ([size, size] if by_len else [0, 0])
    assert len(said) == int(by_len)
    assert not by_len or f"dimension 0 of 'x' is {size}" in said[0]
    x = x if by_len else torch.randn(5, 3, 6)
    found, _ = run(path, x)
    assert float((found - reference(model, x)).abs().max()) < 1e-5


class Detector(nn.Module):
    """Returns a dict: a tensor, several under one key, one twice, one as it came in."""

    def __init__(self) -> None:
        super().__init__()
        self.boxes, self.scores = nn.Linear(8, 4), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> dict[str, Any]:
        scores = self.scores(x)
        return {"boxes": self.boxes(x), "levels": (scores + 1, scores + 2), "twice": scores, "again": scores, "same": x}


def test_outputs_have_the_names_of_a_dict(tmp_path: Path) -> None:
    model, x = converted(Detector(), "int8_dynamic"), torch.randn(3, 8)
    lq.export(model, tmp_path / "m.onnx", format="onnx", example=x)
    session = ort.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    assert names == ["boxes", "levels.0", "levels.1", "twice", "again", "same"]
    found = session.run(["levels.1", "boxes", "levels.0"], {session.get_inputs()[0].name: x.numpy()})
    expected = model(x)
    for one, other in zip(found, (expected["levels"][1], expected["boxes"], expected["levels"][0]), strict=True):
        torch.testing.assert_close(torch.from_numpy(one), other, rtol=1e-4, atol=1e-4)

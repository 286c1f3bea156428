"""Damaged files are refused, whatever of them is damaged: none is read as another model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tensors import randn
from torch import Tensor, nn

import lightning_qat as lq

FORMATS = {
    "gptq": lq.QuantizationConfig("int4", group_size=32, symmetric=False),
    "awq": lq.QuantizationConfig("int4", group_size=32, symmetric=False),
    "compressed_tensors": lq.QuantizationConfig("int4", group_size=32, symmetric=False),
    "compressed_tensors int8": "int8",
    "bitsandbytes": lq.QuantizationConfig("nf4"),
    "bitsandbytes int8": "llm_int8",
}
#: Tensors that say nothing that the config and the model do not say too.
NOT_NEEDED = ("g_idx", "weight_shape", "quant_map", "weight_format")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32, bias=False))


@pytest.fixture
def exported(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    quantized = lq.quantize_model(network(), FORMATS[request.param], [randn(8, 64)])
    return lq.export(quantized, tmp_path / "model", request.param.split()[0])


def damages(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    found = {}
    for name, tensor in tensors.items():
        if name.endswith(NOT_NEEDED) or name.endswith(".bias") or not tensor.dim():
            continue
        found[f"{name} is gone"] = {k: v for k, v in tensors.items() if k != name}
        found[f"{name} is cut"] = {**tensors, name: tensor[:-1]}
        number = tensor.is_floating_point()
        if not name.endswith("zero_point") or tensor.numel() > 1:
            found[f"{name} is of another dtype"] = {
                **tensors,
                name: tensor.to(torch.int16 if number else torch.float32),
            }
        if number:
            found[f"{name} is NaN"] = {**tensors, name: tensor * torch.nan}
        if tensor.dim() == 2 and tensor.shape[0] != tensor.shape[1] and tensor.shape[1] > 1:
            found[f"{name} is transposed"] = {**tensors, name: tensor.t().contiguous()}
    return found


@pytest.mark.parametrize("exported", FORMATS, indirect=True)
def test_every_damage_is_told(exported: Path) -> None:
    file, x = exported / "model.safetensors", randn(4, 64)
    tensors = load_file(file)
    assert torch.isfinite(lq.import_quantized(exported, network())(x)).all()
    made = damages(tensors)
    assert len(made) > 8
    accepted = []
    for what, damaged in made.items():
        save_file(damaged, file)
        try:
            lq.import_quantized(exported, network())
            accepted.append(what)
        except lq.QuantizedFileError:
            pass
    assert not accepted


@pytest.mark.parametrize(
    ("exported", "change", "message"),
    [
        ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format='marlin' with bits=4 cannot be read"),
        ("gptq", {"group_size": 0}, "64 inputs, which group_size=0 does not divide"),
        ("gptq", {"group_size": 16}, r"qzeros of torch.int32 \[2, 12\] where the model and the config take"),
        ("awq", {"group_size": 48}, "64 inputs, which group_size=48 does not divide"),
        ("awq", {"bits": 8}, "with bits=8 cannot be read"),
    ],
    indirect=["exported"],
)
def test_another_config_is_told(exported: Path, change: dict, message: str) -> None:
    file = exported / "config.json"
    facts = json.loads(file.read_text())
    facts["quantization_config"] |= change
    file.write_text(json.dumps(facts))
    with pytest.raises(lq.QuantizedFileError, match=message):
        lq.import_quantized(exported, network())

"""``save_pretrained`` of a converted model would write a folder that loads with fresh weights: it is refused."""

import copy
import pickle

import pytest
import torch
from torch import nn

import lightning_qat as lq

transformers = pytest.importorskip("transformers")


def model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    return transformers.LlamaForCausalLM(config).eval()


def refused(part, folder):
    with pytest.raises(ValueError, match=r"lightning_qat\.export\(model, folder, format='gptq'\).*save_quantized"):
        part.save_pretrained(folder)
    assert not folder.exists()


def test_converted_models_refuse_and_float_ones_do_not(tmp_path):
    floating = model()
    whole = nn.ModuleDict({"net": floating})
    converted = lq.convert(lq.prepare(whole, "int8_weight_only"))["net"]
    for part in (converted, converted.model, copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))):
        refused(part, tmp_path / "folder")
    model().save_pretrained(tmp_path / "float")
    assert (tmp_path / "float" / "model.safetensors").is_file()


def test_loaded_models_refuse(tmp_path):
    made = lq.quantize_model(model(), "nf4")
    refused(made, tmp_path / "folder")
    lq.save_quantized(made, tmp_path / "quantized")
    refused(lq.load_quantized(tmp_path / "quantized", model()), tmp_path / "folder")


def test_exports_write_as_before(tmp_path):
    made = lq.quantize_model(model(), lq.QuantizationPlan([lq.LayerRule("*lm_head")], base="int8_weight_only"))
    lq.export(made, tmp_path / "exported", format="compressed_tensors")
    again = transformers.AutoConfig.from_pretrained(tmp_path / "exported")
    assert again.quantization_config["quant_method"] == "compressed-tensors"

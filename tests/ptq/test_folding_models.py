"""Where scales fold in the architectures of transformers, found without knowing any of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_qat.ptq.channels import shared_parameters
from lightning_qat.ptq.folding import find_folds
from lightning_qat.ptq.watch import find_shared_inputs

transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
TEXT = {**SIZES, "intermediate_size": 48, "vocab_size": 50}
GROUPED = {**TEXT, "num_key_value_heads": 2}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

#: What feeds each group of layers, by the last parts of their names; None where nothing takes a scale in.
EXPECTED = {
    ("LlamaConfig", "SmolLM2's"): {"v_proj": "input_layernorm", "o_proj": "v_proj", "down_proj": "up_proj"},
    ("GemmaConfig", "weights less 1"): {"v_proj": "input_layernorm", "o_proj": "v_proj", "down_proj": "up_proj"},
    ("Phi3Config", "fused"): {"qkv_proj": "input_layernorm", "o_proj": "qkv_proj", "down_proj": "gate_up_proj"},
    ("OPTConfig", "ReLU"): {"v_proj": "self_attn_layer_norm", "out_proj": "v_proj", "fc2": "fc1"},
    ("BertConfig", "norms behind"): {"value": None, "dense": "value", "intermediate.dense": None, "pooler.dense": None},
    ("ViTConfig", "GELU"): {"v_proj": "layernorm_before", "fc1": "layernorm_after", "fc2": None},
}
OPTIONS = {
    "LlamaConfig": GROUPED,
    "GemmaConfig": {**GROUPED, "head_dim": 8},
    "Phi3Config": {**GROUPED, **SPECIAL},
    "OPTConfig": {**TEXT, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "BertConfig": TEXT,
    "ViTConfig": {**SIZES, "intermediate_size": 48, "image_size": 16, "patch_size": 8},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("config", "what"), list(EXPECTED))
def test_sources_of_an_architecture(config: str, what: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(getattr(transformers, config)(**OPTIONS[config])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms that do something
                parameter += 0.2 * torch.randn_like(parameter)
    model = model.to(dtype)
    x = torch.randn(2, 3, 16, 16, dtype=dtype) if config == "ViTConfig" else torch.randint(3, 50, (2, 12))
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}

    def run() -> object:
        with torch.no_grad():
            return tuple(value for value in model(x).to_tuple() if isinstance(value, torch.Tensor))

    groups = [shared.layers for shared in find_shared_inputs(layers, run)]
    found = find_folds(model, layers, groups, run, untouchable=shared_parameters(model))
    sources = {fold.layers[-1]: fold.source.name if fold.source else None for fold in found}
    for end, expected in EXPECTED[config, what].items():
        (name,) = [name for name in sources if name.endswith(f".{end}") or name == end][:1]
        source = sources[name]
        assert (source is None) == (expected is None), (name, source)
        assert expected is None or source.endswith(expected)

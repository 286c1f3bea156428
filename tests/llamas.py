"""Tiny models of transformers with random weights, quantized, and what their files are compared with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_qat as lq

IDS = torch.randint(0, 96, (2, 16), generator=torch.Generator().manual_seed(1))


def llama(*, tie: bool = False, seed: int = 0, **changes: Any) -> Any:
    """Return a Llama of two blocks, hidden size 64."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    facts = dict(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        use_cache=False,
        tie_word_embeddings=tie,
        initializer_range=0.3,
    )
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**facts | changes)).eval()


def quantized_llama(
    weight: Any, activation: Any = None, *rules: lq.LayerRule, tie: bool = False, **changes: Any
) -> Any:
    """Return it converted, all Linears of the blocks quantized and the head in float."""
    model = llama(tie=tie)
    plan = lq.QuantizationPlan([lq.LayerRule(nn.Linear, weight, activation), lq.LayerRule("lm_head"), *rules])
    lq.prepare(model, plan)
    if activation is not None:
        lq.calibrate(model, [{"input_ids": IDS}])
    return lq.convert(model)


def quantized_bert(weight: Any, *, pooler: bool) -> Any:
    """Return a BERT of two blocks, hidden size 64, converted."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, vocab_size=99)
    rules = [lq.LayerRule(nn.Linear, weight), *([] if pooler else [lq.LayerRule("pooler.dense")])]
    model = transformers.BertModel(transformers.BertConfig(**sizes, initializer_range=0.2)).eval()
    return lq.convert(lq.prepare(model, lq.QuantizationPlan(rules)))


def layers_of(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if isinstance(module, lq.QuantizedLinear)}


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=IDS).logits.float()


def difference(a: Tensor, b: Tensor) -> float:
    """Return the relative difference."""
    return float((a - b).norm() / b.norm())


def assert_same_layers(found: nn.Module, expected: nn.Module, *, scale_dtype: torch.dtype = torch.float32) -> None:
    """Codes, zero points and formats are equal, and scales as ``scale_dtype`` rounds them."""
    ours, theirs = layers_of(expected), layers_of(found)
    assert ours.keys() == theirs.keys()
    assert ours
    for name, layer in ours.items():
        other = theirs[name]
        assert torch.equal(other.codes, layer.codes), name
        assert torch.equal(other.scale, layer.scale.to(scale_dtype).float()), name
        for buffer in ("weight_zero_point", "input_scale", "input_zero_point"):
            one, two = getattr(other, buffer, None), getattr(layer, buffer, None)
            assert one is two is None or torch.equal(one, two), (name, buffer)


def pretrained(path: Any, **options: Any) -> Any:
    """Return what transformers loads from a folder."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, **options).eval()

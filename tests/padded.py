"""Sentences of several lengths in one padded batch, and each of them alone: what padding must not change."""

from __future__ import annotations

from typing import Any

import torch
from llamas import llama
from torch import Tensor, nn

import lightning_qat as lq
from lightning_qat.transforms.padding import Padding

WORDS = 96


def sentences(*lengths: int, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, WORDS, (length,), generator=generator) for length in lengths]


def padded(parts: list[Tensor], *, left: bool = False, to: int = 0) -> dict[str, Tensor]:
    """Return one batch; with padding on the left also positions that do not count it."""
    length = max(to, *(len(part) for part in parts))
    ids = torch.zeros(len(parts), length, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, part in enumerate(parts):
        where = slice(length - len(part), length) if left else slice(0, len(part))
        ids[i, where], mask[i, where] = part, 1
    positions = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if left else {}
    return {"input_ids": ids, "attention_mask": mask, **positions}


def one_by_one(parts: list[Tensor]) -> list[dict[str, Tensor]]:
    return [padded([part]) for part in parts]


def tiny_llama(attention: str = "sdpa") -> Any:
    """Return a Llama, in float64 where all of it computes so: rounding is then beyond the float32 of statistics.

    Eager attention has its softmax in float32, where the least number of float64 is minus infinity.
    """
    model = llama(attn_implementation=attention)
    return model if attention == "eager" else model.double()


def tiny_bert(attention: str = "sdpa") -> Any:
    """Return a BERT, in float64 likewise."""
    import transformers

    torch.manual_seed(0)
    sizes = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, vocab_size=WORDS)
    config = transformers.BertConfig(**sizes, initializer_range=0.2, attn_implementation=attention)
    model = transformers.BertModel(config, add_pooling_layer=False).eval()
    return model if attention == "eager" else model.double()


def tiny_t5() -> Any:
    import transformers

    torch.manual_seed(0)
    sizes = dict(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=WORDS, decoder_start_token_id=0)
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)).eval()


def found_padding(model: nn.Module, *batches: Any) -> tuple[Padding, dict[str, str]]:
    """Return what looks at ``batches`` tell of ``model``, and the mask of each Linear where one is known."""
    padding = Padding(lq.prepare(model, "int8_weight_only"), lambda model, batch: model(**batch))
    padding.look_at(batches)
    return padding, {name: place.mask for name, place in padding._known.items() if name in padding._linears}


def linears(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}

"""A small decoder in the manner of GPT-2 (Radford et al., 2019), to be trained from nothing in minutes on one core."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SmallGPT(nn.Module):
    """Token ids ``[batch, length]`` to logits ``[batch, length, vocabulary]``; each token sees those before it.

    LayerNorm comes before attention and before the feed-forward part, positions are learned, the head has a weight of
    its own, and there is no dropout. 0.88 million parameters as it is.

    Args:
        vocabulary: number of tokens; 256 are the bytes of a text.
        layers: number of blocks.
        features: of a token in the blocks.
        heads: of the attention; they divide ``features``.
        context: the longest length.
    """

    def __init__(
        self, vocabulary: int = 256, layers: int = 4, features: int = 128, heads: int = 4, context: int = 128
    ) -> None:
        super().__init__()
        sizes = {"vocabulary": vocabulary, "layers": layers, "features": features, "heads": heads, "context": context}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name}={value!r} is not allowed; use an integer of 1 or more")
        if features % heads:
            raise ValueError(f"heads={heads!r} must divide features={features!r}")
        self.context = context
        self.tokens = nn.Embedding(vocabulary, features)
        self.positions = nn.Embedding(context, features)
        self.blocks = nn.ModuleList(_Block(features, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(features)
        self.head = nn.Linear(features, vocabulary, bias=False)
        self._initialize(layers)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the logits of the next token at each place."""
        length = ids.shape[-1]
        if length > self.context:
            raise ValueError(f"a length of {length} is more than context={self.context}")
        x = self.tokens(ids) + self.positions(torch.arange(length, device=ids.device))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits

    def _initialize(self, layers: int) -> None:
        """As GPT-2: deviation 0.02, and less where a block adds to what is there."""
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                adds = name.endswith(("attention.out", "contract"))
                nn.init.normal_(module.weight, std=0.02 / math.sqrt(2 * layers) if adds else 0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)


class _Attention(nn.Module):
    def __init__(self, features: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.inputs = nn.Linear(features, 3 * features)
        self.out = nn.Linear(features, features)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, features = x.shape
        query, key, value = self.inputs(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        y: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, length, features))
        return y


class _Block(nn.Module):
    def __init__(self, features: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(features)
        self.attention = _Attention(features, heads)
        self.norm = nn.LayerNorm(features)
        self.expand = nn.Linear(features, 4 * features)
        self.contract = nn.Linear(4 * features, features)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        y: Tensor = x + self.contract(F.gelu(self.expand(self.norm(x))))
        return y

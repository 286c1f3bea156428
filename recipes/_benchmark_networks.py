"""The networks that ``lightning-qat benchmark`` measures with."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

#: Of the convolutional network.
CHANNELS = (3, 32, 32, 64, 64, 128, 128)


def convolutional_network() -> nn.Sequential:
    """Return Conv-BN-ReLU six times, pooling and a classifier of ten classes; images are ``[N, 3, 32, 32]``."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(CHANNELS):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(CHANNELS[-1], 10))


#: Of the transformer: blocks, features, heads, tokens of a sequence.
BLOCKS, FEATURES, HEADS, TOKENS = 4, 256, 4, 128


class TransformerBlock(nn.Module):
    """Causal attention and a feed-forward network, normalized before, ``[N, tokens, features]``."""

    def __init__(self, features: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_forward = nn.LayerNorm(features), nn.LayerNorm(features)
        self.qkv, self.out = nn.Linear(features, 3 * features), nn.Linear(features, features)
        self.up, self.down = nn.Linear(features, 4 * features), nn.Linear(4 * features, features)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, features = x.shape
        qkv = self.qkv(self.norm_attention(x)).view(n, tokens, 3, self.heads, features // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(n, tokens, features))
        result: Tensor = x + self.down(F.gelu(self.up(self.norm_forward(x))))
        return result


def transformer_network() -> nn.Sequential:
    """Return four blocks, flattening and a classifier of ten classes; inputs are ``[N, 128, 256]``."""
    torch.manual_seed(0)
    blocks = [TransformerBlock(FEATURES, HEADS) for _ in range(BLOCKS)]
    return nn.Sequential(*blocks, nn.AvgPool2d((TOKENS, 1)), nn.Flatten(), nn.Linear(FEATURES, 10))

"""Models of Linears for the tests of dynamic quantization, and which of their layers hold codes."""

from __future__ import annotations

import itertools

import torch
from torch import nn

from lightning_qat.nn import QuantizedLayer


class Network(nn.Module):
    """A body of two Linears, a recurrent layer, a convolution and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.body = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        self.rnn = nn.LSTM(8, 8, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.body(self.conv(x.transpose(1, 2)).transpose(1, 2))
        return self.head(self.rnn(x)[0])


def network() -> Network:
    torch.manual_seed(0)
    return Network()


def linears(*sizes: int) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for i, o in itertools.pairwise(sizes):
        layers += [nn.Linear(i, o), nn.GELU()]
    return nn.Sequential(*layers[:-1])


def quantized(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, QuantizedLayer)]

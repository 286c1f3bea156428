"""Which layers feed one other layer alone, seen on a real forward."""

import pytest
import torch
from tensors import randn
from torch import nn
from torch.nn import functional as F

import lightning_qat as lq


class Reading(nn.Module):
    def __init__(self, read):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.norm, self.read = nn.BatchNorm2d(4), read

    def forward(self, x):
        return self.read(self, self.a(x))


READERS = {
    "one": (lambda m, y: m.b(y), True),
    "one, twice": (lambda m, y: m.b(y) + m.b(torch.relu(y)), True),
    "two": (lambda m, y: m.b(y) + m.c(y), False),
    "two, one after a relu": (lambda m, y: m.b(y) + m.c(torch.relu(y)), False),
    "a residual addition": (lambda m, y: m.b(y) + y, False),
    "relu read twice": (lambda m, y: (lambda r: m.b(r) + r.mean())(torch.relu(y)), False),
    "the caller": (lambda m, y: (m.b(y), y), False),
    "the caller, after a relu": (lambda m, y: (lambda r: {"b": m.b(r), "r": [r]})(torch.relu(y)), False),
    "nobody": (lambda m, y: m.b(y.new_zeros(1, 4, 3, 3)), False),
    "its shape": (lambda m, y: m.b(y) * y.shape[0] * y.dim(), True),
    "folded BatchNorm": (lambda m, y: m.b(torch.relu(m.norm(y))), True),
    "BatchNorm that stays": (lambda m, y: m.b(m.norm(torch.relu(y))), False),
    "sigmoid": (lambda m, y: m.b(torch.sigmoid(y)), False),
    "silu": (lambda m, y: m.b(F.silu(y)), False),
    "pool with indices": (lambda m, y: m.b(F.max_pool2d(y, 1, return_indices=True)[0]), False),
}


@pytest.mark.parametrize("case", READERS)
def test_one_reader_is_seen_on_a_real_forward(case):
    read, expected = READERS[case]
    x = randn(2, 3, 5, 5)
    model = Reading(read)
    lq.calibrate(lq.prepare(model, "int8"), [x])
    assert model.a.weight_quantizer.feeds_one_layer is expected
    reloaded = Reading(read)
    lq.prepare(reloaded, "int8").load_state_dict(model.state_dict())
    assert reloaded.a.weight_quantizer.feeds_one_layer is expected

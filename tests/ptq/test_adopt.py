"""Taking on chosen codes leaves the model that the user gave alone."""

import copy

import pytest
import torch
from torch import nn

import lightning_qat as lq


class Skips(nn.Module):
    """Holds layers that its forward never calls."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.attention, self.rnn, self.head = nn.MultiheadAttention(8, 2), nn.LSTM(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.head(x)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_weights_of_layers_that_no_batch_reaches_are_not_the_users(method):
    model = Skips().eval()
    before = copy.deepcopy(model.state_dict())
    plan = lq.QuantizationPlan([lq.LayerRule("rnn", "w4a8")], base="int8_weight_only")
    result = lq.quantize_model(model, plan, [torch.randn(16, 8)], method=method)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert result.attention.q_proj.weight_format.bits == 8
    assert result.rnn.ih_l0.weight_format.bits == 4

"""Layers whose weight is multiplied by code that never calls them: attention pools of CLIP, BEiT and EVA of timm."""

import pytest
import torch
from tensors import randn
from torch import nn
from torch.nn import functional as F

import lightning_qat as lq
from lightning_qat.transforms.certificate import ParityReport


class Reading(nn.Module):
    def __init__(self, read):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.kept = nn.Embedding(5, 8)
        self.read = read

    def forward(self, x):
        return self.read(self, self.a(x))


def attends(model, y):
    """As CLIP's AttentionPool2d does."""
    return F.multi_head_attention_forward(
        *(y.unsqueeze(1), y.unsqueeze(1), y.unsqueeze(1), 8, 2, None, model.b.bias.repeat(3), None, None, False, 0.0),
        *(model.b.weight, None),
        use_separate_proj_weight=True,
        **dict.fromkeys(("q_proj_weight", "k_proj_weight", "v_proj_weight"), model.b.weight),
    )[0]


READS = {
    "linear": lambda m, y: F.linear(y, m.b.weight, m.b.bias),
    "linear, and called": lambda m, y: F.linear(m.b(y), m.b.weight.t()),
    "matmul": lambda m, y: y @ m.b.weight.t(),
    "einsum": lambda m, y: torch.einsum("bi,oi->bo", y, m.b.weight),
    "joined": lambda m, y: F.linear(y, torch.cat([m.b.weight, m.b.weight])),
    "scaled": lambda m, y: F.linear(y, m.b.weight * 2),
    "attention": attends,
    "a mask": lambda m, y: F.scaled_dot_product_attention(*(y.view(1, 1, 4, 8),) * 3, attn_mask=m.b.weight[:4, :4]),
    "a table": lambda m, y: y + m.b.weight[(y > 0).long().sum(1) % 8],
}
HARMLESS = {
    "called": lambda m, y: m.b(y),
    "its dtype and shape": lambda m, y: m.b(y.to(m.b.weight.dtype)) * m.b.weight.shape[0],
    "a penalty": lambda m, y: (m.b(y), m.b.weight.square().sum() + y.sum()),
    "a part of it": lambda m, y: (m.b(y), m.b.weight[0].abs().sum()),
    "orthogonality": lambda m, y: (m.b(y), (m.b.weight @ m.b.weight.t()).sum()),
}


@pytest.mark.parametrize("case", READS)
def test_the_gate_refuses_a_weight_that_trained_in_float(case):
    torch.manual_seed(0)
    x, model = randn(4, 8), Reading(READS[case])
    lq.prepare(model, "int8_weight_only")
    with pytest.raises(lq.ParityError, match=r"weight of layer 'b' .*LayerRule\('b'\)") as caught:
        lq.convert(model.eval(), verify=[x])
    report = caught.value.report
    assert ParityReport.from_dict(report.to_dict()) == report
    way_out = Reading(READS[case])
    lq.prepare(way_out, lq.QuantizationPlan([lq.LayerRule("b")], base="int8_weight_only"))
    lq.convert(way_out.eval(), verify=[x])


@pytest.mark.parametrize("case", HARMLESS)
def test_the_gate_passes_weights_that_only_their_layer_multiplies(case):
    model = Reading(HARMLESS[case])
    lq.prepare(model, "int8_weight_only")
    lq.convert(model.eval(), verify=[randn(4, 8)])


def test_the_gate_passes_a_weight_that_a_float_layer_multiplies():
    model = Reading(lambda m, y: m.b(y + m.kept(torch.tensor([1]))))
    model.b = nn.Linear(8, 5)
    model.b.weight = model.kept.weight
    lq.prepare(model, "int8_weight_only")
    lq.convert(model.eval(), verify=[randn(4, 8)])


def test_rules_that_leave_all_of_them_in_float_are_named():
    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(8, 8)
            self.blocks = nn.ModuleList(Reading(READS["linear"]) for _ in range(12))

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return F.linear(self.head(x), self.head.weight)

    model = lq.prepare(Stack(), "int8_weight_only")
    with pytest.raises(lq.ParityError, match=r"12 more.*LayerRule\('head'\), LayerRule\('blocks\.\*\.b'\)$"):
        lq.convert(model.eval(), verify=[randn(4, 8)])

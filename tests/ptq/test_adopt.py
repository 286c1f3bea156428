"""Taking on chosen codes leaves the model that the user gave alone."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, weight_norm

import lightning_qat as lq
from lightning_qat.ptq.adopt import adopt
from lightning_qat.ptq.chosen import ChosenCodes


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("convert", [True, False])
def test_codes_of_which_the_dtype_does_not_tell_the_values(dtype, convert):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 64)).to(dtype), torch.randn(100, 64).to(dtype)
    model[0].weight.data += 0.3
    config = lq.QuantizationConfig("int8", symmetric=False, per_channel=True)
    made = lq.quantize_model(model, config, [x], "gptq", convert=convert)
    (outcome,) = lq.ptq_report(made).layers
    assert bool(outcome.notes) == (dtype == torch.bfloat16)
    if not convert:
        layer = made[0]
        assert torch.equal(layer.quantized_weight(), layer.weight)
        return
    assert lq.sqnr(model.double()(x.double()), made(x).double()) > 45


def test_codes_that_do_not_come_back_are_told():
    layer = lq.prepare(nn.Linear(64, 8).to(torch.bfloat16), lq.QuantizationConfig("int4"))
    codes = torch.full((8, 64), 20, dtype=torch.int8)  # no code of 4 bits
    chosen = ChosenCodes(codes, torch.tensor(0.1), None, layer.weight_quantizer.format, 0.0, 0.0)
    with pytest.raises(ValueError, match="codes of layer 'fc' do not come back from their values in torch.bfloat16"):
        adopt("fc", layer, chosen)


MAKES = {
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "weight norm": parametrizations.weight_norm,
    "older weight norm": weight_norm,
    "spectral norm": parametrizations.spectral_norm,
}


@pytest.mark.parametrize("method", ["gptq", "awq", "clip"])
@pytest.mark.parametrize("make", MAKES)
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_a_weight_that_is_computed_is_rounded_to_nearest(make, method, tmp_path):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(50, 16)
    MAKES[make](model[1])
    model.eval()
    before = copy.deepcopy(model.state_dict())
    config = lq.QuantizationConfig("int4", group_size=8)
    made = lq.quantize_model(model, config, [x], method, journal=tmp_path / "journal")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    nearest = lq.quantize_model(model, config)
    assert torch.equal(made[1].codes, nearest[1].codes)
    assert not torch.equal(made[3].codes, nearest[3].codes)
    outcome = lq.ptq_report(made).layer("1")
    assert (outcome.method, outcome.loss) == ("rtn", None)
    assert outcome.notes[0].startswith("its weight is computed (pruned")
    assert [task.method for task in lq.preflight(model, config, method) if task.name == "1"] == ["rtn"]
    again = lq.quantize_model(model, config, [x], method, journal=tmp_path / "journal")
    assert torch.equal(made(x), again(x))
    if make == "pruned":
        assert (made[1].weight == 0).float().mean() >= 0.5
        trains_on = lq.quantize_model(model, config, [x], method, convert=False)
        assert prune.is_pruned(trains_on[1])

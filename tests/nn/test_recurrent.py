"""LSTM, GRU, RNN and their cells: PyTorch's own forward with fake-quantized weights, and with packed ones."""

import copy
import pickle

import lightning as L
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.rnn import pack_padded_sequence

import lightning_qat as lq
from lightning_qat.nn import recurrent
from lightning_qat.nn.recurrent import QuantizedRecurrentWeight, RecurrentWeight, can_be_split, merge, split
from lightning_qat.ptq import measure_sensitivity
from lightning_qat.testing import assert_resume_exact
from lightning_qat.transforms.oscillation import codes_now
from lightning_qat.transforms.prepare import qat_layers

KINDS = {
    "lstm": (nn.LSTM, {}),
    "deep lstm": (nn.LSTM, {"num_layers": 2, "bidirectional": True, "dropout": 0.5, "batch_first": True}),
    "projected lstm": (nn.LSTM, {"proj_size": 3, "num_layers": 2}),
    "gru": (nn.GRU, {"bias": False}),
    "deep gru": (nn.GRU, {"num_layers": 2, "bidirectional": True}),
    "rnn": (nn.RNN, {"nonlinearity": "relu"}),
    "lstm cell": (nn.LSTMCell, {}),
    "gru cell": (nn.GRUCell, {"bias": False}),
    "rnn cell": (nn.RNNCell, {}),
}
every_kind = pytest.mark.parametrize("kind", KINDS)
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


def layer_of(kind, seed=0):
    torch.manual_seed(seed)
    kind, options = KINDS[kind]
    return kind(5, 8, **options)


def input_of(kind, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((4, 5) if "cell" in kind else (6, 4, 5), generator=generator)


def leaves(tree):
    return [tree] if isinstance(tree, torch.Tensor) else [leaf for branch in tree for leaf in leaves(branch)]


def prepared(kind, bits=8, **options):
    model = nn.ModuleDict({"rnn": layer_of(kind)})
    config = lq.QuantizationConfig("int8", bits=bits, per_channel=True, **options)
    return lq.prepare(model, lq.QuantizationPlan([lq.LayerRule("rnn", config)]))


def call(model, x):
    return model["rnn"](x)


@every_kind
def test_the_outputs_and_gradients_are_those_of_fake_quantized_weights(kind):
    """The witness: PyTorch's layer with ``fake_quantize`` of its weights in place of them, by functional_call."""
    model, x = prepared(kind, 4).eval(), input_of(kind)
    plain = layer_of(kind).eval()
    parameters = {name: p.detach().clone().requires_grad_() for name, p in plain.named_parameters()}
    weights = dict(parameters)
    for name, layer in qat_layers(model):
        quantizer, key = layer.weight_quantizer, f"weight_{name.split('.')[1]}"
        scale = quantizer.parameters_for(layer.weight)[0]
        weights[key] = lq.fake_quantize(parameters[key], scale.detach(), bits=4, axis=0)
    assert sum("weight" in key for key in weights) == sum(1 for _ in qat_layers(model))
    expected = leaves(torch.func.functional_call(plain, weights, (x,)))
    actual = leaves(call(model, x))
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)
    sum(t.square().sum() for t in actual).backward()
    sum(t.square().sum() for t in expected).backward()
    for name, parameter in model["rnn"].named_parameters():
        torch.testing.assert_close(parameter.grad, parameters[name].grad, rtol=1e-5, atol=1e-6)


@every_kind
def test_sixteen_bits_are_float_and_a_float_phase_is_float_in_every_bit(kind):
    model, x = prepared(kind, 16), input_of(kind)
    plain = layer_of(kind)
    for mode in (False, True):
        model.train(mode), plain.train(mode)
        torch.manual_seed(3)  # of the dropout
        expected = leaves(plain(x))
        lq.apply_phase(model, lq.Phase())
        torch.manual_seed(3)
        for a, b in zip(leaves(call(model, x)), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        lq.apply_phase(model, lq.Phase(quantizing=False))
        torch.manual_seed(3)
        for a, b in zip(leaves(call(model, x)), expected, strict=True):
            assert torch.equal(a, b)


@every_kind
@pytest.mark.parametrize("bits", [8, 4])
def test_the_converted_layer_has_the_codes_and_the_outputs_of_the_trained_one(kind, bits, tmp_path):
    model, x = prepared(kind, bits).eval(), input_of(kind)
    converted = lq.convert(model, verify=[x], forward=call)
    assert type(converted["rnn"]).__name__ == f"Quantized{type(layer_of(kind)).__name__}"
    for name, layer in qat_layers(model):
        other = converted.get_submodule(name)
        assert torch.equal(other.codes, codes_now(layer))
        assert not any(p is not None and "weight" in n for n, p in converted["rnn"]._parameters.items())
    expected = leaves(call(model, x))
    for a, b in zip(leaves(call(converted, x)), expected, strict=True):
        assert torch.equal(a, b)
    lq.save_quantized(converted, tmp_path / "m")
    loaded = lq.load_quantized(tmp_path / "m", nn.ModuleDict({"rnn": layer_of(kind, seed=9)}))
    for a, b in zip(leaves(call(loaded, x)), expected, strict=True):
        assert torch.equal(a, b)
    assert loaded.state_dict().keys() == converted.state_dict().keys()
    before = {key: value.clone() for key, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    call(model.train(), x)  # the trained one is whole
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())


@every_kind
def test_float_checkpoints_load_and_come_back(kind):
    model, other = prepared(kind), layer_of(kind, seed=7)
    names = {name for name, _ in other.named_parameters()}
    assert {name for name, _ in model["rnn"].named_parameters()} == names
    model["rnn"].load_state_dict(other.state_dict(), strict=True)
    assert torch.equal(next(model["rnn"].children()).weight, next(iter(other.parameters())))
    layer_of(kind).load_state_dict(lq.float_state_dict(model["rnn"].state_dict()), strict=True)
    prepared(kind).load_state_dict(model.state_dict(), strict=True)
    merge(model["rnn"])
    assert type(model["rnn"]) is type(other)
    assert model["rnn"].state_dict().keys() == other.state_dict().keys()
    x = input_of(kind)
    for a, b in zip(leaves(call(model.eval(), x)), leaves(other.eval()(x)), strict=True):
        assert torch.equal(a, b)


@settings(deadline=None, max_examples=15)
@given(
    st.sampled_from([nn.LSTM, nn.GRU]),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(1, 2),
    st.booleans(),
    st.booleans(),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    st.booleans(),
)
def test_shapes_and_dtypes(kind, inputs, hidden, layers, bias, both, dtype, batched):
    torch.manual_seed(0)
    options = {"num_layers": layers, "bias": bias, "bidirectional": both}
    model = nn.ModuleDict({"rnn": kind(inputs, hidden, **options).to(dtype)})
    lq.prepare(model, lq.QuantizationPlan([lq.LayerRule(kind, "int8")]))
    x = torch.randn(3, 2, inputs).transpose(0, 1)[:, :1] if batched else torch.randn(3, inputs)
    x = x.to(dtype)
    state = torch.randn(layers * (1 + both), *([1] if batched else []), hidden, dtype=dtype)
    hx = (state, state * 0.5) if kind is nn.LSTM else state
    output = model["rnn"](x, hx)
    output[0].float().sum().backward()
    assert output[0].dtype is dtype
    converted = lq.convert(model.eval())
    with torch.no_grad():  # PyTorch's kernels for gradients, which converted weights have none of, round otherwise
        trained, shipped = leaves(model["rnn"](x, hx)), leaves(converted["rnn"](x, hx))
    for a, b in zip(trained, shipped, strict=True):
        assert torch.equal(a, b)


def test_packed_sequences_and_half_precision_after_conversion():
    model = prepared("deep lstm")
    x = torch.randn(3, 6, 5)
    packed = pack_padded_sequence(x, torch.tensor([6, 2, 4]), batch_first=True, enforce_sorted=False)
    trained = model.eval()["rnn"](packed)
    converted = lq.convert(model)
    shipped = converted["rnn"](packed)
    assert torch.equal(trained[0].data, shipped[0].data)
    half = converted.to(torch.bfloat16)
    assert half["rnn"](x.bfloat16())[0].dtype is torch.bfloat16
    assert half["rnn"].ih_l0.weight_scale.dtype is torch.float32


def test_copies_and_pickles_are_whole():
    model, x = prepared("deep gru").eval(), input_of("deep gru")
    for each in (model, lq.convert(model)):
        for twin in (copy.deepcopy(each), pickle.loads(pickle.dumps(each))):
            assert torch.equal(twin["rnn"](x)[0], each["rnn"](x)[0])
            assert twin["rnn"].ih_l0.owner is twin["rnn"]
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin["rnn"].weight_ih_l0.zero_()
    assert not twin["rnn"].ih_l0.weight.any()
    assert model["rnn"].ih_l0.weight.any()


@pytest.mark.parametrize("kind", ["lstm", "gru cell"])
def test_a_layer_by_itself(kind):
    layer, x = layer_of(kind), input_of(kind)
    made = {"lstm": lq.QATLSTM, "gru cell": lq.nn.QATGRUCell}[kind](layer, "w4a8")
    assert type(layer).__name__ in ("LSTM", "GRUCell")
    assert {child.weight_quantizer.bits for child in made.children()} == {4}
    assert next(made.children()).weight is next(iter(layer.parameters()))
    expected = leaves(layer(x))
    lq.apply_phase(made, lq.Phase(quantizing=False))
    assert all(torch.equal(a, b) for a, b in zip(leaves(made(x)), expected, strict=True))
    for wrong in (made, nn.Linear(2, 2), nn.RNN(2, 2)):
        with pytest.raises(ValueError, match=r"is made from an nn\.(LSTM|GRUCell) that holds its weights"):
            type(made)(wrong)


# --- which are quantized --------------------------------------------------------------------------


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.rnn = nn.Embedding(20, 8), nn.LSTM(8, 8, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens):
        return self.head(self.rnn(self.embed(tokens))[0])


def names_of(plan):
    return [name for name, _ in qat_layers(lq.prepare(Tagger(), plan))]


def test_rules_reach_recurrent_layers_and_a_base_does_not():
    assert names_of("int8") == ["head"]
    for match in ("rnn", nn.LSTM, "rnn.*"):
        plan = lq.QuantizationPlan([lq.LayerRule(match, "int8", "int8")], base="int8")
        assert names_of(plan) == ["rnn.ih_l0", "rnn.hh_l0", "head"]
    assert names_of(lq.QuantizationPlan([lq.LayerRule("rnn.hh_*", "w4a8")])) == ["rnn.hh_l0"]
    plan = lq.QuantizationPlan([lq.LayerRule("rnn", "int8"), lq.LayerRule("rnn.ih_*")], base="int8")
    assert names_of(plan) == ["rnn.hh_l0", "head"]
    with pytest.raises(ValueError, match="match=GRU matches no layer"):
        names_of(lq.QuantizationPlan([lq.LayerRule(nn.GRU, "int8")]))
    model = Tagger()
    lq.prepare(model, "int8")
    assert type(model.rnn) is nn.LSTM  # nothing of it is prepared
    with pytest.raises(ValueError, match="group_size must divide"):
        lq.prepare(Tagger(), lq.QuantizationPlan([lq.LayerRule("rnn", lq.QuantizationConfig(group_size=3))]))


def test_a_part_that_stays_in_float_converts_saves_and_loads(tmp_path):
    model = lq.prepare(Tagger(), lq.QuantizationPlan([lq.LayerRule("rnn.hh_*", "w4a8")])).eval()
    tokens = torch.arange(12).view(2, 6)
    converted = lq.convert(model, verify=[tokens])
    assert torch.equal(converted(tokens), model(tokens))
    assert type(converted.rnn.ih_l0) is RecurrentWeight
    assert converted.rnn.weight_ih_l0 is not None
    lq.save_quantized(converted, tmp_path / "m")
    loaded = lq.load_quantized(tmp_path / "m", Tagger())
    assert torch.equal(loaded(tokens), model(tokens))
    assert loaded.state_dict().keys() == converted.state_dict().keys()


@pytest.mark.parametrize("wrong", [nn.GRU(8, 8, batch_first=True), nn.LSTM(8, 9), nn.Identity(), None])
def test_another_model_is_refused_and_stays_as_it_is(tmp_path, wrong):
    converted = lq.convert(lq.prepare(Tagger(), lq.QuantizationPlan([lq.LayerRule("rnn", "int8")])).eval())
    lq.save_quantized(converted, tmp_path / "m")
    model = Tagger()
    model.rnn = wrong
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(lq.QuantizedFileError, match="build the same model"):
        lq.load_quantized(tmp_path / "m", model)
    assert type(model.rnn) is type(wrong)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_what_computes_its_weights_or_has_a_forward_of_its_own_stays_in_float():
    class Mine(nn.LSTM):
        def forward(self, x):
            return super().forward(x)[0]

    pruned, normed = nn.LSTM(4, 4), nn.GRU(4, 4)
    prune.l1_unstructured(pruned, "weight_hh_l0", 0.5)
    parametrizations.weight_norm(normed, "weight_ih_l0")
    for module in (Mine(4, 4), pruned, normed, nn.Linear(4, 4), prepared("lstm")["rnn"]):
        assert not can_be_split(module)
    model = nn.Sequential(nn.Linear(4, 4), pruned)
    lq.prepare(model, "int8")
    assert type(model[1]) is nn.LSTM


def test_what_works_on_prepared_layers_works_on_the_weights():
    plan = lq.QuantizationPlan([lq.LayerRule("rnn", "int8")], base="int8_weight_only")
    tokens = torch.randint(0, 20, (4, 6))
    losses = measure_sensitivity(Tagger(), [tokens], plan, bits=(2, 8))
    assert [each.name for each in losses] == ["rnn.ih_l0", "rnn.hh_l0", "head"]
    assert all(each.loss[2] > each.loss[8] > 0 for each in losses)
    model = lq.prepare(Tagger(), plan)
    lq.set_bits(model, 4, "rnn.*")
    assert {layer.weight_quantizer.bits for _, layer in qat_layers(model)} == {4, 8}
    assert float(lq.quantization_penalty(model)) > 0
    statistics = lq.quantization_statistics(lq.convert(model.eval()), Tagger())
    assert statistics["rnn.hh_l0"].bits == 4
    assert 12 < statistics["rnn.hh_l0"].sqnr_db < 25
    assert statistics["rnn.hh_l0"].execution.startswith("reference: weight-only")


def test_quantize_dynamic_as_torch_users_know_it():
    model, tokens = Tagger().eval(), torch.arange(12).view(2, 6)
    for inplace in (False, True):
        given = copy.deepcopy(model)
        bias = given.rnn.bias_hh_l0
        result = lq.quantize_dynamic(given, {nn.LSTM, nn.Linear}, dtype=torch.qint8, inplace=inplace)
        assert [n for n, m in result.named_modules() if isinstance(m, lq.nn.QuantizedLayer)] == [
            "rnn.ih_l0", "rnn.hh_l0", "head",
        ]  # fmt: skip
        assert (result.rnn is given.rnn) is inplace
        assert (result.rnn.bias_hh_l0 is bias) is inplace
        assert result.rnn.ih_l0.owner is result.rnn
        assert isinstance(result.rnn.ih_l0, QuantizedRecurrentWeight)
        assert lq.sqnr(model(tokens), result(tokens)) > 30
        assert torch.equal(copy.deepcopy(result)(tokens), result(tokens))


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_post_training_quantization_leaves_the_float_model_alone(method):
    model, tokens = Tagger().eval(), torch.arange(12).view(2, 6)
    before = copy.deepcopy(model.state_dict())
    plan = lq.QuantizationPlan([lq.LayerRule("rnn", "w4a8")], base="int8_weight_only")
    result = lq.quantize_model(model, plan, [tokens], method=method)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert result.rnn.ih_l0.weight_format.bits == 4
    assert lq.sqnr(model(tokens), result(tokens)) > 10


class Module(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = Tagger()

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self.model(batch[0]).flatten(0, 1), batch[0].flatten() % 3)
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.02)


@pytest.mark.parametrize("learned", [False, True])
def test_training_learns_and_ships_what_trained(tmp_path, learned):
    torch.manual_seed(0)
    tokens = torch.randint(0, 20, (64, 6))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(tokens), 16)
    config = lq.QuantizationConfig("int8", bits=4, per_channel=True, learnable=learned)
    plan = lq.QuantizationPlan([lq.LayerRule("model.rnn", config)], base="int8")
    qat = lq.QuantizationAwareTraining(plan, calibration_batches=2)
    trainer = L.Trainer(max_epochs=6, callbacks=[qat, lq.WeightOscillation()], logger=False, accelerator="cpu",
                        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
                        accumulate_grad_batches=2, default_root_dir=tmp_path)  # fmt: skip
    module = Module()
    trainer.fit(module, loader)
    assert float(trainer.callback_metrics["train/loss"]) < 1.0
    converted = lq.convert(module.eval())
    assert lq.sqnr(module.model(tokens), converted.model(tokens)) > 60
    assert torch.equal(converted.model.rnn.hh_l0.codes, codes_now(module.model.rnn.hh_l0))
    if learned:
        assert len(trainer.optimizers[0].param_groups[1]["params"]) == 2


def test_a_run_interrupted_at_an_epochs_end_ends_in_the_same_bits(tmp_path):
    tokens = torch.randint(0, 20, (32, 6), generator=torch.Generator().manual_seed(0))

    def loader():
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(tokens), 16)

    def callbacks():
        config = lq.QuantizationConfig("int8", bits=4, per_channel=True, learnable=True)
        plan = lq.QuantizationPlan([lq.LayerRule("model.rnn", config)], base="int8_weight_only")
        return [lq.QuantizationAwareTraining(plan, start_step=1, freeze_step=5, certify=False)]

    assert_resume_exact(Module, loader, callbacks, [2, 4], folder=tmp_path, witness=False, max_epochs=3)


def test_splitting_by_hand_is_undone():
    layer = layer_of("gru")
    split(layer)
    assert [name for name, _ in layer.named_children()] == ["ih_l0", "hh_l0"]
    assert recurrent.float_recurrent(layer) is nn.GRU
    merge(layer)
    assert type(layer) is nn.GRU
    assert not list(layer.children())

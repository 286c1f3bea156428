"""Attention in whole models: encoders and decoders, plans, training in Lightning, conversion, files."""

import copy
import logging

import lightning as L
import pytest
import torch
from classifier import trainer
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune
from torch.utils.data import DataLoader, TensorDataset

import lightning_qat as lq
from lightning_qat.nn.attention import PROJECTIONS
from lightning_qat.testing import assert_compile_fullgraph, assert_rank_equal, assert_resume_exact
from lightning_qat.transforms.phase import float_forward, restore_bits

FEATURES, WORDS, LENGTH = 16, 8, 6


def encoder(layers=2, **options):
    layer = nn.TransformerEncoderLayer(FEATURES, 2, 32, dropout=0.0, batch_first=True, **options)
    return nn.TransformerEncoder(layer, layers)


def tokens(samples=64, seed=0):
    """Is the first word there a second time? Only attention can tell."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(1, WORDS, (samples, LENGTH), generator=generator)
    x[::2, 1 + seed % 2] = x[::2, 0]
    return TensorDataset(x, (x[:, 1:] == x[:, :1]).any(1).long())


def batches():
    return DataLoader(tokens(), batch_size=8)


class Reader(L.LightningModule):
    """Embedding, encoder and head, unaware of quantization."""

    def __init__(self, lr=3e-3, dropout=0.0):
        super().__init__()
        self.lr = lr
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.words, self.places = nn.Embedding(WORDS, FEATURES), nn.Parameter(torch.randn(LENGTH, FEATURES) * 0.5)
            self.encoder, self.head = encoder(), nn.Linear(FEATURES, 2)
        for module in self.modules():
            if isinstance(module, nn.MultiheadAttention):
                module.dropout = dropout

    def forward(self, x):
        return self.head(self.encoder(self.words(x) + self.places)[:, 0])

    def training_step(self, batch, _):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, _):
        self.log("accuracy", (self(batch[0]).argmax(-1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.lr)


def attentions(model):
    return [module for module in model.modules() if isinstance(module, nn.MultiheadAttention)]


def test_a_plan_reaches_single_projections_and_whole_attentions():
    rules = [
        lq.LayerRule("layers.0.self_attn", "w4a8", "w4a8"),
        lq.LayerRule("*.v_proj", lq.QuantizationConfig("int8", bits=6, per_channel=True)),
        lq.LayerRule("layers.1.self_attn"),
        lq.LayerRule("layers.1.linear1"),
    ]
    model = lq.prepare(encoder(), lq.QuantizationPlan(rules, base="int8"))
    first, second = attentions(model)
    bits = {name: getattr(first, name).weight_quantizer.bits for name in PROJECTIONS}
    assert bits == {"q_proj": 4, "k_proj": 4, "v_proj": 6, "out_proj": 4}
    assert first.v_proj.input_quantizer is None
    assert type(second) is nn.MultiheadAttention
    by_type = lq.prepare(encoder(), lq.QuantizationPlan([lq.LayerRule(nn.MultiheadAttention, "w4a8")]))
    assert {name for name, m in by_type.named_modules() if hasattr(m, "weight_quantizer")} == {
        f"layers.{i}.self_attn.{name}" for i in range(2) for name in PROJECTIONS
    }
    x = torch.randn(2, 5, FEATURES)
    model(x).sum().backward()
    model.eval()
    assert lq.convert(model, verify=[x]) is not None


def test_a_projection_left_in_float_ships_in_float(tmp_path):
    torch.manual_seed(0)
    model = lq.prepare(encoder(1), lq.QuantizationPlan([lq.LayerRule("*.k_proj")], base="int8"))
    x = torch.randn(2, 5, FEATURES)
    lq.calibrate(model, [x])
    converted = lq.convert(model, verify=[x])
    assert type(attentions(converted)[0].k_proj) is nn.Linear
    lq.save_quantized(converted, tmp_path / "model")
    loaded = lq.load_quantized(tmp_path / "model", encoder(1))
    assert torch.equal(loaded(x), converted(x))
    with torch.no_grad():
        attentions(converted)[0].k_proj.weight[0, 0] += 1
    assert lq.check_parity(model, converted, [x]).changed_tensors == ("layers.0.self_attn.k_proj.weight",)


class Own(nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x)[0]


def test_what_computes_its_weights_otherwise_stays_in_float(caplog):
    model = nn.ModuleDict({"own": Own(8, 2), "head": nn.Linear(8, 8)})
    model["pruned"], model["normed"] = nn.MultiheadAttention(8, 2), nn.MultiheadAttention(8, 2)
    prune.l1_unstructured(model["pruned"], "in_proj_weight", 0.5)
    parametrize.register_parametrization(model["normed"], "in_proj_weight", nn.Tanh())
    types = {name: type(module) for name, module in model.items()}
    with caplog.at_level(logging.INFO, logger="lightning_qat"):
        lq.prepare(model, "int8_weight_only")
    assert {"own.out_proj", "pruned.out_proj", "normed.out_proj"} <= set(caplog.text.split("'"))
    assert {name: type(module) for name, module in model.items()} == types | {"head": lq.QATLinear}
    x = torch.randn(3, 2, 8)
    assert model["own"](x).shape == x.shape


def test_a_failure_leaves_the_attention_as_it_was():
    model = encoder(1)
    for plan in (lq.QuantizationPlan([lq.LayerRule("nothing", "int8")]), lq.QATConfig("int4", group_size=5)):
        with pytest.raises(ValueError, match="matches no layer|group_size"):
            lq.prepare(model, plan)
        assert type(attentions(model)[0]) is nn.MultiheadAttention
        assert list(attentions(model)[0]._modules) == ["out_proj"]
    lq.prepare(model, "int8")
    assert isinstance(attentions(model)[0], lq.QATMultiheadAttention)


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_an_encoder_evaluates_what_trained(norm_first, padded):
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="norm_first") if norm_first else torch.no_grad():
        model = encoder(norm_first=norm_first)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2]) if padded else None
    batch = {"src": torch.randn(2, 5, FEATURES), "src_key_padding_mask": mask}
    in_float = copy.deepcopy(model).eval()(**batch)
    lq.prepare(model, lq.QATConfig("int4", activation_bits=None))
    slow = model.train()(**batch).detach()  # with gradients there is no fast path
    with torch.no_grad():
        fast = model.eval()(**batch)
    keep = slice(None) if mask is None else ~mask
    torch.testing.assert_close(fast[keep], slow[keep], rtol=1e-5, atol=1e-5)
    assert (fast[keep] - in_float[keep]).abs().max() > 0.01
    converted = lq.convert(model, verify=[batch])
    with torch.no_grad():
        torch.testing.assert_close(converted(**batch)[keep], fast[keep], rtol=1e-4, atol=1e-4)


def test_encoder_and_decoder(tmp_path):
    def build():
        torch.manual_seed(0)
        return nn.Transformer(FEATURES, 2, 1, 2, 32, dropout=0.0, batch_first=True)

    model, float_model = lq.prepare(build(), "int8"), build()
    causal = nn.Transformer.generate_square_subsequent_mask(4)
    batch = {
        "src": torch.randn(3, 5, FEATURES),
        "tgt": torch.randn(3, 4, FEATURES),
        "tgt_mask": causal,
        "tgt_is_causal": True,
        "memory_key_padding_mask": torch.tensor([[False] * 3 + [True] * 2] * 3),
    }
    lq.apply_phase(model, lq.Phase(quantizing=False))
    assert torch.equal(model(**batch), float_model(**batch))
    lq.apply_phase(model, lq.Phase())
    assert len(attentions(model)) == 5
    for _ in range(2):
        model(**batch).square().mean().backward()
    cross = model.decoder.layers[0].multihead_attn
    assert [getattr(cross, name).input_quantizer.alone for name in PROJECTIONS[:3]] == [False, True, False]
    assert cross.q_proj.input_quantizer.scale != cross.k_proj.input_quantizer.scale
    model.eval()
    converted = lq.convert(model, verify=[batch])
    assert lq.parity_report(converted).passed
    assert all(parameter.dim() < 2 for parameter in converted.parameters())
    lq.save_quantized(converted, tmp_path / "model")
    fresh = build()
    loaded = lq.load_quantized(tmp_path / "model", fresh)
    with torch.no_grad():
        assert torch.equal(loaded(**batch), converted(**batch))
        assert lq.sqnr(model(**batch), loaded(**batch)) > 60
    assert len([m for m in loaded.modules() if isinstance(m, lq.QuantizedMultiheadAttention)]) == 5


def test_a_file_of_another_model_leaves_the_model_alone(tmp_path):
    model = lq.prepare(encoder(1), "int8_weight_only")
    lq.save_quantized(lq.convert(model), tmp_path / "model")
    for wrong, message in (
        (nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 32, batch_first=True), 1), "of shape"),
        (encoder(1, bias=False), "has no"),
        (
            nn.ModuleDict({"layers": nn.Linear(2, 2)}),
            "holds an nn.MultiheadAttention 'layers.0.self_attn', and .*nothing",
        ),
        (lq.prepare(encoder(1), "int8_weight_only"), "a QATMultiheadAttention there"),
    ):
        state, kinds = copy.deepcopy(wrong.state_dict()), [type(m) for m in wrong.modules()]
        with pytest.raises(lq.QuantizedFileError, match=message):
            lq.load_quantized(tmp_path / "model", wrong)
        assert [type(m) for m in wrong.modules()] == kinds
        assert wrong.state_dict().keys() == state.keys()
        assert all(torch.equal(a, state[k]) for k, a in wrong.state_dict().items() if isinstance(a, torch.Tensor))


def test_phases_bits_and_freezing_reach_every_projection():
    model = lq.prepare(encoder(1), "int8")
    x = torch.randn(2, 5, FEATURES)
    model(x)
    projections = [getattr(attentions(model)[0], name) for name in PROJECTIONS]
    lq.set_bits(model, 4)
    lq.set_bits(model, 5, activations=True)
    assert {p.weight_quantizer.bits for p in projections} == {4}
    assert {p.input_quantizer.bits for p in projections} == {5}
    quantized = model(x)
    with float_forward(model):
        assert not torch.equal(model(x), quantized)
    restore_bits(model)
    lq.apply_phase(model, lq.Phase(observing=False, frozen=True))
    scales = [p.weight_quantizer.scale.clone() for p in projections]
    ranges = [p.input_quantizer.scale.clone() for p in projections]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    model(x * 9)
    for p, scale, input_scale in zip(projections, scales, ranges, strict=True):
        assert torch.equal(p.weight_quantizer.parameters_for(p.weight)[0], scale)
        assert torch.equal(p.input_quantizer.scale, input_scale)
    lq.apply_phase(model, lq.Phase(weight_bits=2))
    assert all(p.weight_codes().unique().numel() <= 4 for p in projections)


def test_statistics_list_the_projections():
    torch.manual_seed(0)
    model = encoder(1)
    reference = copy.deepcopy(model)
    lq.prepare(model, "int8")
    lq.calibrate(model, [torch.randn(2, 5, FEATURES)])
    prepared, converted = lq.quantization_statistics(model), lq.convert(model)
    names = [f"layers.0.self_attn.{name}" for name in PROJECTIONS]
    assert list(prepared)[:4] == names
    for source in (reference, model):
        shipped = lq.quantization_statistics(converted, source)
        for name in names:
            assert shipped[name].sqnr_db == pytest.approx(prepared[name].sqnr_db, abs=1e-3)
            assert shipped[name].sqnr_db > 35
            assert torch.equal(shipped[name].input_scale, prepared[name].input_scale)


def test_quantize_model_leaves_the_model_as_it_is():
    torch.manual_seed(0)
    model, x = encoder(), torch.randn(4, 5, FEATURES)
    state = copy.deepcopy(model.state_dict())
    quantized = lq.quantize_model(model, "int8", [x], verify=True)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(type(module) is nn.MultiheadAttention for module in attentions(model))
    with torch.no_grad():
        assert lq.sqnr(model.eval()(x), quantized(x)) > 25
    assert lq.quantize_dynamic(model) is not model


def test_it_compiles_and_exports():
    torch.manual_seed(0)
    model, x = encoder(1), torch.randn(2, 5, FEATURES)
    assert_compile_fullgraph(model, x)
    torch._dynamo.reset()
    lq.prepare(model, "int8")
    lq.calibrate(model, [x])
    converted = lq.convert(model)
    with torch.no_grad():
        for strict in (True, False):
            program = torch.export.export(converted, (x,), strict=strict)
            assert lq.sqnr(converted(x), program.module()(x)) > 60


def test_training_learns_and_ships(tmp_path):
    module = Reader()
    data = DataLoader(tokens(256), batch_size=16)
    held_out = DataLoader(tokens(128, seed=3), batch_size=64)
    run = trainer(tmp_path, [lq.QuantizationAwareTraining("int8", start_step=20)], max_epochs=16)
    run.fit(module, data)
    accuracy = run.validate(module, held_out, verbose=False)[0]["accuracy"]
    assert accuracy > 0.8
    assert all(isinstance(each, lq.QATMultiheadAttention) for each in attentions(module))
    quantized = lq.convert(module, verify=[batch[0] for batch in held_out])
    lq.save_quantized(quantized, tmp_path / "model")
    loaded = lq.load_quantized(tmp_path / "model", Reader())
    assert abs(trainer(tmp_path).validate(loaded, held_out, verbose=False)[0]["accuracy"] - accuracy) < 0.03


def qat():
    return [lq.QuantizationAwareTraining("int8", start_step=3, freeze_step=11)]


def progressive():
    return [lq.ProgressiveBitReduction({0: 8, 4: 6, 10: 4}, activations=True), lq.ObserverCalibration(2)]


@pytest.mark.parametrize("callbacks", [qat, progressive])
def test_an_interrupted_run_ends_as_the_whole_one(callbacks, tmp_path):
    assert_resume_exact(lambda: Reader(dropout=0.1), batches, callbacks, [8], folder=tmp_path, max_epochs=2)


def learned():
    config = lq.QATConfig(bits=4, activation_bits=4, per_channel=True, learnable_step_size=True)
    return [lq.QuantizationAwareTraining(config, start_step=2)]


@pytest.mark.parametrize("callbacks", [qat, learned])
def test_ranks_have_the_same_scales(callbacks, tmp_path):
    options = {"start_method": "fork", "max_epochs": 1, "limit_train_batches": 4}
    assert_rank_equal(Reader, batches, callbacks, folder=tmp_path, **options)


def test_learned_scales_are_each_projections_own():
    torch.manual_seed(0)
    config = lq.QATConfig(bits=4, activation_bits=4, per_channel=True, learnable_step_size=True)
    model, x = lq.prepare(encoder(1), config), torch.randn(4, 5, FEATURES)
    model(x)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(5):
        (model(x) - x.flip(0)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    first = attentions(model)[0]
    scales = {getattr(first, name).input_quantizer.scale.item() for name in PROJECTIONS}
    assert len(scales) == 4
    model.eval()
    assert lq.convert(model, verify=[x]) is not None
    assert first.v_proj.weight_parameters() == [first.in_proj_weight]


def test_float_checkpoints_resume_and_come_back(tmp_path):
    run = trainer(tmp_path, qat())
    run.fit(Reader(), batches())
    run.save_checkpoint(tmp_path / "qat.ckpt")
    lq.float_checkpoint(tmp_path / "qat.ckpt", tmp_path / "float.ckpt")
    plain = Reader.load_from_checkpoint(tmp_path / "float.ckpt", weights_only=True)
    assert all(type(each) is nn.MultiheadAttention for each in attentions(plain))
    trained = run.lightning_module.encoder.layers[0].self_attn
    assert torch.equal(attentions(plain)[0].in_proj_weight, trained.in_proj_weight)
    trainer(tmp_path, [lq.QuantizationAwareTraining("int8")], max_epochs=2).fit(
        Reader(), batches(), ckpt_path=tmp_path / "float.ckpt"
    )

"""``WeightOscillation`` counts flips, and stops them where it is told to."""

import lightning as L
import pytest
import torch
from classifier import Classifier, data, loader, trainer
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.data import DataLoader, TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

import lightning_qat as lq
from lightning_qat.testing import assert_rank_equal, assert_resume_exact


def qat(start_step=0, bits=3, **options):
    config = lq.QATConfig("int8", bits=bits, start_step=start_step, activation_bits=None, **options)
    return lq.QuantizationAwareTraining(config, certify=False)


def fit(tmp_path, module, *callbacks, rules=None, train=None, **options):
    L.seed_everything(3, verbose=False)
    run = trainer(tmp_path, [rules or qat(), *callbacks], **options)
    run.fit(module, train or loader())
    return run


def state(module):
    return {k: v.clone() for k, v in module.state_dict().items() if isinstance(v, torch.Tensor)}


def same_bits(one, other):
    mine, theirs = state(one), state(other)
    return mine.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in mine.items())


class Regression(L.LightningModule):
    """Weights whose best values lie between the points of a grid: [1, 0.4, -0.3, 0.15] at 3 bits, steps of 0.29."""

    wanted = (1.0, 0.4, -0.3, 0.15)

    def __init__(self):
        super().__init__()
        self.line = nn.Linear(4, 1, bias=False)
        with torch.no_grad():
            self.line.weight.copy_(torch.tensor([self.wanted]))
        self.codes = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = (self.line(x) - y).square().mean()
        self.codes.append(self.line.weight_codes()[0])
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD([{"params": self.parameters()}], lr=0.02)


def oscillating(tmp_path, callback, **options):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 4, generator=generator)
    y = x @ torch.tensor([Regression.wanted]).T
    module = Regression()
    run = fit(tmp_path, module, callback, train=DataLoader(TensorDataset(x, y), batch_size=4), max_epochs=4, **options)
    return run, module


def flips(module, last=100):
    codes = torch.stack(module.codes[-last:]).int()
    return (codes[1:] != codes[:-1]).sum().item()


def test_it_is_measured_dampened_and_frozen(tmp_path):
    run, module = oscillating(tmp_path, lq.WeightOscillation(momentum=0.05))
    assert flips(module) > 20  # they do oscillate
    share = run.callback_metrics["quantization/oscillating_weights"].item()
    changed = [(torch.stack(module.codes[-60:])[:, i].diff() != 0).any().item() for i in range(4)]
    assert share == pytest.approx(sum(changed) / 4)
    dampened, calm = oscillating(tmp_path, lq.WeightOscillation(dampening=2.0, momentum=0.05))
    assert flips(calm) < flips(module) / 4
    assert dampened.callback_metrics["quantization/oscillating_weights"] <= share
    frozen, still = oscillating(tmp_path, lq.WeightOscillation(freeze_threshold=0.1, momentum=0.05))
    assert flips(still) < flips(module) / 4
    assert frozen.callback_metrics["quantization/frozen_weights"] > 0


def test_measuring_changes_no_bit_and_tells_every_logger(tmp_path):
    without, mine = Classifier(), Classifier()
    fit(tmp_path, without, rules=qat(2), max_epochs=2)
    callback = lq.WeightOscillation(every_n_steps=2)
    run = fit(tmp_path, mine, callback, rules=qat(2), max_epochs=2, logger=CSVLogger(tmp_path))
    assert same_bits(without, mine)
    assert 0 <= run.callback_metrics["quantization/oscillating_weights"] <= 1
    assert "quantization/frozen_weights" not in run.callback_metrics
    assert [row["layer"] for row in callback.table] == ["conv", "head"]
    assert list(tmp_path.rglob("quantization_oscillation.csv"))
    header = next(tmp_path.rglob("metrics.csv")).read_text().splitlines()[0]
    assert "quantization/oscillating_weights" in header.split(",")


def test_the_float_phase_and_other_bits_begin_anew(tmp_path):
    callback, seen = lq.WeightOscillation(freeze_threshold=0.001, momentum=1.0), {}

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            states = callback._states
            frozen = sum(int(state.frozen.sum()) for state in states.values())
            seen[trainer.global_step] = (states["head"].bits, frozen) if states else None

    rules = lq.QuantizationAwareTraining(lq.QATConfig("int8", start_step=3, activation_bits=None), certify=False)
    bits = lq.ProgressiveBitReduction({0: 8, 11: 4})
    fit(tmp_path, Classifier(lr=0.5), callback, bits, Watch(), rules=rules, max_epochs=2)
    bits_seen = [seen[step] and seen[step][0] for step in range(1, 17)]
    began = bits_seen.index(8) + 1
    assert began in (3, 4)  # which of the callbacks comes first in the list decides
    assert bits_seen == [None] * (began - 1) + [8] * 8 + [4] * (17 - began - 8)
    assert seen[began][1] == seen[began + 8][1] == 0
    assert seen[began + 7][1] > 0


def test_frozen_weights_hold_in_every_step_and_count_in_no_norm(tmp_path):
    callback, held = lq.WeightOscillation(freeze_threshold=0.05, momentum=0.3, every_n_steps=3), []

    class Watch(L.Callback):
        def __init__(self):
            self.frozen, self.codes = None, None

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            if self.frozen is not None:
                assert not pl_module.conv.weight.grad[self.frozen].any()

        def on_train_batch_end(self, trainer, pl_module, *_):
            codes = pl_module.conv.weight_codes()
            if self.frozen is not None:
                held.append(int(self.frozen.sum()))
                assert torch.equal(codes[self.frozen], self.codes[self.frozen])
                scale = pl_module.conv.weight_quantizer.parameters_for(pl_module.conv.weight.detach())[0]
                points = codes[self.frozen] * scale
                torch.testing.assert_close(pl_module.conv.weight.detach()[self.frozen], points)
            states = callback._states
            self.frozen, self.codes = (states["conv"].frozen.clone(), states["conv"].codes) if states else (None, None)

    fit(tmp_path, fast(), callback, Watch(), max_epochs=4)
    assert held[-1] > 0


def test_a_layer_that_returns_to_float_is_forgotten(tmp_path):
    callback, module = lq.WeightOscillation(), Classifier()

    class Stop(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            pl_module.head.weight_quantizer.quantizing = batch_idx < 5

    fit(tmp_path, module, Stop(), callback)
    assert callback._states.keys() == {"conv"}


def test_learned_scales_let_any_code_be_frozen(tmp_path):
    callback = lq.WeightOscillation(0.01, 0.05, 0.3)
    module = fast()
    fit(tmp_path, module, callback, rules=qat(bits=2, learnable_step_size=True), max_epochs=3)
    assert callback._states["conv"].frozen.any()
    assert torch.equal(module.conv.weight_codes()[callback._states["conv"].frozen],
                       callback._states["conv"].codes[callback._states["conv"].frozen])  # fmt: skip


def stateful():
    return StatefulDataLoader(data(24), batch_size=4, shuffle=True)


def freezing():
    return [lq.WeightOscillation(0.01, 0.05, 0.3, every_n_steps=2), qat(2)]


def fast():
    return Classifier(lr=0.5)


def test_it_resumes_exactly(tmp_path):
    assert_resume_exact(fast, stateful, freezing, (1, 3, 4, 7, 9), folder=tmp_path, max_epochs=3)


def test_its_state_resumes_and_is_small(tmp_path):
    """At an epoch's end any loader goes on where it was."""
    saver = L.pytorch.callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    whole, callback = fast(), freezing()[0]
    fit(tmp_path, whole, callback, saver, rules=qat(2), max_epochs=3, enable_checkpointing=True)
    assert callback._states["conv"].frozen.any()
    path = tmp_path / "epoch=1.ckpt"
    saved = torch.load(path, weights_only=True)["callbacks"]["WeightOscillation"]["layers"]
    for name, layer in saved.items():
        held = sum(t.numel() * t.element_size() for t in layer.values() if isinstance(t, torch.Tensor))
        assert held == 11 * whole.get_submodule(name).weight.numel()
    resumed, again = Classifier(seed=9), freezing()[0]
    run = trainer(tmp_path, [qat(2), again], max_epochs=3)
    run.fit(resumed, loader(), ckpt_path=path, weights_only=True)
    assert same_bits(whole, resumed)
    mine, theirs = callback.state_dict(), again.state_dict()
    assert (mine["step"], mine["observed"]) == (theirs["step"], theirs["observed"])
    for name, layer in mine["layers"].items():
        for key, value in layer.items():
            other = theirs["layers"][name][key]
            assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, (name, key)


def test_a_second_fit_begins_anew(tmp_path):
    callback = lq.WeightOscillation(freeze_threshold=0.01, momentum=0.5)
    fit(tmp_path, fast(), callback)
    fit(tmp_path, fast(), callback, rules=qat(100))
    assert callback._states == {}
    assert callback.table == []


class Plain(Classifier):
    def __init__(self):
        super().__init__(lr=0.5)
        self.bn = nn.Identity()


def shuffled():
    return DataLoader(data(16), batch_size=2, shuffle=True)


@pytest.mark.slow
def test_all_ranks_have_the_same(tmp_path):
    assert_rank_equal(Plain, shuffled, freezing, folder=tmp_path)


class Parts(Classifier):
    """Weights that are parts of a parameter, and one that a recurrent layer owns."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(2)
            self.attention, self.rnn = nn.MultiheadAttention(8, 2, batch_first=True), nn.GRU(8, 4, batch_first=True)

    def forward(self, x):
        x = x.squeeze(1)
        return self.head(self.rnn(self.attention(x, x, x)[0])[0].mean(1))


def test_parts_of_a_parameter_freeze_alone(tmp_path):
    callback, config = lq.WeightOscillation(freeze_threshold=0.02, momentum=0.5), lq.QuantizationConfig(bits=3)
    plan = lq.QuantizationPlan([lq.LayerRule("rnn", config)], base=lq.QATConfig(bits=3, activation_bits=None))
    names, held = ["attention.k_proj", "rnn.hh_l0"], []

    class Watch(L.Callback):
        before = None

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            for name, (frozen, _) in (self.before or {}).items():
                whole = pl_module.attention.in_proj_weight.grad[8:16] if "attention" in name else \
                    pl_module.rnn.weight_hh_l0.grad  # fmt: skip
                assert not whole[frozen].any()
                held.append((name, int(frozen.sum())))

        def on_train_batch_end(self, trainer, pl_module, *_):
            layers = {name: pl_module.get_submodule(name) for name in names}
            for name, (frozen, codes) in (self.before or {}).items():
                assert torch.equal(layers[name].weight_codes()[frozen], codes[frozen])
            self.before = {n: (callback._states[n].frozen.clone(), layers[n].weight_codes()) for n in names}

    module = Parts()
    module.lr = 0.5
    rules = lq.QuantizationAwareTraining(plan, certify=False)
    fit(tmp_path, module, callback, Watch(), rules=rules, max_epochs=3)
    for name in names:
        assert max(count for key, count in held if key == name) > 0


class Normed(Classifier):
    def __init__(self):
        super().__init__()
        self.head = weight_norm(self.head)


def test_computed_weights_are_measured_and_dampened_but_not_frozen(tmp_path):
    run = fit(tmp_path, Normed(), lq.WeightOscillation(0.1))
    assert "quantization/oscillating_weights" in run.callback_metrics
    with pytest.raises(ValueError, match="weight of layer 'head' is computed from other parameters"):
        fit(tmp_path, Normed(), lq.WeightOscillation(freeze_threshold=0.1))
    fit(tmp_path, Normed(), lq.WeightOscillation(freeze_threshold=0.1, match="conv"))


def test_faults_are_told(tmp_path):
    for options, message in (
        ({"dampening": -1}, "dampening=-1"), ({"freeze_threshold": 0}, "freeze_threshold=0"),
        ({"momentum": 2}, "momentum=2"), ({"every_n_steps": 0}, "every_n_steps=0"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            lq.WeightOscillation(**options)
    with pytest.raises(ValueError, match=r"no layer that matches has integer codes; 'conv' has nf4"):
        fit(tmp_path, Classifier(), lq.WeightOscillation(), rules=lq.QuantizationAwareTraining("nf4", certify=False))


class BreaksAScale(L.Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 7:
            with torch.no_grad():
                pl_module.conv.weight_quantizer.learned.exponent.fill_(float("nan"))


def test_a_learned_scale_that_broke_is_left_to_those_who_roll_back(tmp_path):
    oscillation = lq.WeightOscillation()
    reduction = lq.PlateauBitReduction([8, 4], every_n_steps=2, patience=1, min_delta=1.0)
    rules = lq.QuantizationAwareTraining(lq.QATConfig("int8", learnable_step_size=True), certify=False)
    with pytest.warns(UserWarning, match="rolled back at step 7"):
        fit(tmp_path, Classifier(), BreaksAScale(), oscillation, reduction, rules=rules, max_epochs=2)
    assert {row["layer"] for row in oscillation.table} == {"conv", "head"}

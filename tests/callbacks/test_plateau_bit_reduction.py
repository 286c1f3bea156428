"""Bits follow a metric down, and a run that diverges goes back to the weights from before the reduction."""

import math

import pytest
import torch
from classifier import Classifier, data, loader, trainer
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging
from together import assert_ships, qat
from torchdata.stateful_dataloader import StatefulDataLoader

import lightning_qat as lq
from lightning_qat.callbacks.roll_back import roll_back, take_snapshot
from lightning_qat.testing import assert_resume_exact
from lightning_qat.transforms.prepare import qat_layers

QUICK = {"every_n_steps": 1, "patience": 1, "recovery": 1}


class Script(Callback):
    """Logs what a test wants to see as the loss."""

    def __init__(self, values, at=None):
        self.values, self.at = values, at

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        pl_module.log("script", self.values[min(trainer.global_step, len(self.values) - 1)])

    def on_validation_epoch_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            pl_module.log("val/script", self.values[trainer.current_epoch])


class Watch(Callback):
    """Keeps bits and weights before each batch."""

    def __init__(self):
        self.bits, self.weights = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.bits.append([layer.weight_quantizer.bits for _, layer in qat_layers(pl_module)])
        self.weights.append({name: tensor.clone() for name, tensor in pl_module.named_parameters()})


def run(tmp_path, reduction, values, *others, config="int8", module=None, **options):
    watch = Watch()
    module = Classifier() if module is None else module
    torch.manual_seed(1)
    fit = trainer(tmp_path, [qat(config), Script(values), reduction, *others, watch], **options)
    fit.fit(module, loader(), loader(8, seed=1))
    return module, watch, fit


def test_bits_fall_when_the_metric_is_flat_and_not_before(tmp_path):
    reduction = lq.PlateauBitReduction([8, 6, 4], "script", **{**QUICK, "patience": 2})
    values = [1.0, 0.5, 0.499, 0.498, 0.4, 0.3, 0.3, 0.3, 0.3]
    module, watch, _ = run(tmp_path, reduction, values, max_epochs=2)
    assert [bits[0] for bits in watch.bits] == [8] * 4 + [6] * 4 + [4] * 8
    assert reduction.has_final_bits()
    assert reduction._snapshot is None  # the last reduction has settled
    assert_ships(module)


@pytest.mark.parametrize("bad", [math.nan, 9.0])
@pytest.mark.parametrize("learned", [False, True])
def test_a_divergence_brings_weights_optimizer_and_bits_back(tmp_path, bad, learned):
    config = lq.QATConfig("int8", per_channel=True, learnable_step_size=learned)
    reduction = lq.PlateauBitReduction([8, 4], "script", activations=True, **QUICK)
    values = [1.0, 1.0, 1.0, bad, 1.0, 0.5, 0.25]
    with pytest.warns(UserWarning, match="training diverged .*; the reduction will be tried again"):
        module, watch, _ = run(tmp_path, reduction, values, config=config, max_steps=7)
    assert [bits[0] for bits in watch.bits] == [8, 8, 4, 4, 8, 8, 8]
    before, after = watch.weights[2], watch.weights[4]  # of step 2, before the bits fell, and of step 4
    assert before.keys() == after.keys()
    for name, value in before.items():
        if "quantizer" not in name:
            assert torch.equal(value, after[name]), name
    assert not torch.equal(watch.weights[3]["conv.weight"], before["conv.weight"])
    if learned:  # the watch saw them rescaled to 4 bits at step 2; of 8 bits they are those that step 1 left, or near
        scale = module.conv.weight_quantizer.learned
        assert scale.ready
        assert module.conv.input_quantizer.bits == 8


class Poison(Callback):
    """Makes a parameter NaN after a step, as an exploding gradient does."""

    def __init__(self, step, parameter="conv.weight", value=math.nan):
        self.step, self.parameter, self.value = step, parameter, value

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            with torch.no_grad():
                pl_module.get_parameter(self.parameter).fill_(self.value)


@pytest.mark.parametrize("config", [lq.QATConfig("int8"), lq.QATConfig("int8", learnable_step_size=True, bits=8)])
def test_training_goes_on_from_nan_weights(tmp_path, config):
    """For some steps everything is NaN: outputs, gradients, momentum, learned scales, what observers see."""
    reduction = lq.PlateauBitReduction([8, 4], "train/loss", every_n_steps=3, patience=1, min_delta=1.0, recovery=1)
    callbacks = [qat(config), Poison(7), reduction, Watch()]
    callbacks += [lq.LearnedScales(check_every=1)] if config.learnable_step_size else []
    module = Classifier()
    with pytest.warns(UserWarning, match="train/loss: nan"):
        trainer(tmp_path, callbacks, max_epochs=2).fit(module, loader())
    assert reduction.stage == 1  # it was tried again
    assert all(bool(torch.isfinite(tensor).all()) for tensor in module.state_dict().values() if
               isinstance(tensor, torch.Tensor))  # fmt: skip
    assert_ships(module)


@pytest.mark.parametrize("monitor", ["train/loss", "sqnr"])
@pytest.mark.parametrize("value", [math.nan, 200.0])
def test_a_learned_scale_that_broke_is_rolled_back_before_a_validation_computes_with_it(tmp_path, monitor, value):
    """On a CPU a scale that is none raises where it is used: in the validation after step 8, and in the SQNR."""
    config = lq.QATConfig("int8", learnable_step_size=True)
    reduction = lq.PlateauBitReduction([8, 4], monitor, every_n_steps=2, patience=1, min_delta=1.0)
    poison = Poison(8, "conv.weight_quantizer.learned.exponent", value)
    callbacks = [qat(config), poison, reduction, lq.LearnedScales(check_every=1)]
    module = Classifier()
    with pytest.warns(UserWarning, match="training diverged .* rolled back at step 8"):
        trainer(tmp_path, callbacks, max_epochs=2).fit(module, loader(), loader(8, seed=1))
    assert reduction.stage == 1  # it was tried again
    assert_ships(module)


def test_a_roll_back_puts_every_bit_of_module_and_optimizer_back(tmp_path):
    class Backs(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 3:
                self.kept = take_snapshot(trainer, pl_module)
                self.copy = take_snapshot(trainer, pl_module)
            if batch_idx == 5:
                trainer.optimizers[0].param_groups[0]["lr"] = 0.125
                roll_back(trainer, pl_module, self.kept)
                self.now = take_snapshot(trainer, pl_module)
                assert all(p.grad is None for p in pl_module.parameters())
                assert trainer.optimizers[0].param_groups[0]["lr"] == 0.125

    backs = Backs()
    config = lq.QATConfig("int8", learnable_step_size=True)
    trainer(tmp_path, [qat(config), backs]).fit(Classifier(), loader())
    assert_equal_trees(backs.now, backs.copy)


def assert_equal_trees(one, other):
    if isinstance(one, dict):
        assert one.keys() == other.keys()
    pairs = zip(one.values(), other.values(), strict=True) if isinstance(one, dict) else zip(one, other, strict=True)
    for a, b in pairs:
        if isinstance(a, (dict, list)):
            assert_equal_trees(a, b)
        else:
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_a_reduction_that_fails_again_is_given_up(tmp_path):
    reduction = lq.PlateauBitReduction([8, 6, 4], "script", retries=1, **QUICK)
    values = [1.0, 1.0, 1.0, 1.0, math.nan, 1.0, 1.0, 9.0, 1.0]
    with pytest.warns(UserWarning, match="it keeps these bits from now on"):
        _, watch, _ = run(tmp_path, reduction, values, max_epochs=2)
    assert [bits[0] for bits in watch.bits] == [8, 8, 6, 6, 4, 6, 6, 4] + [6] * 8
    assert reduction.has_final_bits()


def test_a_run_that_ends_diverged_is_rolled_back_and_one_that_ends_flat_is_not_reduced(tmp_path):
    reduction = lq.PlateauBitReduction([8, 4], "script", **{**QUICK, "recovery": 9})
    with pytest.warns(UserWarning, match="at step 8"):
        module, watch, _ = run(tmp_path, reduction, [1.0, 1.0, 1.0, 0.5, 0.2, 0.1, 9.0, 9.0])
    assert [bits[0] for bits in watch.bits] == [8, 8] + [4] * 6
    assert module.head.weight_quantizer.bits == 8
    assert torch.equal(module.head.weight, watch.weights[2]["head.weight"])
    reduction = lq.PlateauBitReduction([8, 4], "script", every_n_steps=4, patience=1)
    module, watch, _ = run(tmp_path, reduction, [1.0])
    assert [bits[0] for bits in watch.bits] == [8] * 8
    assert module.head.weight_quantizer.bits == 8


def test_validations_decide_where_no_steps_are_given(tmp_path):
    reduction = lq.PlateauBitReduction([8, 4], "val/script", every_n_steps=None, patience=1, recovery=1, mode="max")
    with pytest.warns(UserWarning, match="at step 24"):
        _, watch, _ = run(tmp_path, reduction, [0.5, 0.5, 0.1], max_epochs=3, num_sanity_val_steps=2)
    assert [bits[0] for bits in watch.bits] == [8] * 16 + [4] * 8
    assert reduction.stage == 0


def test_the_sqnr_of_the_weights_decides(tmp_path):
    """Weights that hardly move have a flat SQNR; a guard sees the divergence that SQNR does not."""
    reduction = lq.PlateauBitReduction([8, 4], "sqnr", guard="script", every_n_steps=2, patience=1, recovery=1)
    with pytest.warns(UserWarning, match="script: 25.5"):
        _, watch, _ = run(tmp_path, reduction, [1.0] * 6 + [50.0] + [1.0] * 9, module=Classifier(lr=1e-4))
    assert [bits[0] for bits in watch.bits] == [8] * 4 + [4] * 4
    reduction = lq.PlateauBitReduction([8, 4], "sqnr", every_n_steps=2, patience=1)
    _, watch, _ = run(tmp_path, reduction, [1.0], module=Classifier(lr=1e-4))
    assert [bits[0] for bits in watch.bits] == [8] * 4 + [4] * 4


def test_float_training_is_not_looked_at_and_the_delay_counts(tmp_path):
    reduction = lq.PlateauBitReduction([8, 4], "script", **QUICK)
    _, watch, _ = run(tmp_path, reduction, [1.0], lq.DelayedQATStart(4))
    assert [bits[0] for bits in watch.bits] == [8] * 6 + [4] * 2


def test_layers_are_reduced_one_at_a_time(tmp_path):
    reduction = lq.PlateauBitReduction([8, 4], "script", layers_at_once=1, **QUICK)
    _, watch, _ = run(tmp_path, reduction, [1.0])
    assert [sum(bits) for bits in watch.bits] == [16, 16, 12, 12, 8, 8, 8, 8]
    assert sorted(reduction.orders[0]) == ["conv", "head"]


def test_a_best_checkpoint_has_the_final_bits(tmp_path):
    saver = lq.QuantizedModelCheckpoint(tmp_path, monitor="val/loss")
    reduction = lq.PlateauBitReduction([8, 4], "script", **QUICK)
    run(tmp_path, reduction, [1.0, 0.5, 0.25, 0.1], saver, enable_checkpointing=True, val_check_interval=1)
    assert int(saver.best_model_path.split("step=")[1].split(".")[0]) >= 6  # two looks after step 4


def rolled_back():
    values = [1.0, 1.0, 1.0, 1.0, math.nan, 1.0, 1.0, 9.0, 1.0]
    return [qat(), Script(values), lq.PlateauBitReduction([8, 6, 4], "script", activations=True, **QUICK)]


def learned_layers():
    """Of learned scales, with layers one at a time, a roll-back, and a guard beside the SQNR."""
    config = lq.QATConfig("int8", per_channel=True, learnable_step_size=True)
    values = [1.0] * 4 + [9.0] + [1.0] * 7
    options = {"layers_at_once": 1, "guard": "script", **QUICK}
    return [Script(values), lq.PlateauBitReduction([8, 4], "sqnr", min_delta=0.5, **options), qat(config)]


@pytest.mark.parametrize("callbacks", [rolled_back, learned_layers])
@pytest.mark.filterwarnings("ignore:PlateauBitReduction")
def test_a_run_interrupted_around_a_reduction_or_a_roll_back_ends_in_the_same_bits(tmp_path, callbacks):
    """Broken off right before and after each decision; 6 is an epoch's end, which Lightning does not resume here."""

    def batches():
        return StatefulDataLoader(data(24), batch_size=4, shuffle=True)

    assert_resume_exact(Classifier, batches, callbacks, [1, 2, 3, 4, 5, 7, 8, 9], folder=tmp_path, witness=False)


def test_a_run_interrupted_at_an_epochs_end_ends_in_the_same_bits(tmp_path):
    def callbacks():
        options = {"every_n_steps": None, "patience": 1, "recovery": 1, "mode": "max"}
        return [qat(), Script([0.5, 0.5, 0.1, 0.5, 0.5]), lq.PlateauBitReduction([8, 4], "val/script", **options)]

    def loaders():
        return loader(8), loader(8, seed=1)

    with pytest.warns(UserWarning, match="training diverged"):
        assert_resume_exact(Classifier, loaders, callbacks, [2, 4, 6, 8], folder=tmp_path, max_epochs=5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": [8]}, r"bits=\[8\] is not allowed; use two or more"),
        ({"bits": "84"}, r"bits\[0\]='8' is not allowed"),
        ({"bits": [8, 8]}, "each has to be less"),
        ({"bits": [8, 1]}, r"bits\[1\]=1 is not allowed"),
        ({"bits": [8, 4], "weights": False}, "changes nothing"),
        ({"bits": [8, 4], "layers_at_once": 0}, "layers_at_once=0"),
        ({"bits": [8, 4], "monitor": ""}, "monitor='' is not allowed"),
        ({"bits": [8, 4], "mode": "up"}, "mode='up'"),
        ({"bits": [8, 4], "every_n_steps": 0}, "every_n_steps=0"),
        ({"bits": [8, 4], "retries": -1}, "retries=-1"),
    ],
)
def test_settings_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        lq.PlateauBitReduction(**arguments)


def test_what_cannot_work_is_told_before_training(tmp_path):
    with pytest.raises(ValueError, match=r"monitor='train/lost'\): there is no such metric now; nearest: 'train/loss'"):
        run(tmp_path, lq.PlateauBitReduction([8, 4], "train/lost", every_n_steps=2), [1.0])
    with pytest.raises(ValueError, match="match='haed' matches no prepared layer; nearest names: 'head'"):
        run(tmp_path, lq.PlateauBitReduction([8, 4], match="haed"), [1.0])
    with pytest.raises(ValueError, match="the weight of layer 'conv': .*keeps its 4 bits.*match="):
        run(tmp_path, lq.PlateauBitReduction([8, 4]), [1.0], config="nf4")
    with pytest.raises(ValueError, match="leave the averaging callback out"):
        run(tmp_path, lq.PlateauBitReduction([8, 4]), [1.0], EMAWeightAveraging())
    one = lq.PlateauBitReduction([8, 4])
    with pytest.raises(ValueError, match=r"of the checkpoint has bits=\[8, 2\], and this one \[8, 4\]"):
        one.load_state_dict(lq.PlateauBitReduction([8, 2]).state_dict())


def test_it_says_what_it_does():
    text = lq.PlateauBitReduction([8, 6, 4], "train/loss", layers_at_once=2, match="net.*").explain()
    assert "when train/loss is flat" in text
    assert "weights at 8, then 6, then 4 bits in net.*, 2 layers at a time, least loss first, rolled back" in text

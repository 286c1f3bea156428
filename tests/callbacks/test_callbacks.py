"""The callbacks in a real Trainer, on a module that knows nothing of them."""

import copy
import itertools
import warnings

import lightning as L
import numpy as np
import pytest
import torch
from classifier import Classifier, data, loader, trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

import lightning_qat as lq


def fit(tmp_path, callbacks, module=None, **kwargs):
    module = module or Classifier()
    torch.manual_seed(1)
    trainer(tmp_path, callbacks, **kwargs).fit(module, loader(), loader(8, seed=1))
    return module


def test_the_ten_lines_of_the_readme(tmp_path):
    module = fit(tmp_path, [lq.QuantizationAwareTraining("int8", start_step=2, freeze_step=6)])
    assert isinstance(module.conv, lq.QATConv2d)
    trainer(tmp_path).test(module, loader(8), verbose=False)
    quantized = lq.convert(module)
    assert isinstance(quantized, Classifier)
    lq.save_quantized(quantized, tmp_path / "model_int8")
    twin = lq.load_quantized(tmp_path / "model_int8", Classifier(seed=9))
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(twin(x), quantized(x))
    torch.testing.assert_close(module.eval()(x), quantized(x), rtol=1e-4, atol=1e-5)
    trainer(tmp_path).test(twin, loader(8), verbose=False)


def test_phases_by_step(tmp_path):
    module = fit(tmp_path, [lq.QuantizationAwareTraining("int8", start_step=2, freeze_step=6)])
    seen = {(where, step): phase for where, step, phase in module.record}
    assert seen["sanity", 0] == (False, False, 8, False)
    train = [seen["train", step] for step in range(8)]
    assert [p[0] for p in train] == [False] * 2 + [True] * 6
    assert [p[1] for p in train] == [False] * 6 + [True] * 2
    assert [p[3] for p in train] == [True] * 6 + [False] * 2
    assert seen["val", 8] == (True, True, 8, False)


def test_validation_has_the_phase_of_the_step_that_is_reached(tmp_path):
    module = fit(tmp_path, [lq.DelayedQATStart(4)], val_check_interval=2)
    assert [(s, p[0]) for w, s, p in module.record if w == "val"][::2] == [(2, False), (4, True), (6, True), (8, True)]


def test_accumulation_counts_optimizer_steps(tmp_path):
    module = fit(tmp_path, [lq.QuantizationAwareTraining("int8", start_step=2)], accumulate_grad_batches=2)
    train = [(step, phase[0]) for where, step, phase in module.record if where == "train"]
    assert train == [(s, s >= 2) for s in (0, 0, 1, 1, 2, 2, 3, 3)]


@pytest.mark.parametrize(("step", "reached"), [(0.5, 8), ("1 epoch", 8), ("1.5 epochs", 12), (3, 3)])
def test_fractions_and_epochs(tmp_path, step, reached):
    module = fit(tmp_path, [lq.DelayedQATStart(step)], max_epochs=2)
    assert min(s for w, s, p in module.record if w == "train" and p[0]) == reached


def test_an_iterable_loader_of_unknown_length_is_told(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(data())

    with pytest.raises(ValueError, match=r"start_step='1 epochs' needs the length"):
        trainer(tmp_path, [lq.DelayedQATStart("1 epochs")]).fit(Classifier(), DataLoader(Stream(), batch_size=4))


def test_a_stream_trains_with_steps_that_are_numbers(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(data())

    schedule = [lq.QuantizationAwareTraining("int8", start_step=2), lq.ProgressiveBitReduction({0: 8, 4: 6})]
    module = Classifier()
    trainer(tmp_path, schedule).fit(module, DataLoader(Stream(), batch_size=4))
    assert module.head.weight_quantizer.bits == 6
    assert "the training loader has no state_dict" in schedule[0].explain()


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (lambda: lq.DelayedQATStart(8), "nothing is fake-quantized before step 8, and the run has 8"),
        (lambda: lq.ProgressiveBitReduction({0: 8, 9: 4}), "no weight has 4 bits before step 9, and the run has 8"),
        (
            lambda: lq.SensitivityBitReduction([8, 4], end_step=1.0),
            "the last layers are due at step 8, and the run has 8; they keep more bits",
        ),
    ],
)
def test_steps_beyond_the_run_are_told(tmp_path, callback, message):
    with pytest.warns(UserWarning, match=message):
        fit(tmp_path, [lq.QuantizationAwareTraining("int8", certify=False), callback()])
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        fit(tmp_path, [lq.QuantizationAwareTraining("int8", certify=False), callback()], max_epochs=3)
    assert not [w for w in seen if "before step" in str(w.message)]


def test_progressive_bits_follow_the_schedule(tmp_path):
    callbacks = [lq.QuantizationAwareTraining("int8"), lq.ProgressiveBitReduction({0: 16, 3: 8, 6: 4})]
    module = fit(tmp_path, callbacks)
    bits = {s: p[2] for w, s, p in module.record if w == "train"}
    assert bits == {0: 16, 1: 16, 2: 16, 3: 8, 4: 8, 5: 8, 6: 4, 7: 4}
    assert module.conv.input_quantizer.bits == 8
    assert lq.convert(module).head.codes.abs().max() <= 8
    both = fit(tmp_path, [lq.ProgressiveBitReduction({0: 6}, activations=True)])
    assert both.conv.input_quantizer.bits == 6


@pytest.mark.parametrize("order", list(itertools.permutations(range(4)))[::5])
def test_specific_callbacks_win_in_any_order(tmp_path, order):
    callbacks = [
        lq.QuantizationAwareTraining(lq.QATConfig("int8", start_step=1, freeze_step=2)),
        lq.DelayedQATStart(4),
        lq.FreezeQuantization(6, batch_norm=False),
        lq.ProgressiveBitReduction({5: 4}),
    ]
    module = fit(tmp_path, [callbacks[i] for i in order])
    train = {s: p for w, s, p in module.record if w == "train"}
    assert [train[s] for s in range(8)] == [
        (s >= 4, s >= 6, 4 if s >= 5 else 8, s < 2) for s in range(8)
    ]  # fmt: skip


def test_each_callback_works_alone(tmp_path):
    for callback in (
        lq.ObserverCalibration(2),
        lq.DelayedQATStart(1),
        lq.FreezeQuantization(4),
        lq.ProgressiveBitReduction({2: 4}),
        lq.BatchNormFolding(freeze_step=3),
    ):
        module = fit(tmp_path, [callback])
        assert isinstance(lq.convert(module).bn, lq.nn.FoldedBatchNorm)
    prepared = Classifier()
    lq.prepare(prepared, "w4a8")
    assert fit(tmp_path, [lq.ObserverCalibration(2)], prepared).head.weight_quantizer.bits == 4


def test_folding_can_be_declined(tmp_path):
    module = fit(tmp_path, [lq.QuantizationAwareTraining("int8"), lq.BatchNormFolding(False)])
    assert isinstance(lq.convert(module).bn, nn.BatchNorm2d)


def test_two_plans_and_another_plan_raise(tmp_path):
    with pytest.raises(ValueError, match="more than one QuantizationAwareTraining"):
        fit(tmp_path, [lq.QuantizationAwareTraining("int8"), lq.QuantizationAwareTraining("w4a8")])
    module = fit(tmp_path, [lq.QuantizationAwareTraining("int8")])
    with pytest.raises(ValueError, match="already prepared with another plan"):
        fit(tmp_path, [lq.QuantizationAwareTraining("w4a8")], module)


class Stateful(Classifier):
    """Random augmentation, metrics, dropout: everything that a calibration pass could disturb."""

    def __init__(self):
        super().__init__()
        self.accuracy = MulticlassAccuracy(2)
        self.dropout = nn.Dropout(0.3)

    def training_step(self, batch, batch_idx):
        x, y = batch
        x = x + 0.1 * torch.randn_like(x) + float(np.random.rand())
        out = self.dropout(self(x))
        self.accuracy(out, y)
        self.log("train/acc", self.accuracy, on_step=True, on_epoch=True)
        return nn.functional.cross_entropy(out, y)


def test_calibration_leaves_no_trace(tmp_path):
    """Witness: plain float training. With quantization never starting, calibrated training equals it bit for bit."""
    results = []
    for callbacks in ([], [lq.DelayedQATStart(1000), lq.ObserverCalibration(3)]):
        L.seed_everything(3, verbose=False)
        module = Stateful()
        module.load_state_dict(Classifier().state_dict(), strict=False)
        run = trainer(tmp_path, callbacks, max_epochs=2, num_sanity_val_steps=0)
        generator = torch.Generator().manual_seed(5)
        run.fit(module, DataLoader(data(), batch_size=4, shuffle=True, generator=generator))
        results.append(
            (lq.float_state_dict(module.state_dict()), {k: v.item() for k, v in run.callback_metrics.items()})
        )
    (plain, plain_metrics), (ours, our_metrics) = results
    assert plain_metrics == our_metrics
    assert plain.keys() == ours.keys()
    assert all(torch.equal(plain[k], ours[k]) for k in plain)


def test_calibration_sees_training_batches_only(tmp_path):
    module = Classifier()
    run = trainer(tmp_path, [lq.ObserverCalibration(2), lq.FreezeQuantization(0)])
    bad = DataLoader(torch.utils.data.TensorDataset(torch.full((4, 1, 8, 8), 1e6), torch.zeros(4).long()), batch_size=4)
    run.fit(module, loader(), bad)
    first = torch.cat([x for x, _ in itertools.islice(loader(), 2)])
    low = [x.min() for x, _ in itertools.islice(loader(), 2)]
    expected = low[0].lerp(low[1], 0.5)  # both count alike
    assert torch.equal(module.conv.input_quantizer.observer.min_val, expected)
    assert module.conv.input_quantizer.scale < first.abs().max() * 2 / 200


def test_calibration_with_a_forward_of_the_user(tmp_path):
    calls = []
    forward = lambda module, batch: calls.append(module(batch[0]))  # noqa: E731
    fit(tmp_path, [lq.ObserverCalibration(3, forward=forward)])
    assert len(calls) == 3


class Gan(Classifier):
    """Two optimizers, manual optimization, several forwards a step."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.other = nn.Linear(2, 2)

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        for optimizer in (first, second):
            self.toggle_optimizer(optimizer)
            loss = nn.functional.cross_entropy(self.other(self(batch[0])), batch[1])
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self):
        return torch.optim.SGD(self.other.parameters(), 0.1), torch.optim.SGD(
            [*self.conv.parameters(), *self.head.parameters()], 0.1
        )


def test_manual_optimization_calibrates_without_stepping(tmp_path):
    module = Gan()
    start = copy.deepcopy(module.other.state_dict())
    fit(tmp_path, [lq.QuantizationAwareTraining("int8", calibration_batches=4)], module, limit_train_batches=1)
    assert module.conv.input_quantizer.calibrated
    plain = Gan()
    plain.other.load_state_dict(start)
    assert not torch.equal(module.other.weight, start["weight"])


def test_layers_built_in_configure_model_and_setup(tmp_path):
    class Late(Classifier):
        def setup(self, stage):
            if not hasattr(self, "late"):
                self.late = nn.Linear(2, 2)

        def configure_model(self):
            if not hasattr(self, "later"):
                self.later = nn.Linear(2, 2)

        def forward(self, x):
            return self.later(self.late(super().forward(x)))

    module = fit(tmp_path, [lq.QuantizationAwareTraining("int8")], Late())
    assert isinstance(module.late, lq.QATLinear)
    assert isinstance(module.later, lq.QATLinear)
    assert "configure_model" not in module.__dict__
    trainer(tmp_path, [lq.QuantizationAwareTraining("int8")]).test(module, loader(8), verbose=False)


def test_a_checkpoint_alone_restores_the_phase(tmp_path):
    saver = ModelCheckpoint(tmp_path / "c", filename="last", every_n_train_steps=8)
    module = fit(tmp_path, [lq.QuantizationAwareTraining("int8", freeze_step=4), saver], enable_checkpointing=True)
    fresh = Classifier(seed=5)
    run = trainer(tmp_path, [lq.QuantizationAwareTraining("int8", freeze_step=4)])
    run.test(fresh, loader(8), ckpt_path=tmp_path / "c" / "last.ckpt", verbose=False, weights_only=True)
    assert fresh.record[-1][2] == (True, True, 8, False)
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(fresh.eval()(x), module.eval()(x))


def test_evaluating_a_float_model_under_the_callback_is_float_with_a_warning(tmp_path):
    module, twin = Classifier(), Classifier()
    run = trainer(tmp_path, [lq.QuantizationAwareTraining("int8")])
    with pytest.warns(UserWarning, match="evaluating in float"):
        run.test(module, loader(8), verbose=False)
    ours = torch.cat(run.predict(module, loader(8)))
    assert torch.equal(ours, torch.cat(trainer(tmp_path).predict(twin, loader(8))))
    run.fit(module, loader(), loader(8))
    assert module.record[-1][2][0]


def test_explain_says_what_happens_when(tmp_path):
    qat = lq.QuantizationAwareTraining("int8", start_step=0.5, freeze_step="2 epochs")
    assert "50% of the run" in qat.explain()
    run = trainer(tmp_path, [lq.ProgressiveBitReduction({4: 6}), qat], max_epochs=3)
    run.fit(Classifier(), loader())
    text = qat.explain(run)
    for expected in ("step 12  ", "step 16  ", "weights at 6 bits", "calibrate", "no state_dict", "BatchNorm"):
        assert expected in text, text


def test_explain_names_what_is_added_to_training(tmp_path):
    qat = lq.QuantizationAwareTraining(lq.QATConfig("int8", learnable_step_size=True))
    others = [
        lq.LearnedScales(lr=1e-3, clip=None),
        lq.QuantizationPenalty(alpha=0.1),
        lq.SelfDistillation(weight=0.5, teacher="start", task_weight=0.0),
        lq.WeightOscillation(dampening=0.2, freeze_threshold=0.05),
    ]
    lines = qat.explain(trainer(tmp_path, [qat, *others])).splitlines()
    said = [line.split("  ")[-1] for line in lines if "while quantized" in line]
    assert said == [
        "scales learn by gradient, at a rate of 0.001, gradients not clipped",
        "the loss has 0.1 times the mean over layers of the weights' quantization error",
        "the float forward of the weights the fit began with teaches, 0.5 times kl, the loss of the task 0 times",
        "weights that flip between two codes are measured, dampened by 0.2, frozen from a frequency of 0.05 on",
    ]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: lq.QuantizationAwareTraining("int9"), "preset='int9' is not known"),
        (lambda: lq.QuantizationAwareTraining("int8", start_step=-1), "start_step=-1"),
        (lambda: lq.QuantizationAwareTraining("int8", calibration_batches=1.5), "calibration_batches=1.5"),
        (lambda: lq.ObserverCalibration(0), "batches=0"),
        (lambda: lq.DelayedQATStart("soon"), "step='soon'"),
        (lambda: lq.FreezeQuantization(1, scales=False, batch_norm=False), "freezes nothing"),
        (lambda: lq.ProgressiveBitReduction({}), "bits={}"),
        (lambda: lq.ProgressiveBitReduction({0: 1}), r"bits\[0\]=1"),
        (lambda: lq.ProgressiveBitReduction({1.5: 8}), "step=1.5"),
    ],
)
def test_bad_settings_raise_when_made(build, message):
    with pytest.raises(ValueError, match=message):
        build()

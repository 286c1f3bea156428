"""``SelfDistillation`` is the distillation loss added by hand, and leaves everything else as it was."""

import copy
import random
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from classifier import Classifier, data
from distilled import (
    WEIGHT,
    ByHand,
    ByHandMSE,
    Student,
    assert_same_training,
    fit,
    ours,
    qat,
    same_bits,
    state,
    stateful,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

import lightning_qat as lq
from lightning_qat.testing import assert_rank_equal, assert_resume_exact

OPTIONS = {
    "plain": {},
    "accumulation": {"accumulate_grad_batches": 3},
    "clipped": {"gradient_clip_val": 0.1},
    "two epochs": {"max_epochs": 2, "accumulate_grad_batches": 2},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("loss", ["kl", "mse"])
def test_it_is_the_loss_added_by_hand(tmp_path, options, loss):
    without, by_hand, mine = Student(), ByHand() if loss == "kl" else ByHandMSE(), Student()
    fit(tmp_path, without, **options)
    fit(tmp_path, by_hand, **options)
    fit(tmp_path, mine, ours(loss=loss), **options)
    assert (without.head.weight - by_hand.head.weight).abs().max() > 1e-4  # the witness does something
    assert_same_training(mine, by_hand)


def test_with_bf16_and_with_a_loss_scale(tmp_path):
    """One step: bfloat16 rounds each of the gradients by 0.4 %; a loss scale forgotten is a factor of 1024."""
    for scaled in (False, True):
        found = []
        for module, callbacks in ((Student(), []), (ByHand(), []), (Student(), [ours()])):
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
            plugins = [MixedPrecision("16-mixed", "cpu", scaler)] if scaled else []
            options = {"plugins": plugins, "precision": None} if scaled else {"precision": "bf16-mixed"}
            fit(tmp_path, module, *callbacks, limit_train_batches=1, **options)
            found.append(module.head.weight.detach())
        without, by_hand, mine = found
        effect = (without - by_hand).abs().max()
        assert effect > 1e-3
        assert (mine - by_hand).abs().max() < 0.2 * effect


@pytest.mark.parametrize("order", [0, 1])
def test_weight_0_changes_no_bit(tmp_path, order):
    """Not of the weights, BatchNorm, ranges, the random stream, nor of what QuantizationMonitor measures."""
    found = []
    for distill in (False, True):
        module, monitor = Student(), lq.QuantizationMonitor(1, most_share=None)
        callbacks = [monitor, lq.SelfDistillation(0.0)] if distill else [monitor]
        run = fit(tmp_path, module, *callbacks[:: -1 if order else 1], rules=qat(2), max_epochs=2, precision=32)
        numbers = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
        found.append((module, numbers, monitor.table))
        assert ("quantization/distillation_loss" in run.callback_metrics) == distill
    (one, numbers, table), (other, our_numbers, our_table) = found
    assert same_bits(one, other)
    assert torch.equal(numbers[0], our_numbers[0])
    assert numbers[1:] == our_numbers[1:]
    assert table == our_table
    assert one.record == other.record


def test_nothing_is_done_in_the_float_phase(tmp_path, recwarn):
    without, mine = Student(), Student()
    fit(tmp_path, without, rules=qat(100))
    run = fit(tmp_path, mine, ours(), rules=qat(100))
    assert same_bits(without, mine)
    assert "quantization/distillation_loss" not in run.callback_metrics
    by_hand, late = ByHand(), Student()
    fit(tmp_path, by_hand, rules=qat(4))
    fit(tmp_path, late, ours(), rules=qat(4))
    assert_same_training(late, by_hand)
    # When the last batch of the float phase ends, that of the next has begun already.
    assert not [w for w in recwarn if "nothing is distilled" in str(w.message)]


def test_what_is_logged_is_the_loss(tmp_path):
    class Logged(ByHand):
        def distance(self, student, teacher):
            self.seen = super().distance(student, teacher)
            return self.seen

    by_hand = Logged()
    fit(tmp_path, by_hand)
    run = fit(tmp_path, Student(), ours(), logger=CSVLogger(tmp_path))
    assert run.callback_metrics["quantization/distillation_loss"].item() == pytest.approx(by_hand.seen.item(), rel=1e-6)
    run.logger.save()
    header = next(tmp_path.rglob("metrics.csv")).read_text().splitlines()[0]
    assert "quantization/distillation_loss" in header.split(",")


class Wrapped(Student):
    """Calls a module of its own, which returns what a user may return."""

    class Net(nn.Module):
        def __init__(self, parts, kind):
            super().__init__()
            self.conv, self.bn, self.head, self.dropout = parts
            self.kind, self.calls = kind, []

        def forward(self, *, images):
            self.calls.append(len(images))
            out = self.head(self.dropout(F.relu(self.bn(self.conv(images))).mean((2, 3))))
            kinds = {"dict": {"logits": out, "n": 1}, "tuple": (None, out), "object": SimpleNamespace(logits=out)}
            return kinds.get(self.kind, out)

    def __init__(self, kind="tensor"):
        super().__init__()
        self.kind = kind
        self.net = self.Net((self.conv, self.bn, self.head, self.dropout), kind)

    def training_step(self, batch, batch_idx):
        out = self.net(images=batch[0])
        out = {"dict": lambda: out["logits"], "tuple": lambda: out[1], "object": lambda: out.logits}.get(
            self.kind, lambda: out
        )()
        return F.cross_entropy(out, batch[1])


@pytest.mark.parametrize(("kind", "part"), [("tensor", 0), ("dict", 0), ("tuple", 1), ("tuple", -1), ("object", 0)])
def test_a_named_module_with_any_output(tmp_path, kind, part):
    by_hand, mine = ByHand(), Wrapped(kind)
    fit(tmp_path, by_hand)
    options = {"output": part} if kind == "tuple" else {}
    fit(tmp_path, mine, ours(layers="net", **options))
    for name in ("conv", "head", "bn"):
        for key, value in state(by_hand.get_submodule(name)).items():
            torch.testing.assert_close(state(mine.get_submodule(name))[key], value, rtol=1e-7, atol=1e-10)
    assert mine.net.calls == [4] * 8  # neither calibration nor the teacher leaves an entry
    assert not mine.net._forward_hooks
    assert not mine.net._forward_pre_hooks


def test_two_views_in_one_step_and_a_layer_inside(tmp_path):
    """Twice through BatchNorm in a step; buffers that a graph holds may not be written."""

    class Views(Student):
        def training_step(self, batch, batch_idx):
            return F.mse_loss(self(batch[0]), self(batch[0].flip(-1))) + super().training_step(batch, batch_idx)

    without, mine = Views(), Views()
    fit(tmp_path, without)
    run = fit(tmp_path, mine, lq.SelfDistillation(0.0), lq.SelfDistillation(0.0, layers=["conv", "head"], loss="mse"))
    assert same_bits(without, mine)
    assert run.callback_metrics["quantization/distillation_loss"] > 0
    fit(tmp_path, mine, ours())
    assert not same_bits(without, mine)


class Manual(Student):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


def _manual_by_hand():
    class Made(ByHand):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    return Made()


def test_by_hand_optimization(tmp_path):
    by_hand, mine = _manual_by_hand(), Manual()
    fit(tmp_path, by_hand)
    fit(tmp_path, mine, ours())
    assert_same_training(mine, by_hand)


def test_a_backward_pass_that_is_run_twice_adds_it_once(tmp_path):
    class Twice(Student):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            loss = super().training_step(batch, batch_idx)
            self.manual_backward(loss / 2, retain_graph=True)
            self.manual_backward(loss / 2)
            optimizer.step()

    by_hand, mine = _manual_by_hand(), Twice()
    fit(tmp_path, by_hand, limit_train_batches=3)
    fit(tmp_path, mine, ours(), limit_train_batches=3)
    assert_same_training(mine, by_hand)


def distilled():
    return [lq.SelfDistillation(WEIGHT), qat(2)]


def test_it_resumes_exactly(tmp_path):
    assert_resume_exact(Student, stateful, distilled, (1, 3, 8), folder=tmp_path)


class Plain(Classifier):
    def __init__(self):
        super().__init__()
        self.bn = nn.Identity()

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        seen = self.trainer.callback_metrics.get("quantization/distillation_loss")
        if batch_idx == 3 and self.trainer.current_epoch == 1 and not (seen is not None and seen > 0):
            raise RuntimeError("nothing was distilled")
        return loss


def shuffled():
    return DataLoader(data(16), batch_size=2, shuffle=True)


@pytest.mark.slow
def test_all_ranks_have_the_same_and_distill(tmp_path):
    """DDP lets ``forward`` stand for ``training_step`` for a moment."""
    assert_rank_equal(Plain, shuffled, distilled, folder=tmp_path)


def test_copies_of_the_module_are_not_taught(tmp_path):
    class Copy(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            copy.deepcopy(pl_module)
            copy.deepcopy(pl_module.conv)(batch[0])
            lq.convert(pl_module).conv(batch[0])

    found = []
    for others in ([], [Copy()]):
        run = fit(tmp_path, Student(), ours(layers="conv", loss="mse"), *others)
        found.append(run.callback_metrics["quantization/distillation_loss"].item())
    assert found[0] == found[1] > 0


def test_with_learned_scales(tmp_path):
    config = lq.QATConfig("int8", bits=3, learnable_step_size=True)
    by_hand, mine = ByHand(), Student()
    for module, callbacks in ((by_hand, []), (mine, [ours()])):
        fit(tmp_path, module, *callbacks, rules=lq.QuantizationAwareTraining(config, certify=False))
    assert_same_training(mine, by_hand)


def test_a_compiled_part_of_the_module(tmp_path):
    """A compiled graph rounds otherwise, so one step is looked at; the teacher is not compiled."""
    found = []
    for compiled, callbacks in ((False, []), (False, [ours(layers="net")]), (True, []), (True, [ours(layers="net")])):
        module = Wrapped()
        module.dropout.p = 0.0
        if compiled:
            module.net = torch.compile(module.net, backend="eager")
        fit(tmp_path, module, *callbacks, precision=32, limit_train_batches=1)
        found.append(module.head.weight.detach())
    effect, compiled_effect = found[1] - found[0], found[3] - found[2]
    assert effect.abs().max() > 5e-4
    torch.testing.assert_close(compiled_effect, effect, rtol=1e-3, atol=1e-5)


def test_faults_are_told(tmp_path):
    for options, message in (
        ({"weight": -1}, "weight=-1"), ({"temperature": 0}, "temperature=0"), ({"loss": "l1"}, "loss='l1'"),
        ({"layers": []}, r"layers=\[\]"), ({"layers": [1]}, r"layers=\[1\]"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            lq.SelfDistillation(**options)
    with pytest.raises(ValueError, match="layers='nat': Wrapped has no such module; nearest: 'net'"):
        fit(tmp_path, Wrapped(), ours(layers="nat"))
    with pytest.raises(ValueError, match=r"returned a tuple, of which output='logits'"):
        fit(tmp_path, Wrapped("tuple"), ours(layers="net"))
    with pytest.warns(UserWarning, match=r"called no forward of the LightningModule.*layers='model'"):
        fit(tmp_path, Wrapped(), ours())
    with pytest.raises(ValueError, match=r"called no forward.*With task_weight=0 the task's own loss would train"):
        fit(tmp_path, Wrapped(), ours(task_weight=0.0))


class Checkpointed(Classifier):
    def forward(self, x):
        return self.head(checkpoint(self.conv, x.requires_grad_(), use_reentrant=False).mean((2, 3)))


class InPlace(Classifier):
    def forward(self, x):
        return super().forward(x.mul_(2))


def test_forwards_that_cannot_be_run_twice_are_told(tmp_path):
    with pytest.raises(RuntimeError, match="run again in the backward pass"):
        fit(tmp_path, Checkpointed(), ours(layers="conv", loss="mse"))
    with pytest.raises(RuntimeError, match="the forward of InPlace changes its input in place"):
        fit(tmp_path, InPlace(), ours())


@pytest.mark.parametrize("other", [{"loss": "mse"}, {"temperature": 2.0}, {"teacher": "start"}, {"class_dim": 1}])
def test_one_output_may_be_distilled_twice(other):
    first, second = lq.SelfDistillation(), lq.SelfDistillation(**other)
    L.Trainer(callbacks=[first, second], logger=False, enable_checkpointing=False, accelerator="cpu")
    assert first.state_key != second.state_key
    resumed = {"weight": 2.0, "task_weight": 0.5, **({"temperature": 3.0} if "teacher" in other else {})}
    assert lq.SelfDistillation(**{**other, **resumed}).state_key == second.state_key

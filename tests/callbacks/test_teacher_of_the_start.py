"""``SelfDistillation(teacher="start")``: the weights that the fit began with teach, and nothing else changes."""

import copy

import pytest
import torch
from classifier import data
from distilled import WEIGHT, ByHand, Student, assert_same_training, fit, ours, qat, state, stateful
from torch import nn
from torch.nn import functional as F

import lightning_qat as lq
from lightning_qat.testing import assert_resume_exact
from lightning_qat.transforms.distillation import as_teacher, weights_of, with_weights


class ByHandStart(ByHand):
    """The teacher is a model with the weights that the fit began with, in evaluation mode."""

    share = 1.0

    def on_fit_start(self):  # before the ranges are calibrated
        self.twin[0].double().eval().load_state_dict(lq.float_state_dict(self.state_dict()))

    def training_step(self, batch, batch_idx):
        student = self(batch[0])
        with torch.no_grad():
            teacher = self.twin[0](batch[0])
        return self.share * F.cross_entropy(student, batch[1]) + WEIGHT * self.distance(student, teacher)


class ByHandStartAlone(ByHandStart):
    share = 0.0


@pytest.mark.parametrize(("by_hand", "task_weight"), [(ByHandStart, 1.0), (ByHandStartAlone, 0.0)])
def test_a_teacher_of_the_start(tmp_path, by_hand, task_weight):
    wanted, mine, other = by_hand(), Student(), Student()
    fit(tmp_path, wanted, max_epochs=2)
    fit(tmp_path, mine, ours(teacher="start", task_weight=task_weight), max_epochs=2)
    assert_same_training(wanted, mine)
    fit(tmp_path, other, ours(task_weight=task_weight), max_epochs=2)
    assert not torch.allclose(other.conv.weight, mine.conv.weight, rtol=1e-4)


def test_a_second_fit_has_a_teacher_of_its_own(tmp_path):
    callback, module = ours(teacher="start"), Student()
    fit(tmp_path, module, callback)
    before = state(module)["conv.weight"]
    fit(tmp_path, module, callback, rules=qat())
    assert torch.equal(callback.state_dict()["start"][""]["conv.weight"], before)
    assert not torch.equal(module.conv.weight, before)


def from_the_start():
    return [lq.SelfDistillation(WEIGHT, teacher="start"), qat(2)]


def test_with_a_teacher_of_the_start_it_resumes_exactly(tmp_path):
    assert_resume_exact(Student, stateful, from_the_start, (1, 3, 8), folder=tmp_path)


def test_a_teacher_of_the_start_leaves_what_it_swaps(tmp_path):
    """A recurrent layer holds its parameters in a list of its own, and BatchNorm counts batches."""

    class Recurrent(Student):
        def __init__(self):
            super().__init__()
            self.rnn = nn.LSTM(8, 8, batch_first=True)

        def forward(self, x):
            return super().forward(x) + self.rnn(x.flatten(2)[:, :, :8])[0].mean()

    module = Recurrent()
    wanted = copy.deepcopy(module).eval()
    lq.prepare(module, "int8")
    kept, x = weights_of(module), torch.randn(2, *data(2)[0][0].shape)
    with torch.no_grad():
        for parameter in module.rnn.parameters():
            parameter.mul_(3)
        module.conv.weight.mul_(2)
    before = state(module)
    with as_teacher(module), with_weights(module, kept):
        said = module.forward(x)
    assert torch.equal(said, wanted(x))
    assert all(part.training for part in module.modules())
    assert all(torch.equal(value, before[name]) for name, value in state(module).items())

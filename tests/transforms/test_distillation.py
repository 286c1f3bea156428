"""The teacher is the float model of the same weights and leaves no trace; its lesson is the gradient of a loss."""

import random

import pytest
import torch
from distilled import Student, state
from torch import nn

import lightning_qat as lq
from lightning_qat.transforms.distillation import as_teacher, distillation_gradient, weights_of, with_weights


def test_the_teacher_is_the_float_model():
    module = lq.prepare(Student().double().eval(), "int8")
    x = torch.randn(3, 1, 8, 8, dtype=torch.float64)
    twin = Student().double().eval()
    twin.load_state_dict(lq.float_state_dict(module.state_dict()))
    with as_teacher(module):
        assert torch.equal(module(x), twin(x))


def test_the_teacher_leaves_no_trace():
    module = lq.prepare(Student(), lq.QATConfig("int8", observer_momentum=0.5))
    module.notes, module.bn.momentum = [1], None
    module.head.register_forward_hook(lambda *_: module.notes.append(2))
    module.head.register_forward_hook(lambda *_: setattr(module, "late", torch.rand(1)))
    module(torch.randn(4, 1, 8, 8))
    module.notes.clear()
    del module.late
    before, numbers = state(module), torch.get_rng_state()
    buffers = {name: (buffer, buffer._version) for name, buffer in module.named_buffers()}
    extra = module.conv.input_quantizer.get_extra_state()

    numbers_of_python = random.getstate()

    def lesson():
        with as_teacher(module):
            random.random()
            assert not module(torch.randn(4, 1, 8, 8) * 9).requires_grad
            raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        lesson()
    assert module.notes == []
    assert not hasattr(module, "late")
    assert torch.equal(torch.get_rng_state(), numbers)
    assert random.getstate() == numbers_of_python
    assert all(torch.equal(value, before[name]) for name, value in state(module).items())
    for name, buffer in module.named_buffers():
        assert buffer is buffers[name][0]
        assert buffer._version == buffers[name][1]
    assert extra["calibrated"]
    assert module.conv.input_quantizer.get_extra_state() == extra


@pytest.mark.parametrize("loss", ["kl", "mse"])
@pytest.mark.parametrize("shape", [(5, 3), (2, 4, 3), (3,), (0, 3)])
def test_the_gradient_is_autograds(loss, shape):
    torch.manual_seed(0)
    student, teacher = (torch.randn(shape, dtype=torch.float64, requires_grad=r) for r in (True, False))
    value, gradient = distillation_gradient(student, teacher, loss, 2.5)
    if loss == "mse":
        expected = (student - teacher).square().mean()
    else:
        wanted = (teacher / 2.5).softmax(-1)
        told = (student / 2.5).log_softmax(-1)
        expected = (wanted * (wanted.log() - told)).sum() * 2.5**2 / max(student.numel() // 3, 1)
    if student.numel():
        torch.testing.assert_close(value, expected.detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, student)[0], rtol=1e-9, atol=1e-12)
    if len(shape) == 3 and loss == "kl":
        moved = distillation_gradient(student.movedim(-1, 1), teacher.movedim(-1, 1), loss, 2.5, class_dim=1)
        torch.testing.assert_close(moved[1].movedim(1, -1), gradient)


class Counts(nn.Module):
    """Writes to a buffer, in evaluation mode too."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 2)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls.add_(1)
        return self.head(x) * self.calls


def test_kept_weights_and_buffers_stay_as_they_were():
    model, x = lq.prepare(Counts(), "int8_dynamic"), torch.randn(3, 4)
    weights = weights_of(model)
    before = {name: tensor.clone() for name, tensor in weights.items()}
    with as_teacher(model), with_weights(model, weights):
        first = model(x)
    with as_teacher(model), with_weights(model, weights):
        assert torch.equal(model(x), first)
    assert all(torch.equal(weights[name], tensor) for name, tensor in before.items())
    assert not model.calls


def test_what_came_since_the_weights_were_kept_is_named():
    model = lq.prepare(Counts(), "int8_dynamic")
    weights, training = weights_of(model), model.training
    model.head.register_buffer("mask", torch.ones(2))
    with pytest.raises(ValueError, match=r"'head.mask' has come to Counts"), with_weights(model, weights):
        pass
    assert model.training is training

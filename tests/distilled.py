"""Students for the tests of self-distillation, and the distillation added by hand."""

import lightning as L
import torch
from classifier import Classifier, data, loader, trainer
from torch import nn
from torch.nn import functional as F
from torchdata.stateful_dataloader import StatefulDataLoader

import lightning_qat as lq

WEIGHT, TEMPERATURE = 2.0, 3.0


class Student(Classifier):
    """With dropout, which the teacher has to repeat."""

    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.4)

    def forward(self, x):
        return self.head(self.dropout(F.relu(self.bn(self.conv(x))).mean((2, 3))))


class ByHand(Student):
    """The teacher is a float model with the same weights; the loss a graph of ordinary operations."""

    divisor = 1.0

    def __init__(self):
        super().__init__()
        self.twin = [Student()]  # in a list, so that it is no part of this module

    def training_step(self, batch, batch_idx):
        state = torch.get_rng_state()
        student = self(batch[0])
        after = torch.get_rng_state()
        loss = F.cross_entropy(student, batch[1])
        if not self.conv.weight_quantizer.quantizing or not torch.is_grad_enabled():
            return loss
        twin = self.twin[0].to(student.dtype).train()
        twin.load_state_dict(lq.float_state_dict(self.state_dict()))
        torch.set_rng_state(state)
        with torch.no_grad():
            teacher = twin(batch[0])
        torch.set_rng_state(after)
        return loss + WEIGHT / self.divisor * self.distance(student, teacher)

    def distance(self, student, teacher):
        told, wanted = F.log_softmax(student / TEMPERATURE, -1), F.softmax(teacher / TEMPERATURE, -1)
        return F.kl_div(told, wanted, reduction="batchmean") * TEMPERATURE**2


class ByHandMSE(ByHand):
    def distance(self, student, teacher):
        return F.mse_loss(student, teacher)


def qat(start_step=0, bits=3):
    config = lq.QATConfig("int8", bits=bits, start_step=start_step)
    return lq.QuantizationAwareTraining(config, certify=False)


def fit(tmp_path, module, *callbacks, rules=None, train=None, **options):
    L.seed_everything(3, verbose=False)
    run = trainer(tmp_path, [rules or qat(), *callbacks], **{"precision": "64-true", **options})
    run.fit(module, train or loader())
    return run


def ours(**options):
    return lq.SelfDistillation(WEIGHT, TEMPERATURE, **options)


def state(module):
    tensors = {name: value for name, value in module.state_dict().items() if isinstance(value, torch.Tensor)}
    return {name: value.clone() for name, value in tensors.items()}


def assert_same_training(one, other, rtol=1e-7, atol=1e-10):
    mine, theirs = state(one), state(other)
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        torch.testing.assert_close(value, theirs[name], rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


def same_bits(one, other):
    mine, theirs = state(one), state(other)
    return mine.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in mine.items())


def stateful():
    return StatefulDataLoader(data(24), batch_size=4, shuffle=True)

"""A LightningModule on vectors, for the tests that build it in every way there is."""

import lightning as L
import torch
from classifier import trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import lightning_qat as lq
from lightning_qat.nn import QuantizedLayer

#: Float rounding of one model and of its converted twin, end to end.
SAME = {"rtol": 1e-4, "atol": 1e-5}


def samples(count=16, features=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, features, generator=generator)
    return [{"x": a, "y": (a.sum() > 0).long()} for a in x]


def batches(count=16, features=8, seed=0):
    return DataLoader(samples(count, features, seed), batch_size=4)


class Base(L.LightningModule):
    """A module whose network is ``self.logits``; what a test changes, a subclass overrides."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.validated = []
        self.build()

    def build(self):
        self.net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))

    def logits(self, x):
        return self.net(x)

    def loss(self, batch):
        return F.cross_entropy(self.logits(batch["x"]), batch["y"])

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.validated.append(batch_idx)
        self.log("val/loss", self.loss(batch))

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.05)


def fit(tmp_path, module, plan="int8", train=None, val=None, **kwargs):
    qat = lq.QuantizationAwareTraining(plan, calibration_batches=2)
    run = trainer(tmp_path, [qat], **kwargs)
    run.fit(module, batches() if train is None else train, batches(8, seed=1) if val is None else val)
    return qat


def assert_ships(module, qat, run=lambda module, x: module.logits(x)):
    """The certificate passed, and the converted model computes what the fake-quantized one does."""
    assert qat.certificate is not None
    assert qat.certificate.passed
    assert module.validated
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(7))
    converted = lq.convert(module)
    module.eval()
    with torch.no_grad():
        torch.testing.assert_close(run(converted, x), run(module, x), **SAME)
    layers = [m for m in converted.modules() if isinstance(m, QuantizedLayer)]
    assert layers
    return converted

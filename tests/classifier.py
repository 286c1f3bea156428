"""LightningModules for the tests of the callbacks."""

import lightning as L
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset


def data(samples=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 1, 8, 8, generator=generator)
    return TensorDataset(x, (x.mean((1, 2, 3)) > 0).long())


def loader(samples=32, batch_size=4, shuffle=False, seed=0):
    return DataLoader(data(samples, seed), batch_size=batch_size, shuffle=shuffle)


class Classifier(L.LightningModule):
    """conv-bn-relu-linear, unaware of quantization; records what its evaluation saw."""

    def __init__(self, lr=0.05, seed=0):
        super().__init__()
        self.lr = lr
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.conv, self.bn, self.head = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)
        self.record = []

    def forward(self, x):
        return self.head(F.relu(self.bn(self.conv(x))).mean((2, 3)))

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("train/loss", loss)
        self.record.append(("train", self.trainer.global_step, self.phase()))
        return loss

    def validation_step(self, batch, batch_idx):
        self.record.append(
            ("sanity" if self.trainer.sanity_checking else "val", self.trainer.global_step, self.phase())
        )
        self.log("val/loss", F.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch, batch_idx):
        self.record.append(("test", self.trainer.global_step, self.phase()))
        self.log("test/loss", F.cross_entropy(self(batch[0]), batch[1]))

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)

    def phase(self):
        quantizer = getattr(self.head, "weight_quantizer", None)
        if quantizer is None:
            return None
        return quantizer.quantizing, quantizer.frozen, quantizer.bits, self.bn.training


def trainer(tmp_path, callbacks=(), **kwargs):
    defaults = dict(
        max_epochs=1, logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
        enable_checkpointing=False, default_root_dir=tmp_path, log_every_n_steps=1,
    )  # fmt: skip
    return L.Trainer(callbacks=list(callbacks), **{**defaults, **kwargs})


class StopBeforeEpoch(L.Callback):
    """Breaks a run off as Ctrl-C would."""

    def __init__(self, epoch):
        self.epoch = epoch

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            raise KeyboardInterrupt

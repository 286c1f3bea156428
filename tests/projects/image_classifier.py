"""Handwritten digits with a small convolutional network."""

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split
from torchmetrics.classification import MulticlassAccuracy


class Digits(L.LightningDataModule):
    def __init__(self, batch_size=64, samples=900):
        super().__init__()
        self.batch_size, self.samples = batch_size, samples

    def setup(self, stage):
        digits = load_digits()
        images = torch.tensor(digits.images[: self.samples], dtype=torch.float32).unsqueeze(1) / 16
        dataset = TensorDataset(images, torch.tensor(digits.target[: self.samples]))
        self.train, self.val = random_split(dataset, [0.8, 0.2], torch.Generator().manual_seed(0))

    def train_dataloader(self):
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.val, self.batch_size)

    test_dataloader = val_dataloader


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x):
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class ImageClassifier(L.LightningModule):
    def __init__(self, channels=8, lr=0.01):
        super().__init__()
        self.save_hyperparameters()
        self.stem = nn.Sequential(nn.Conv2d(1, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU())
        self.block, self.head = Block(channels), nn.Linear(4 * channels, 10)
        self.accuracy = nn.ModuleDict({name: MulticlassAccuracy(10) for name in ("train_", "val_", "test_")})

    def forward(self, images):
        return self.head(F.adaptive_max_pool2d(self.block(self.stem(images)), 2).flatten(1))

    def step(self, batch, stage):
        images, labels = batch
        logits = self(images + 0.05 * torch.randn_like(images) if stage == "train" else images)
        loss = F.cross_entropy(logits, labels)
        self.accuracy[f"{stage}_"](logits, labels)
        self.log(f"{stage}/loss", loss)
        self.log(f"{stage}/accuracy", self.accuracy[f"{stage}_"], on_step=False, on_epoch=True)
        return loss

    def training_step(self, batch, batch_idx):
        return self.step(batch, "train")

    def validation_step(self, batch, batch_idx):
        self.step(batch, "val")

    def test_step(self, batch, batch_idx):
        self.step(batch, "test")

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)
        total = self.trainer.estimated_stepping_batches
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.hparams.lr, total_steps=total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def train(*callbacks, **options):
    L.seed_everything(0, verbose=False)
    trainer = L.Trainer(max_epochs=4, gradient_clip_val=1.0, callbacks=[*callbacks], **options)
    model = ImageClassifier()
    trainer.fit(model, Digits())
    return trainer, model

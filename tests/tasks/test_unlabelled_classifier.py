"""What it was teaches what it is, without labels; those with a label are counted."""

from __future__ import annotations

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_qat.tasks import UnlabelledClassifier


def classifier() -> UnlabelledClassifier:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    return UnlabelledClassifier(network, lr=0.01, weight_decay=0.0)


def fit(task: UnlabelledClassifier, labels: torch.Tensor) -> L.Trainer:
    loader = DataLoader(TensorDataset(torch.randn(len(labels), 1, 8, 8), labels), batch_size=2)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = L.Trainer(max_epochs=1, enable_model_summary=False, **quiet)  # type: ignore[arg-type]
    trainer.fit(task, loader, loader)
    return trainer


def test_it_becomes_what_it_was() -> None:
    task, original = classifier(), classifier().eval()
    with torch.no_grad():
        task.model[4].weight.add_(0.1)
    assert not {id(p) for p in task._teacher[0].parameters()} & {id(p) for p in task.parameters()}
    assert set(task.state_dict()) == set(original.state_dict())
    images = torch.randn(50, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    distance = nn.functional.mse_loss(task.eval()(images), original(images))
    statistics = task.model[1].running_mean.clone()
    trainer = fit(task, torch.full((64,), -1))
    assert nn.functional.mse_loss(task.eval()(images), original(images)) < distance / 2
    assert not torch.equal(task.model[1].running_mean, statistics)
    assert torch.equal(task._teacher[0][1].running_mean, original.model[1].running_mean)
    assert "val/acc" not in trainer.callback_metrics  # there is none


def test_only_those_with_labels_are_counted() -> None:
    task = classifier()
    images = torch.randn(4, 1, 8, 8)
    right = task.eval()(images).argmax(1)
    labels = torch.stack([right[0], (right[1] + 1) % 3, torch.tensor(-1), torch.tensor(-1)])
    trainer = L.Trainer(logger=False, enable_progress_bar=False, accelerator="cpu")
    (logged,) = trainer.test(task, DataLoader(TensorDataset(images, labels), batch_size=4), verbose=False)
    assert logged["test/acc"] == 0.5

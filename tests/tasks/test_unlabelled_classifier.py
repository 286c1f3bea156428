"""Images without a label teach nothing by themselves, and the pretrained statistics stand still."""

from __future__ import annotations

import copy

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_qat.tasks import UnlabelledClassifier


def classifier() -> UnlabelledClassifier:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    return UnlabelledClassifier(network, lr=0.1, weight_decay=0.0)


def fit(task: UnlabelledClassifier, labels: torch.Tensor) -> L.Trainer:
    loader = DataLoader(TensorDataset(torch.randn(len(labels), 1, 8, 8), labels), batch_size=2)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = L.Trainer(max_epochs=1, enable_model_summary=False, **quiet)  # type: ignore[arg-type]
    trainer.fit(task, loader, loader)
    return trainer


def test_without_labels_nothing_changes() -> None:
    task = classifier()
    before = copy.deepcopy(task.model.state_dict())
    trainer = fit(task, torch.full((4,), -1))
    assert all(torch.equal(before[name], value) for name, value in task.model.state_dict().items())
    assert float(trainer.callback_metrics["train/loss"]) == 0
    assert "val/acc" not in trainer.callback_metrics  # there is none


def test_those_with_labels_teach_and_are_counted() -> None:
    task = classifier()
    before = copy.deepcopy(task.model.state_dict())
    trainer = fit(task, torch.tensor([-1, 1, 2, -1]))
    changed = {name for name, value in task.model.state_dict().items() if not torch.equal(before[name], value)}
    assert {"0.weight", "4.weight"} <= changed
    assert not {"1.running_mean", "1.running_var", "1.num_batches_tracked"} & changed
    assert float(trainer.callback_metrics["val/acc"]) in (0.0, 0.5, 1.0)
    assert float(trainer.callback_metrics["val/loss"]) == pytest.approx(float(trainer.callback_metrics["val/loss"]))

"""The classifier logs what it says, and the network has the shape and the accuracy it promises."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from lightning_qat.data import DigitsDataModule
from lightning_qat.tasks import ImageClassifier, SmallResNet


def trainer(**options: Any) -> L.Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
    }
    return L.Trainer(**{**quiet, **options})


@pytest.mark.parametrize("size", [8, 9, 28, 32])
def test_resnet_takes_images_of_any_size(size: int) -> None:
    assert SmallResNet(3, 7)(torch.randn(2, 3, size, size)).shape == (2, 7)


def test_resnet_has_the_stated_parameters() -> None:
    assert sum(p.numel() for p in SmallResNet().parameters()) == 308_074
    deeper = SmallResNet(widths=(8, 16), blocks=2)
    assert len(deeper.stages) == 4
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in deeper.modules())
    assert norms == sum(isinstance(m, nn.Conv2d) for m in deeper.modules())


@pytest.mark.parametrize("options", [{"widths": ()}, {"blocks": 0}])
def test_resnet_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        SmallResNet(**options)


def test_digits_above_97_percent() -> None:
    L.seed_everything(0, verbose=False)
    task, data, fit = ImageClassifier(SmallResNet()), DigitsDataModule(), trainer(max_epochs=6)
    fit.fit(task, datamodule=data)
    assert {"train/loss", "val/acc", "val/loss"} <= set(fit.callback_metrics)
    (logged,) = fit.test(task, datamodule=data, verbose=False)
    assert set(logged) == {"test/acc", "test/loss"}
    assert logged["test/acc"] > 0.97

    predictions = fit.predict(task, datamodule=data)
    assert predictions is not None
    logits = torch.cat(predictions)  # type: ignore[arg-type]
    labels = torch.cat([labels for _, labels in data.test_dataloader()])
    assert logits.shape == (359, 10)
    assert float((logits.argmax(1) == labels).float().mean()) == pytest.approx(logged["test/acc"], abs=1e-6)


def test_the_learning_rate_ends_at_zero() -> None:
    task = ImageClassifier(SmallResNet(widths=(4,)), lr=0.01)
    fit = trainer(max_epochs=2, limit_train_batches=3)
    fit.fit(task, datamodule=DigitsDataModule())
    (config,) = fit.lr_scheduler_configs
    assert config.scheduler.get_last_lr() == [pytest.approx(0, abs=1e-9)]


def test_predict_takes_images_without_labels() -> None:
    task = ImageClassifier(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
    images = torch.randn(2, 1, 8, 8)
    assert torch.equal(task.predict_step(images, 0), task.predict_step([images, torch.zeros(2)], 0))


@pytest.mark.parametrize("options", [{"lr": 0.0}, {"weight_decay": -1.0}])
def test_options_are_checked(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        ImageClassifier(nn.Identity(), **options)

"""An image classifier around any network that maps images to logits."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics import MeanMetric


class ImageClassifier(L.LightningModule):
    """Cross-entropy, AdamW, and a cosine that ends with the run.

    Args:
        model: maps images ``[N, C, H, W]`` to logits ``[N, classes]``.
        lr: the highest learning rate.
        weight_decay: of AdamW.
        label_smoothing: of the cross-entropy in training.

    Logs ``train/loss``, ``val/loss``, ``val/acc``, ``test/loss`` and ``test/acc``. A batch is ``(images, labels)``.
    """

    def __init__(
        self, model: nn.Module, lr: float = 2e-3, weight_decay: float = 1e-4, label_smoothing: float = 0.0
    ) -> None:
        super().__init__()
        if lr <= 0 or weight_decay < 0:
            raise ValueError(f"lr={lr!r}, weight_decay={weight_decay!r} are not allowed; use lr > 0, weight_decay >= 0")
        self.model = model
        self.lr = lr
        self.weight_decay = weight_decay
        self.label_smoothing = label_smoothing
        self.val_acc = MeanMetric()
        self.test_acc = MeanMetric()

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.model(images)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss."""
        images, labels = batch
        loss = F.cross_entropy(self(images), labels, label_smoothing=self.label_smoothing)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log loss and accuracy."""
        self._evaluate("val", batch, self.val_acc)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log loss and accuracy."""
        self._evaluate("test", batch, self.test_acc)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the logits of a batch with or without labels."""
        logits: Tensor = self(batch[0] if isinstance(batch, (tuple, list)) else batch)
        return logits

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW whose rate falls along a cosine to zero at the last step."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        steps = max(int(self.trainer.estimated_stepping_batches), 1)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _evaluate(self, part: str, batch: tuple[Tensor, Tensor], accuracy: MeanMetric) -> None:
        images, labels = batch
        self._evaluate_logits(part, self(images), labels, accuracy)

    def _evaluate_logits(self, part: str, logits: Tensor, labels: Tensor, accuracy: MeanMetric) -> None:
        accuracy.update((logits.argmax(-1) == labels).float())
        self.log(f"{part}/acc", accuracy, prog_bar=True)
        self.log(f"{part}/loss", F.cross_entropy(logits, labels), batch_size=len(labels))

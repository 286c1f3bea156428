"""Fashion-MNIST (Xiao et al., 2017): 60,000 + 10,000 pictures of clothes, read from IDX files in a folder."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_qat.data.image import ImageArrays, ImageDataModule, stratified_split

_UBYTE = 0x08


def read_idx(path: Path) -> Tensor:
    """Read an IDX file of unsigned bytes, gzipped where its name ends in ``.gz``.

    Raises:
        ValueError: the file is not IDX, holds another type, or is shorter or longer than its header says.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] != _UBYTE:
        raise ValueError(f"{path} is not an IDX file of unsigned bytes: it starts with {content[:4]!r}")
    dims = content[3]
    start = 4 + 4 * dims
    shape = struct.unpack(f">{dims}I", content[4:start]) if len(content) >= start else ()
    if len(shape) != dims or len(content) - start != int(np.prod(shape)):
        raise ValueError(f"{path} is damaged: its header says {shape}, but {max(len(content) - start, 0)} bytes follow")
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy())


class FashionMNISTDataModule(ImageDataModule):
    """Fashion-MNIST: 1 x 28 x 28, ten classes, from files that are already there.

    Args:
        root: a folder that holds the four ``*-ubyte`` or ``*-ubyte.gz`` files, itself or in ``raw/`` or
            ``FashionMNIST/raw/`` as torchvision keeps them.
        train_size: train (and validate) with only this many images, the same share of every class.
        **options: of :class:`ImageDataModule`.
    """

    def __init__(
        self, *, root: str = "/usr/share/datasets/fashion-mnist", train_size: int | None = None, **options: Any
    ) -> None:
        super().__init__(**options)
        if train_size is not None and train_size < 1:
            raise ValueError(f"train_size={train_size!r} is not allowed; use an integer of 1 or more, or None for all")
        self.root = Path(root).expanduser()
        self.train_size = train_size

    def load(self) -> tuple[ImageArrays, ImageArrays]:
        """Read the four files."""
        train, test = self._read("train"), self._read("t10k")
        if self.train_size is not None and self.train_size < len(train):
            chosen, _ = stratified_split(train.labels, [self.train_size / len(train)], self.seed)
            train = train.subset(chosen)
        return train, test

    def _read(self, part: str) -> ImageArrays:
        images = read_idx(self._find(f"{part}-images-idx3-ubyte"))
        return ImageArrays(images.unsqueeze(1), read_idx(self._find(f"{part}-labels-idx1-ubyte")).long())

    def _find(self, name: str) -> Path:
        for folder in (self.root, self.root / "raw", self.root / "FashionMNIST" / "raw"):
            for path in (folder / name, folder / f"{name}.gz"):
                if path.is_file():
                    return path
        raise FileNotFoundError(
            f"no {name}[.gz] in root={str(self.root)!r}; on Debian and Ubuntu run: "
            "apt-get install dataset-fashion-mnist; or set root to the folder that torchvision downloaded into"
        )

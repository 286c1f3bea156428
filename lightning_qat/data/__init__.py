"""Data modules of the recipes. They know nothing of quantization."""

from lightning_qat.data.digits import DigitsDataModule
from lightning_qat.data.fashion_mnist import FashionMNISTDataModule
from lightning_qat.data.image import ImageArrays, ImageDataModule, stratified_split
from lightning_qat.data.mnist5k import MNIST5kDataModule

__all__ = [
    "DigitsDataModule",
    "FashionMNISTDataModule",
    "ImageArrays",
    "ImageDataModule",
    "MNIST5kDataModule",
    "stratified_split",
]

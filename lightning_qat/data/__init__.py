"""Data modules of the recipes. They know nothing of quantization."""

from lightning_qat.data.digits import DigitsDataModule
from lightning_qat.data.fashion_mnist import FashionMNISTDataModule
from lightning_qat.data.image import ImageArrays, ImageDataModule, stratified_split
from lightning_qat.data.imagenet_samples import ImageNetSamplesDataModule
from lightning_qat.data.mnist5k import MNIST5kDataModule
from lightning_qat.data.speeches import (
    SentencesDataModule,
    SpeechesDataModule,
    drawn_windows,
    read_speech,
    speech_names,
    speech_windows,
)
from lightning_qat.data.tokenizers import byte_tokenizer, folder_tokenizer

__all__ = [
    "DigitsDataModule",
    "FashionMNISTDataModule",
    "ImageArrays",
    "ImageDataModule",
    "ImageNetSamplesDataModule",
    "MNIST5kDataModule",
    "SentencesDataModule",
    "SpeechesDataModule",
    "byte_tokenizer",
    "drawn_windows",
    "folder_tokenizer",
    "read_speech",
    "speech_names",
    "speech_windows",
    "stratified_split",
]

"""LightningModules and networks of the recipes. They know nothing of quantization."""

from lightning_qat.tasks.gpt import SmallGPT
from lightning_qat.tasks.image_classifier import ImageClassifier
from lightning_qat.tasks.language_model import LanguageModel
from lightning_qat.tasks.minilm import load_minilm
from lightning_qat.tasks.mobilenet_v2 import MobileNetV2, load_mobilenet_v2
from lightning_qat.tasks.resnet import SmallResNet
from lightning_qat.tasks.sentence_encoder import SentenceEncoder
from lightning_qat.tasks.smollm2 import load_smollm2, smollm2_tokenizer
from lightning_qat.tasks.transformers_models import load_huggingface
from lightning_qat.tasks.unlabelled_classifier import UnlabelledClassifier

__all__ = [
    "ImageClassifier",
    "LanguageModel",
    "MobileNetV2",
    "SentenceEncoder",
    "SmallGPT",
    "SmallResNet",
    "UnlabelledClassifier",
    "load_huggingface",
    "load_minilm",
    "load_mobilenet_v2",
    "load_smollm2",
    "smollm2_tokenizer",
]

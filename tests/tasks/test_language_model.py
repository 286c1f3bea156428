"""The language model logs the perplexity it has, and the small GPT sees no future."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from lightning_qat.metrics import perplexity
from lightning_qat.tasks import LanguageModel, SentenceEncoder, SmallGPT


class Logits:
    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits


class LikeTransformers(nn.Module):
    """Returns an object that has the logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> Logits:
        return Logits(self.model(ids))


def small() -> SmallGPT:
    return SmallGPT(vocabulary=13, layers=2, features=16, heads=2, context=9)


def trainer(**options: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    return L.Trainer(**{**quiet, "enable_model_summary": False, **options})


def test_the_future_is_not_seen() -> None:
    model = small()
    ids = torch.randint(13, (2, 9), generator=torch.Generator().manual_seed(0))
    logits = model(ids)
    assert logits.shape == (2, 9, 13)
    ids[:, 5] = (ids[:, 5] + 1) % 13
    changed = model(ids)
    assert torch.equal(logits[:, :5], changed[:, :5])
    assert not torch.allclose(logits[:, 5:], changed[:, 5:])


def test_the_small_gpt_has_the_stated_parameters() -> None:
    assert sum(p.numel() for p in SmallGPT().parameters()) == 875_264


@pytest.mark.parametrize("options", [{"layers": 0}, {"heads": 3}, {"vocabulary": 0}])
def test_sizes_are_checked(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        SmallGPT(**options)


def test_a_text_that_is_too_long() -> None:
    with pytest.raises(ValueError, match="a length of 10 is more than context=9"):
        small()(torch.zeros(1, 10, dtype=torch.int64))


@pytest.mark.parametrize("wrap", [nn.Identity, LikeTransformers])
def test_it_learns_and_logs_its_perplexity(wrap: Any) -> None:
    torch.manual_seed(0)
    model = small()
    task = LanguageModel(LikeTransformers(model) if wrap is LikeTransformers else model, lr=1e-2)
    windows = torch.arange(9).repeat(24, 1) + torch.randint(4, (24, 1))  # each number follows the one before it
    loader = torch.utils.data.DataLoader(list(windows), batch_size=7)  # the last batch is smaller
    fit = trainer(max_epochs=8)
    before = perplexity(model, windows)
    fit.fit(task, loader, loader)
    assert 1 < float(fit.callback_metrics["val/perplexity"]) < before
    (logged,) = fit.test(task, loader, verbose=False)
    assert set(logged) == {"test/loss", "test/perplexity"}
    assert logged["test/perplexity"] == pytest.approx(perplexity(task.eval(), windows, batch_size=5), rel=1e-5)
    assert logged["test/perplexity"] < before / 3


def test_vectors_do_not_decay() -> None:
    task = LanguageModel(small())
    fit = trainer(max_steps=1)
    fit.fit(task, torch.utils.data.DataLoader(list(torch.zeros(2, 4, dtype=torch.int64))))
    decayed, free = fit.optimizers[0].param_groups
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    assert {p.dim() for p in decayed["params"]} == {2}
    assert {p.dim() for p in free["params"]} == {1}


@pytest.mark.parametrize("options", [{"lr": 0.0}, {"weight_decay": -1.0}, {"warmup": 1.0}])
def test_options_are_checked(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        LanguageModel(nn.Identity(), **options)


def test_an_embedding_is_the_mean_of_what_is_not_masked() -> None:
    tokens = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))

    class Given(nn.Module):
        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return tokens

    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    found = SentenceEncoder(Given())(mask, mask)
    for row, length in enumerate((3, 5)):
        mean = tokens[row, :length].mean(0)
        assert torch.allclose(found[row], mean / mean.norm(), atol=1e-6)

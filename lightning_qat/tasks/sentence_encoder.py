"""Sentence embeddings of any encoder that gives a vector for each token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import lightning as L
import torch.nn.functional as F
from torch import Tensor, nn

#: Token ids and mask, by the names that tokenizers of transformers give them, or one after the other.
Batch: TypeAlias = "Mapping[str, Tensor] | tuple[Tensor, Tensor]"


class SentenceEncoder(L.LightningModule):
    """The mean of an encoder's token vectors, with length 1 (Reimers and Gurevych, 2019).

    Args:
        model: called as ``model(ids, mask)``; its output, or the ``last_hidden_state`` of it, is
            ``[batch, length, features]``.

    A batch is what tokenizers of transformers return, with ``input_ids`` and ``attention_mask``, or a tuple of both:
    ``[batch, length]`` int64. There is nothing to train or to log: encoders are compared by their embeddings, see
    :class:`lightning_qat.metrics.Cosine`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return embeddings ``[batch, features]``."""
        output = self.model(input_ids, attention_mask)
        tokens = output if isinstance(output, Tensor) else output.last_hidden_state
        weights = attention_mask.unsqueeze(-1).to(tokens.dtype)
        return F.normalize((tokens * weights).sum(1) / weights.sum(1).clamp(min=1), dim=-1)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Embed a batch."""
        self.predict_step(batch, batch_idx)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the embeddings of a batch."""
        ids, mask = (batch["input_ids"], batch["attention_mask"]) if isinstance(batch, Mapping) else batch
        embeddings: Tensor = self(ids, mask)
        return embeddings

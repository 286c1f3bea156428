"""Sentence embeddings of any encoder that gives a vector for each token."""

from __future__ import annotations

import lightning as L
import torch.nn.functional as F
from torch import Tensor, nn


class SentenceEncoder(L.LightningModule):
    """The mean of an encoder's token vectors, with length 1 (Reimers and Gurevych, 2019).

    Args:
        model: called as ``model(ids, mask)``; its output, or the ``last_hidden_state`` of it, is
            ``[batch, length, features]``.

    A batch is ``(ids, mask)``, both ``[batch, length]`` int64. There is nothing to train or to log: encoders are
    compared by their embeddings, see :class:`lightning_qat.metrics.Cosine`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return embeddings ``[batch, features]``."""
        output = self.model(ids, mask)
        tokens = output if isinstance(output, Tensor) else output.last_hidden_state
        weights = mask.unsqueeze(-1).to(tokens.dtype)
        return F.normalize((tokens * weights).sum(1) / weights.sum(1).clamp(min=1), dim=-1)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Embed a batch."""
        self(*batch)

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the embeddings of a batch."""
        embeddings: Tensor = self(*batch)
        return embeddings

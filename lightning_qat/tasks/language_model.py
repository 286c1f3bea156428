"""A causal language model around any network that maps token ids to logits."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics.text import Perplexity

#: Logits that are evaluated at once: probabilities of a window of 49,152 words take as much memory as its logits.
_PIECE = 2**22


class LanguageModel(L.LightningModule):
    """Next-token cross-entropy, AdamW, and a cosine that ends with the run.

    Args:
        model: maps ids ``[batch, length]`` to logits ``[batch, length, vocabulary]``, or to an object that has them
            as ``logits``, as the models of transformers do.
        lr: the highest learning rate.
        weight_decay: of AdamW, for matrices only.
        warmup: share of the run in which the rate rises from zero.

    Logs ``train/loss``, ``val/loss``, ``val/perplexity``, ``test/loss`` and ``test/perplexity``: the exponential of the
    mean loss over all predicted tokens, ``length - 1`` of each window. A batch is ``[batch, length]``, int64.
    """

    def __init__(self, model: nn.Module, lr: float = 1e-3, weight_decay: float = 0.1, warmup: float = 0.05) -> None:
        super().__init__()
        if lr <= 0 or weight_decay < 0 or not 0 <= warmup < 1:
            raise ValueError(
                f"lr={lr!r}, weight_decay={weight_decay!r}, warmup={warmup!r} are not allowed; use lr > 0, "
                "weight_decay >= 0, and a share below 1"
            )
        self.model = model
        self.lr = lr
        self.weight_decay = weight_decay
        self.warmup = warmup
        self.val_perplexity = Perplexity()
        self.test_perplexity = Perplexity()

    def forward(self, ids: Tensor) -> Tensor:
        """Return the logits."""
        output = self.model(ids)
        logits: Tensor = output if isinstance(output, Tensor) else output.logits
        return logits

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Return the loss."""
        loss = next_token_loss(self(batch), batch)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Log loss and perplexity."""
        self._evaluate("val", batch, self.val_perplexity)

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        """Log loss and perplexity."""
        self._evaluate("test", batch, self.test_perplexity)

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Return the logits."""
        logits: Tensor = self(batch)
        return logits

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW without decay of biases and norms; the rate rises, then falls along a cosine to zero."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.lr, betas=(0.9, 0.95))
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            max_lr=self.lr,
            total_steps=max(steps, 1) + 1,
            pct_start=self.warmup,
            cycle_momentum=False,
            div_factor=100.0,
            final_div_factor=1e9,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _evaluate(self, stage: str, batch: Tensor, perplexity: Any) -> None:
        logits = self(batch)
        targets = batch[:, 1:]
        total, step = torch.zeros((), device=logits.device), max(_PIECE // max(logits[:, :1].numel(), 1), 1)
        for start in range(0, targets.shape[1], step):
            ids = targets[:, start : start + step]
            values = logits[:, start : start + ids.shape[1]].float()
            total += F.cross_entropy(values.flatten(0, 1), ids.flatten(), reduction="sum")
            perplexity.update(values, ids)
        self.log(f"{stage}/loss", total / targets.numel(), batch_size=len(batch))
        self.log(f"{stage}/perplexity", perplexity, prog_bar=True)


def next_token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Return the mean cross-entropy of each token given those before it."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())

"""Which chapter of the Python reference does a passage come from? A small transformer reads its words."""

import re
from collections import Counter
from pydoc_data.topics import topics

import lightning as L
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

CHAPTERS = ("specialnames", "typesseq", "formatstrings", "try")
WORDS = 400


class Passages(L.LightningDataModule):
    """Passages of 8 to 24 words; the last fifth of a chapter is for validation."""

    def __init__(self, batch_size=16, passages=60):
        super().__init__()
        self.batch_size, self.passages = batch_size, passages

    def setup(self, stage):
        texts = [re.findall(r"[a-z]+", topics[chapter].lower()) for chapter in CHAPTERS]
        counts = Counter(word for text in texts for word in text)
        common = sorted(counts, key=lambda word: (-counts[word], word))[: WORDS - 2]
        index = {word: i + 2 for i, word in enumerate(common)}  # 0 is padding, 1 is any other word
        generator = torch.Generator().manual_seed(0)
        self.train, self.val = [], []
        for label, text in enumerate(texts):
            cut = len(text) * 4 // 5
            for part, first, last in ((self.train, 0, cut), (self.val, cut, len(text))):
                for _ in range(self.passages):
                    length = int(torch.randint(8, 25, (), generator=generator))
                    start = int(torch.randint(first, max(last - length, first + 1), (), generator=generator))
                    words = [index.get(word, 1) for word in text[start : start + length]]
                    part.append({"tokens": torch.tensor(words), "label": label})

    def collate(self, passages):
        tokens = pad_sequence([passage["tokens"] for passage in passages], batch_first=True)
        return {"tokens": tokens, "labels": torch.tensor([passage["label"] for passage in passages])}

    def train_dataloader(self):
        return DataLoader(self.train, self.batch_size, shuffle=True, collate_fn=self.collate)

    def val_dataloader(self):
        return DataLoader(self.val, self.batch_size, collate_fn=self.collate)

    test_dataloader = val_dataloader


class TextClassifier(L.LightningModule):
    def __init__(self, width=32, layers=2, lr=3e-3):
        super().__init__()
        self.save_hyperparameters()
        self.embedding = nn.Embedding(WORDS, width, padding_idx=0)
        self.positions = nn.Parameter(0.02 * torch.randn(64, width))
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.1, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, len(CHAPTERS))

    def forward(self, tokens, labels=None):
        padding = tokens == 0
        x = self.embedding(tokens) + self.positions[: tokens.shape[1]]
        x = self.norm(self.encoder(x, src_key_padding_mask=padding)).masked_fill(padding.unsqueeze(-1), 0)
        logits = self.head(x.sum(1) / (~padding).sum(1, keepdim=True))
        return {"logits": logits, "loss": None if labels is None else F.cross_entropy(logits, labels)}

    def training_step(self, batch, batch_idx):
        return self(**batch)

    def evaluate(self, batch, stage):
        out = self(**batch)
        right = (out["logits"].argmax(1) == batch["labels"]).float().mean()
        self.log_dict({f"{stage}/loss": out["loss"], f"{stage}/accuracy": right}, batch_size=len(batch["labels"]))

    def validation_step(self, batch, batch_idx):
        self.evaluate(batch, "val")

    def test_step(self, batch, batch_idx):
        self.evaluate(batch, "test")

    def predict_step(self, batch, batch_idx):
        return self(batch["tokens"])["logits"]

    def configure_optimizers(self):
        matrices = [p for p in self.parameters() if p.dim() > 1]
        others = [p for p in self.parameters() if p.dim() < 2]
        groups = [{"params": matrices, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=self.hparams.lr)


def train(*callbacks, **options):
    L.seed_everything(0, verbose=False)
    trainer = L.Trainer(max_epochs=4, gradient_clip_val=1.0, callbacks=[*callbacks], **options)
    model = TextClassifier()
    trainer.fit(model, Passages())
    return trainer, model

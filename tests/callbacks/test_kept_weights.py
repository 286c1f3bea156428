"""Under gradient accumulation and in evaluation a weight is fake-quantized once per optimizer step."""

import lightning as L
import pytest
import torch
from classifier import Classifier, loader, trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_qat as lq
from lightning_qat.callbacks import base
from lightning_qat.transforms.phase import keep_quantized_weights


def fit(tmp_path, **kwargs):
    torch.manual_seed(0)
    model = Classifier()
    callback = lq.QuantizationAwareTraining("int8", certify=False)
    run = trainer(tmp_path, callbacks=[callback], max_epochs=2, accumulate_grad_batches=4, **kwargs)
    run.fit(model, loader(), loader())
    return model, run


def test_a_run_is_bit_identical_to_one_that_keeps_nothing(tmp_path, monkeypatch):
    kept, _ = fit(tmp_path / "kept")
    monkeypatch.setattr(base, "keep_quantized_weights", lambda *_: None)
    plain, _ = fit(tmp_path / "plain")
    for (name, a), (_, b) in zip(plain.state_dict().items(), kept.state_dict().items(), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, name


def test_once_per_optimizer_step_and_evaluation(tmp_path, made):
    model, run = fit(tmp_path, num_sanity_val_steps=0)
    layers = sum(1 for module in model.modules() if isinstance(module, lq.QATLinear | lq.QATConv2d))
    evaluations = 2
    assert len(made) == layers * (run.global_step + evaluations)
    made.clear()
    run.test(model, loader(), verbose=False)
    assert len(made) == layers
    assert all(m.weight_quantizer.kept is None for m in model.modules() if hasattr(m, "weight_quantizer"))


class Looking(L.LightningModule):
    """Runs a forward around the batches of its validation, where weight averaging swaps weights uncounted."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
        self.seen = []

    def look(self):
        if self.trainer.sanity_checking:
            return
        with torch.no_grad():
            first = self.net(torch.ones(1, 8))
            keep_quantized_weights(self, False)
            self.seen.append((first, self.net(torch.ones(1, 8))))

    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).square().mean()

    def validation_step(self, batch, batch_idx):
        self.net(batch[0])
        if batch_idx == 1:
            self.look()

    def on_validation_start(self):
        if not self.trainer.sanity_checking:
            self.net(torch.ones(1, 8))

    def on_validation_epoch_start(self):
        self.look()

    def on_validation_epoch_end(self):
        self.look()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("ours_first", [True, False])
def test_weights_that_averaging_swaps_are_not_kept(tmp_path, ours_first):
    callbacks = [lq.QuantizationAwareTraining("int8", certify=False), WeightAveraging()]
    batches = DataLoader(TensorDataset(torch.randn(64, 8)), batch_size=8)
    model = Looking()
    trainer(tmp_path, callbacks=callbacks if ours_first else callbacks[::-1], max_epochs=2).fit(model, batches, batches)
    assert len(model.seen) == 2 * 3
    assert all(torch.equal(first, again) for first, again in model.seen)

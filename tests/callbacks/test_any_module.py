"""Modules of every shape under the real Trainer: fit, validate, convert; the callback is added and nothing else."""

import os
import subprocess
import sys

import pytest
import torch
from classifier import trainer
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import nn
from torch.nn import functional as F
from vectors import Base, assert_ships, batches, fit

import lightning_qat as lq
from lightning_qat.nn import QuantizedLayer


class SeveralInputs(Base):
    """Keyword-only arguments, a mask, and a dict that holds a tuple as output."""

    def build(self):
        self.left, self.right, self.head = nn.Linear(8, 4), nn.Linear(8, 4), nn.Linear(4, 2)

    def forward(self, x, *, other=None, scale=1.0, **options):
        hidden = self.left(input=x) + (0 if other is None else self.right(other))
        return {"logits": self.head(F.relu(hidden) * scale), "parts": (hidden, [options])}

    def logits(self, x):
        return self(x, other=x.flip(1), scale=0.5, unused="text")["logits"]


class NoForward(Base):
    """``forward`` does not exist; the steps call the layers."""

    def logits(self, x):
        return self.net[2](torch.tanh(self.net[0](x)))


class InContainers(Base):
    def build(self):
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.heads = nn.ModuleDict({"first": nn.Linear(8, 2), "second": nn.Linear(8, 2), "first_again": None})
        self.heads["first_again"] = self.heads["first"]  # one layer, two names

    def logits(self, x):
        for block in self.blocks:
            x = F.relu(block(x))
        return self.heads["first"](x) + self.heads["second"](x) + self.heads["first_again"](-x)


class BuiltInSetup(Base):
    def build(self):
        self.net = None

    def setup(self, stage):
        if self.net is None:
            super().build()


class BuiltInConfigureModel(Base):
    def build(self):
        self.net = None

    def configure_model(self):
        if self.net is None:
            super().build()


class Frozen(Base):
    def build(self):
        super().build()
        self.net[0].requires_grad_(False)


class Lora(nn.Module):
    """A frozen layer with a low-rank adapter beside it, as peft builds it."""

    def __init__(self, base, rank=2):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.normal_(self.up.weight, std=0.1)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class WithLora(Base):
    def build(self):
        super().build()
        self.net[0], self.net[2] = Lora(self.net[0]), Lora(self.net[2])


class Tied(Base):
    """A language model's head that shares its matrix with the embedding."""

    def build(self):
        self.embedding, self.body, self.head = nn.Embedding(8, 6), nn.Linear(6, 6), nn.Linear(6, 8, bias=False)
        self.head.weight = self.embedding.weight

    def logits(self, x):
        return self.head(F.relu(self.body(self.embedding(x.argsort(1)))))

    def loss(self, batch):
        return F.cross_entropy(self.logits(batch["x"]).flatten(0, 1), batch["x"].argsort(1).flatten())


class TwoOptimizers(Base):
    """Manual optimization; each optimizer has its own network, and one steps half as often."""

    def build(self):
        super().build()
        self.automatic_optimization = False
        self.critic = nn.Linear(2, 2)

    def logits(self, x):
        return self.critic(self.net(x))

    def training_step(self, batch, batch_idx):
        for index, optimizer in enumerate(self.optimizers()):
            if index and batch_idx % 2:
                continue
            loss = self.loss(batch)
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(optimizer, gradient_clip_val=1.0, gradient_clip_algorithm="norm")
            optimizer.step()
        self.log("train/loss", loss)

    def configure_optimizers(self):
        return [torch.optim.Adam(part.parameters(), lr=0.01) for part in (self.net, self.critic)]


@pytest.mark.parametrize(
    "module",
    [
        SeveralInputs, NoForward, InContainers, BuiltInSetup, BuiltInConfigureModel, Frozen, WithLora, Tied,
        TwoOptimizers,
    ],
)  # fmt: skip
@pytest.mark.parametrize("plan", ["int8", "w4a8"])
def test_modules_of_every_shape_ship_what_they_trained(tmp_path, module, plan):
    model = module()
    assert_ships(model, fit(tmp_path, model, plan))


def test_tied_matrices_stay_tied_in_training_and_agree_when_both_ship(tmp_path):
    module = Tied()
    plan = lq.QuantizationPlan([lq.LayerRule("embedding", "int8")], base="int8")
    converted = assert_ships(module, fit(tmp_path, module, plan))
    assert module.head.weight is module.embedding.weight
    assert torch.equal(converted.embedding.codes, converted.head.codes)


def test_frozen_layers_keep_their_weights_and_are_quantized(tmp_path):
    module, start = WithLora(), WithLora()
    fit(tmp_path, module)
    assert torch.equal(module.net[0].base.weight, start.net[0].base.weight)
    assert not torch.equal(module.net[0].down.weight, start.net[0].down.weight)
    assert isinstance(lq.convert(module).net[0].base, QuantizedLayer)


class FromLoaders(Base):
    """Takes its training batch from several loaders, and tells its validation loaders apart."""

    def training_step(self, batch, batch_idx, dataloader_idx=0):
        if isinstance(batch, dict) and "x" in batch:
            return self.loss(batch)
        parts = [part for part in (batch.values() if isinstance(batch, dict) else batch) if part is not None]
        return sum(self.loss(part) for part in parts)

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.validated.append(dataloader_idx)
        self.log("val/loss", self.loss(batch))


@pytest.mark.parametrize(
    "train",
    [
        lambda: {"a": batches(), "b": batches(8, seed=3)},
        lambda: [batches(), batches(8, seed=3)],
        lambda: CombinedLoader({"a": batches(), "b": batches(8, seed=3)}, "max_size_cycle"),
        lambda: CombinedLoader([batches(), batches(8, seed=3)], "max_size"),
    ],
    ids=["dict", "list", "max_size_cycle", "max_size"],
)
def test_several_dataloaders(tmp_path, train):
    module = FromLoaders()
    qat = fit(tmp_path, module, train=train(), val=[batches(8, seed=1), batches(4, seed=2)])
    assert set(module.validated) == {0, 1}
    assert_ships(module, qat)


class Lazy(Base):
    def build(self):
        self.net = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(2))


def test_lazy_layers_are_named_with_the_way_out(tmp_path):
    with pytest.raises(ValueError, match="layer 'net.0' is lazy and has no weight yet; run one batch through the"):
        fit(tmp_path, Lazy())

    class Filled(Lazy):
        def configure_model(self):
            self.net(torch.zeros(1, 8))

    module = Filled()
    assert_ships(module, fit(tmp_path, module))


@pytest.mark.parametrize("same_trainer", [True, False])
def test_fitted_tested_and_fitted_again(tmp_path, same_trainer):
    """The second run calibrates and follows its own schedule; a Trainer of its own or the same gives the same."""

    class Tested(Base):
        def test_step(self, batch, batch_idx):
            self.log("test/loss", self.loss(batch))

    def runs():
        first = lq.QuantizationAwareTraining("int8", start_step=2, calibration_batches=2)
        run = trainer(tmp_path, [first])
        yield run, first
        if same_trainer:
            run.fit_loop.max_epochs = 2
            yield run, first
        else:
            second = lq.QuantizationAwareTraining("int8", start_step=2, calibration_batches=2)
            yield trainer(tmp_path, [second]), second

    module, losses = Tested(), []
    for run, qat in runs():
        run.fit(module, batches(), batches(8, seed=1))
        before = {k: v.clone() for k, v in module.state_dict().items() if isinstance(v, torch.Tensor)}
        losses.append(run.test(module, batches(8, seed=1), verbose=False)[0]["test/loss"])
        after = {k: v for k, v in module.state_dict().items() if isinstance(v, torch.Tensor)}
        assert all(torch.equal(before[k], after[k]) for k in before)
        assert_ships(module, qat)
    assert losses[1] < losses[0]

    with_other_trainer = trainer(tmp_path)
    with_other_trainer.test(module, batches(8, seed=1), verbose=False)
    assert with_other_trainer.callback_metrics["test/loss"] == losses[1]


IN_PYTORCH_LIGHTNING = """
import sys
import lightning_qat as lq
qat = lq.QuantizationAwareTraining("int8", start_step=2, freeze_step=0.9)
assert "pytorch_lightning" not in sys.modules
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader

class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
        self.phases = []
    def training_step(self, batch, batch_idx):
        self.phases.append((self.net[0].weight_quantizer.quantizing, self.net[0].weight_quantizer.frozen))
        return self.net(batch).square().sum()
    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.net(batch).square().sum())
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)

# made before pytorch_lightning was imported, and after
callbacks = [qat, lq.ObserverCalibration(2), pl.callbacks.EMAWeightAveraging(decay=0.5)]
assert all(isinstance(callback, pl.Callback) for callback in callbacks)
module = Module()
trainer = pl.Trainer(callbacks=callbacks, max_epochs=2, accelerator="cpu", logger=False, enable_progress_bar=False,
                     enable_model_summary=False, default_root_dir=sys.argv[1], enable_checkpointing=True)
data = DataLoader(torch.randn(32, 4), batch_size=4)
trainer.fit(module, data, data)
assert module.phases[:2] == [(False, False)] * 2, module.phases  # training alone: calibration is not told apart here
assert module.phases[-1] == (True, True), module.phases
assert qat.certificate is not None and qat.certificate.passed
x = torch.randn(3, 4)
converted = lq.convert(module.eval())
assert isinstance(converted, Module)
torch.testing.assert_close(converted.net(x), module.net(x), rtol=1e-4, atol=1e-5)
trainer.validate(module, data, ckpt_path=trainer.checkpoint_callback.best_model_path, verbose=False)
"""


def test_projects_that_import_pytorch_lightning(tmp_path):
    pytest.importorskip("pytorch_lightning", reason="it is a dependency of lightning")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = [sys.executable, "-W", "ignore", "-c", IN_PYTORCH_LIGHTNING, str(tmp_path)]
    done = subprocess.run(run, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr

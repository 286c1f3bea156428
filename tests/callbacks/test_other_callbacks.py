"""Together with Lightning's own callbacks: both do their work."""

import copy

import pytest
import torch
from classifier import Classifier, loader, trainer
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    BatchSizeFinder,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
)
from together import assert_ships, equal, fit, in_any_order, ordered, qat
from torch import nn

import lightning_qat as lq


@in_any_order
def test_model_checkpoint_and_early_stopping(tmp_path, ours_first):
    callback = qat(start_step=4)
    saver = ModelCheckpoint(tmp_path / "c", monitor="val/loss", save_top_k=-1, save_last=True)
    stopper = EarlyStopping("val/loss", patience=1, min_delta=10.0)
    module, run = fit(tmp_path, ordered(ours_first, callback, saver, stopper), max_epochs=9, enable_checkpointing=True)
    assert stopper.stopped_epoch == 1
    assert len(saver.best_k_models) == 2
    twin = Classifier(seed=4)
    again = trainer(tmp_path, [qat(start_step=4)])
    found = again.validate(twin, loader(8, seed=1), ckpt_path=saver.last_model_path, verbose=False)
    assert found[0]["val/loss"] == run.callback_metrics["val/loss"]
    assert equal(twin.state_dict(), module.state_dict())
    assert_ships(module, callback)


@in_any_order
@pytest.mark.parametrize("permanent", [True, False])
@pytest.mark.parametrize("plan", ["int8", "w4a8", lq.QATConfig("int8", symmetric=False)])
def test_pruned_weights_have_codes_of_zero(tmp_path, ours_first, permanent, plan):
    callback = qat(plan)
    pruning = ModelPruning("l1_unstructured", amount=0.5, make_pruning_permanent=permanent)
    module, _ = fit(tmp_path, ordered(ours_first, callback, pruning), max_epochs=2)
    assert hasattr(module.conv, "weight_mask") is not permanent
    converted = assert_ships(module, callback)
    pruned = nn.utils.parameters_to_vector([module.conv.weight.flatten(), module.head.weight.flatten()]) == 0
    assert pruned.sum() >= 0.4 * pruned.numel()
    for name in ("conv", "head"):
        mask = module.get_submodule(name).weight == 0
        layer = converted.get_submodule(name)
        assert mask.any()
        assert (layer.weight[mask] == 0).all()
        if layer.weight_format.symmetric:
            assert (layer.codes[mask] == 0).all()


@pytest.mark.parametrize("permanent", [True, False])
def test_checkpoints_of_a_pruned_run_load(tmp_path, permanent):
    pruning = ModelPruning("l1_unstructured", amount=0.5, make_pruning_permanent=permanent)
    saver = ModelCheckpoint(tmp_path / "c", save_last=True)
    module, _ = fit(tmp_path, [qat(), pruning, saver], enable_checkpointing=True)
    twin = Classifier(seed=4)
    if not permanent:  # names are those of the reparametrization, in plain Lightning too
        for layer, name in [(twin.conv, "weight"), (twin.conv, "bias"), (twin.head, "weight"), (twin.head, "bias")]:
            nn.utils.prune.identity(layer, name)
        for name in ("weight", "bias"):
            nn.utils.prune.identity(twin.bn, name)
    found = trainer(tmp_path, [qat()]).validate(twin, loader(8, seed=1), ckpt_path=saver.last_model_path, verbose=False)
    # Without ModelPruning: after a fit its ``setup`` fails on weights that are not made permanent.
    assert found == trainer(tmp_path).validate(module, loader(8, seed=1), verbose=False)


@in_any_order
def test_gradient_accumulation_scheduler(tmp_path, ours_first):
    """8 batches: 8 steps in epoch 0, 4 in epoch 1, 2 in epoch 2; half of the run and "2 epochs" are known steps."""
    callback, scheduler = qat(start_step=0.5, freeze_step="2 epochs"), GradientAccumulationScheduler({1: 2, 2: 4})
    module, run = fit(tmp_path, ordered(ours_first, callback, scheduler), max_epochs=3)
    assert run.global_step == 8 + 4 + 2
    phases = {step: phase[:2] for where, step, phase in module.record if where == "train"}
    assert [step for step, (quantizing, _) in phases.items() if quantizing] == list(range(7, 14))
    assert [step for step, (_, frozen) in phases.items() if frozen] == [12, 13]
    assert_ships(module, callback)


class Unfreeze(BaseFinetuning):
    def freeze_before_training(self, pl_module):
        self.freeze([pl_module.conv, pl_module.bn])

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group([pl_module.conv, pl_module.bn], optimizer, lr=0.1)


class OfHead(Classifier):
    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=self.lr)


@in_any_order
def test_base_finetuning_unfreezes_prepared_layers(tmp_path, ours_first):
    callback = qat(fold := lq.QATConfig("int8", per_channel=True))
    assert fold.fold_batchnorm
    seen = []

    class Watch(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            seen.append(pl_module.conv.weight.detach().clone())

    module, run = fit(tmp_path, [*ordered(ours_first, callback, Unfreeze()), Watch()], OfHead(), max_epochs=2)
    assert torch.equal(seen[0], Classifier().conv.weight)
    assert not torch.equal(seen[1], seen[0])
    assert [len(group["params"]) for group in run.optimizers[0].param_groups] == [4, 2]  # BatchNorm keeps training
    assert_ships(module, callback)


class WithBackbone(OfHead):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(self.conv, self.bn)
        del self.conv, self.bn

    def forward(self, x):
        return self.head(nn.functional.relu(self.backbone(x)).mean((2, 3)))

    def phase(self):
        return None


def test_backbone_finetuning_resumes(tmp_path):
    def callbacks():
        saver = ModelCheckpoint(tmp_path / "c", filename="{epoch}", save_top_k=-1)
        return [qat(), BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_lr=0.01, verbose=False), saver]

    whole, run = fit(tmp_path, callbacks(), WithBackbone(), max_epochs=3, enable_checkpointing=True)
    assert len(run.optimizers[0].param_groups) == 2
    assert not torch.equal(whole.backbone[0].weight, Classifier().conv.weight)
    again = WithBackbone()
    resumed = trainer(tmp_path, callbacks(), max_epochs=3, enable_checkpointing=True)
    resumed.fit(again, loader(), loader(8, seed=1), ckpt_path=tmp_path / "c" / "epoch=1.ckpt")
    # Not bit for bit: nor is a float run with this callback, which sets its rates by the epoch it starts in.
    rates = [[group["lr"] for group in done.optimizers[0].param_groups] for done in (run, resumed)]
    assert rates[0] == rates[1]
    assert resumed.global_step == run.global_step
    assert_ships(whole)
    assert_ships(again)


class Seen(Callback):
    """The state of the module when its own training starts."""

    def on_train_start(self, trainer, pl_module):
        if not hasattr(self, "state"):
            self.state = copy.deepcopy(pl_module.state_dict())


@in_any_order
@pytest.mark.parametrize("start", [0, 4, "1 epoch"])
def test_the_learning_rate_finder_leaves_schedule_and_ranges_alone(tmp_path, ours_first, start):
    """The run after the search is bit for bit the run with the rate that it found."""
    callback, finder, seen = qat(start_step=start, freeze_step=10), LearningRateFinder(num_training_steps=20), Seen()
    module, _ = fit(tmp_path, [*ordered(ours_first, callback, finder), seen], max_epochs=2)
    searching = [phase for where, _, phase in module.record if where == "train"][:20]
    assert [phase[0] for phase in searching] == [start == 0] * 20
    plain_callback, plain_seen = qat(start_step=start, freeze_step=10), Seen()
    plain, _ = fit(tmp_path, [plain_callback, plain_seen], Classifier(lr=module.lr), max_epochs=2)
    assert module.lr != 0.05
    assert equal(seen.state, plain_seen.state)
    assert equal(module.state_dict(), plain.state_dict())
    assert_ships(module, callback)


def test_the_batch_size_finder_leaves_schedule_and_ranges_alone(tmp_path):
    class Sized(Classifier):
        batch_size = 2

        def train_dataloader(self):
            return loader(batch_size=self.batch_size)

        def val_dataloader(self):
            return loader(8, seed=1)

    module, callback = Sized(), qat(start_step=2)
    run = trainer(tmp_path, [callback, BatchSizeFinder("power", max_trials=2, steps_per_trial=1)])
    run.fit(module)
    assert module.batch_size == 4
    phases = [phase[0] for where, step, phase in module.record if where == "train"][-run.global_step :]
    assert phases == [False] * 2 + [True] * 6
    assert_ships(module)

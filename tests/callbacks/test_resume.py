"""Going on with a run, and starting the next. That every bit is the same: test_resume_exact.py."""

import lightning as L
import pytest
import torch
from classifier import Classifier, loader, trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

import lightning_qat as lq

SCHEDULES = {
    "int8": lambda: [lq.QuantizationAwareTraining("int8")],
    "frozen": lambda: [lq.QuantizationAwareTraining("int8", freeze_step=4)],
}


def assert_equal_states(one, other):
    assert one.keys() == other.keys()
    for key, value in other.items():
        assert torch.equal(one[key], value) if isinstance(value, torch.Tensor) else one[key] == value, key


def test_a_fit_without_a_step_changes_nothing(tmp_path):
    module = Classifier()
    run = trainer(tmp_path, SCHEDULES["frozen"]())
    run.fit(module, loader(), loader(8))
    state = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in module.state_dict().items()}
    run.save_checkpoint(tmp_path / "done.ckpt")
    run.fit(module, loader(), loader(8))
    assert_equal_states(module.state_dict(), state)
    assert module.phase()[:2] == (True, True)
    resumed = Classifier(seed=3)
    trainer(tmp_path, SCHEDULES["frozen"]()).fit(resumed, loader(), loader(8), ckpt_path=tmp_path / "done.ckpt")
    assert_equal_states(resumed.state_dict(), state)


def test_going_on_with_the_same_trainer_keeps_schedule_and_ranges(tmp_path):
    module, run = Classifier(), trainer(tmp_path, SCHEDULES["frozen"]())
    run.fit(module, loader(), loader(8))
    frozen = module.conv.input_quantizer.scale.clone(), module.conv.weight_quantizer.scale.clone()
    run.test(module, loader(8), verbose=False)
    run.save_checkpoint(tmp_path / "tested.ckpt")
    assert "lightning_qat" in torch.load(tmp_path / "tested.ckpt", weights_only=True)
    run.fit_loop.max_epochs = 2
    run.fit(module, loader(), loader(8))
    assert run.global_step == 16
    assert torch.equal(frozen[0], module.conv.input_quantizer.scale)
    assert torch.equal(frozen[1], module.conv.weight_quantizer.scale)


def test_batchnorm_trains_again_in_a_later_fit(tmp_path):
    module = Classifier()
    trainer(tmp_path, SCHEDULES["frozen"]()).fit(module, loader())
    assert module.bn.training
    module.record.clear()
    trainer(tmp_path, SCHEDULES["int8"]()).fit(module, loader())
    assert all(phase[3] for where, _, phase in module.record if where == "train")


def test_resuming_with_other_settings_is_told(tmp_path):
    saver = ModelCheckpoint(tmp_path, filename="last", save_on_train_epoch_end=True)
    run = trainer(tmp_path, [*SCHEDULES["int8"](), saver], enable_checkpointing=True)
    run.fit(Classifier(), loader())
    path = tmp_path / "last.ckpt"
    with pytest.raises(ValueError, match="trained with another plan"):
        trainer(tmp_path, [lq.QuantizationAwareTraining("w4a8")], max_epochs=2).fit(
            Classifier(), loader(), ckpt_path=path
        )
    with pytest.warns(UserWarning, match="goes on with the checkpoint's schedule"):
        trainer(tmp_path, SCHEDULES["frozen"](), max_epochs=2).fit(Classifier(), loader(), ckpt_path=path)


def test_a_converted_model_is_evaluated_under_the_callback_and_refused_by_fit(tmp_path):
    module, run = Classifier(), trainer(tmp_path, SCHEDULES["int8"]())
    run.fit(module, loader(), loader(8))
    converted = lq.convert(module)
    ours, theirs = run.test(converted, loader(8), verbose=False), run.test(module, loader(8), verbose=False)
    assert ours[0]["test/loss"] == pytest.approx(theirs[0]["test/loss"], rel=1e-4)
    with pytest.raises(ValueError, match="is converted and cannot train"):
        run.fit(converted, loader())


class SideEffects(Classifier):
    """Keeps a queue, a list and a scheduler of its own."""

    def __init__(self):
        super().__init__()
        self.register_buffer("queue", torch.zeros(()))
        self.outputs, self.seen = [], []
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.queue += 1
        loss = super().training_step(batch, batch_idx)
        self.outputs.append(loss)
        SideEffects.batches.append(batch[0])
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        self.lr_schedulers().step()

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


LOADERS = {
    "plain": {},
    "persistent workers": dict(num_workers=1, persistent_workers=True),
}


@pytest.mark.parametrize("options", LOADERS.values(), ids=LOADERS)
def test_calibration_changes_neither_data_nor_state(tmp_path, options):
    """Witness: the same run without the callback."""
    runs = []
    for callbacks in ([], [lq.DelayedQATStart(1000), lq.ObserverCalibration(3)]):
        L.seed_everything(3, verbose=False)
        SideEffects.batches = []
        module, run = SideEffects(), trainer(tmp_path, callbacks, max_epochs=2, num_sanity_val_steps=0)
        run.fit(module, DataLoader(loader().dataset, batch_size=4, shuffle=True, **options))
        rate = run.optimizers[0].param_groups[0]["lr"]
        trained = SideEffects.batches[-16:]
        runs.append((module.queue.item(), len(module.outputs), rate, run.global_step, torch.cat(trained), module))
    (*plain, batches, module), (*ours, our_batches, our_module) = runs
    assert plain == ours == [16.0, 16, 0.05 * 0.5**16, 16]
    assert torch.equal(batches, our_batches)
    assert torch.equal(module.conv.weight, our_module.conv.weight)
    lq.convert(our_module)  # although it keeps losses with their graph


def test_batch_samplers_keep_their_generator(tmp_path):
    from torch.utils.data import BatchSampler, RandomSampler

    states = []
    for callbacks in ([], [lq.DelayedQATStart(1000), lq.ObserverCalibration(3)]):
        dataset, module = loader().dataset, Classifier()
        sampler = RandomSampler(dataset, generator=torch.Generator().manual_seed(3))
        run = trainer(tmp_path, callbacks, num_sanity_val_steps=0)
        run.fit(module, DataLoader(dataset, batch_sampler=BatchSampler(sampler, 4, False)))
        states.append(module.conv.weight.detach().clone())
    assert torch.equal(*states)


def test_scales_frozen_from_the_start_are_calibrated(tmp_path):
    module = Classifier()
    trainer(tmp_path, [lq.FreezeQuantization(0)]).fit(module, loader())
    assert module.conv.input_quantizer.calibrated


def test_a_step_that_takes_gradients_itself_is_told(tmp_path):
    class Penalty(Classifier):
        def training_step(self, batch, batch_idx):
            x = batch[0].requires_grad_()
            return torch.autograd.grad(self(x).sum(), x, create_graph=True)[0].square().sum()

    with pytest.raises(RuntimeError, match="takes gradients itself"):
        trainer(tmp_path, SCHEDULES["int8"]()).fit(Penalty(), loader())


def test_progressive_bits_leave_layers_out_by_name(tmp_path):
    module = Classifier()
    trainer(tmp_path, [lq.ProgressiveBitReduction({0: 4}, match="conv*")]).fit(module, loader())
    assert (module.conv.weight_quantizer.bits, module.head.weight_quantizer.bits) == (4, 8)


def test_a_second_fit_begins_with_the_bits_of_the_plan(tmp_path):
    module = Classifier()
    for step, activations in ((2, True), (6, True), (4, False)):
        callbacks = [lq.ProgressiveBitReduction({step: 4}, activations=activations)]
        module.record.clear()
        trainer(tmp_path, callbacks).fit(module, loader())
        bits = [phase[2] for where, _, phase in module.record if where == "train"]
        assert bits == [8] * step + [4] * (8 - step)
    assert module.conv.input_quantizer.bits == 4  # as the second run left it: the third does not speak of activations


def test_a_setup_that_failed_can_be_tried_again(tmp_path):
    class Fragile(Classifier):
        def setup(self, stage):
            if not getattr(self, "tried", False):
                self.tried = True
                raise RuntimeError("no disk")

    module = Fragile()
    with pytest.raises(RuntimeError, match="no disk"):
        trainer(tmp_path, SCHEDULES["int8"]()).fit(module, loader())
    trainer(tmp_path, [lq.QuantizationAwareTraining("w4a8")]).fit(module, loader())
    assert module.head.weight_quantizer.bits == 4
    assert isinstance(module.conv, nn.Conv2d)


class Counting(Classifier):
    """Keeps things on the side in every way."""

    def __init__(self):
        super().__init__()
        self.register_buffer("bank", torch.zeros(()))
        self.count, self.plain, self.outs = 0, torch.zeros(()), []

    def _keep(self):
        self.bank = self.bank + 1
        self.count += 1
        self.plain += 1
        self.outs = [*self.outs, 1]

    def training_step(self, batch, batch_idx):
        self._keep()
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        assert self.trainer.validating or self.trainer.sanity_checking
        self._keep()
        return super().validation_step(batch, batch_idx)


@pytest.mark.parametrize("validate", [True, False])
def test_calibration_and_certificate_leave_no_trace_in_the_module(tmp_path, validate):
    """Witness: the same run without the callback."""
    kept = []
    for callbacks in ([], [lq.QuantizationAwareTraining("int8")]):
        module = Counting()
        trainer(tmp_path, callbacks).fit(module, loader(), loader(8) if validate else None)
        kept.append(
            (module.bank.item(), module.count, module.plain.item(), len(module.outs), "bank" in module.state_dict())
        )
    assert kept[0] == kept[1]
    assert callbacks[0].certificate.passed

"""Together with callbacks that average weights: latent weights are averaged, scales derived again, never averaged."""

import copy

import pytest
import torch
from classifier import Classifier, loader, trainer
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from together import assert_ships, equal, fit, in_any_order, ordered, qat
from torch import nn

import lightning_qat as lq
from lightning_qat.transforms.prepare import qat_layers


def average_of(states):
    return sum(states[1:], states[0].clone()) / len(states)


class Weights(Callback):
    """The latent weights after every optimizer step, and what validation computed with."""

    def __init__(self):
        self.steps, self.validated = [], []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.steps.append(pl_module.head.weight.detach().clone())

    def on_validation_batch_start(self, trainer, pl_module, *_):
        if not trainer.sanity_checking:
            self.validated.append(pl_module.head.weight.detach().clone())
            self.quantizer = copy.deepcopy(pl_module.head.weight_quantizer)


@in_any_order
@pytest.mark.parametrize("use_buffers", [True, False])
@pytest.mark.parametrize("freeze", [None, 4])
def test_weight_averaging_averages_weights_and_derives_scales(tmp_path, ours_first, use_buffers, freeze):
    callback, seen = qat(freeze_step=freeze), Weights()
    averaging = WeightAveraging(use_buffers=use_buffers)
    saver = ModelCheckpoint(tmp_path / "c", save_last=True, filename="{epoch}")
    callbacks = [*ordered(ours_first, callback, averaging), seen, saver]
    module, run = fit(tmp_path, callbacks, max_epochs=2, enable_checkpointing=True)
    average = average_of(seen.steps)
    torch.testing.assert_close(module.head.weight, average)
    torch.testing.assert_close(seen.validated[0], average_of(seen.steps[:8]))
    for layer in (module.head, module.conv):
        assert layer.input_quantizer.calibrated
        expected = layer.weight.detach().abs().amax(tuple(range(1, layer.weight.dim()))) / 127
        torch.testing.assert_close(layer.weight_quantizer.parameters_for(layer.weight)[0], expected)
    # The ranges are those of training: an average would be of no grid.
    alone = Weights()
    plain, _ = fit(tmp_path, [qat(freeze_step=freeze), alone], max_epochs=2)
    assert all(torch.equal(a, b) for a, b in zip(seen.steps, alone.steps, strict=True))
    for (_, ours), (_, theirs) in zip(qat_layers(module), qat_layers(plain), strict=True):
        assert equal(ours.input_quantizer.state_dict(), theirs.input_quantizer.state_dict())
    assert_ships(module, callback)
    # The checkpoint holds the average with its quantizers.
    twin = Classifier(seed=4)
    found = trainer(tmp_path, [qat(freeze_step=freeze)]).validate(
        twin, loader(8, seed=1), ckpt_path=saver.last_model_path, verbose=False
    )
    assert found[0]["val/loss"] == run.callback_metrics["val/loss"]
    assert twin.head.weight_quantizer.frozen is (freeze is not None)


def test_weight_averaging_with_layers_built_late_does_not_prepare_too_soon(tmp_path, recwarn):
    class Late(Classifier):
        def setup(self, stage):
            if not hasattr(self, "late"):
                torch.manual_seed(0)
                self.late = nn.Linear(2, 2)

        def forward(self, x):
            return self.late(super().forward(x))

    callback = qat()
    module, _ = fit(tmp_path, [callback, EMAWeightAveraging(decay=0.5)], Late())
    assert isinstance(module.late, lq.QATLinear)
    assert not [w for w in recwarn if "overrides the configure_model" in str(w.message)]
    assert_ships(module, callback)


@in_any_order
def test_ema_validates_with_quantized_averages_and_resumes(tmp_path, ours_first):
    def callbacks():
        saver = ModelCheckpoint(tmp_path / "c", filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
        ours = qat(start_step=3, freeze_step=10)
        return [*ordered(ours_first, ours, EMAWeightAveraging(decay=0.9, update_starting_at_step=2)), saver]

    kwargs = dict(max_epochs=3, enable_checkpointing=True, accumulate_grad_batches=2, val_check_interval=3)
    whole, run = fit(tmp_path, callbacks(), **kwargs)
    again = Classifier()
    twin = trainer(tmp_path, callbacks(), **kwargs)
    twin.fit(again, loader(), loader(8, seed=1), ckpt_path=tmp_path / "c" / "epoch=1.ckpt")
    assert equal(whole.state_dict(), again.state_dict())
    assert run.callback_metrics["val/loss"] == twin.callback_metrics["val/loss"]
    assert_ships(whole)


@in_any_order
@pytest.mark.parametrize("freeze", [None, 0.9])
def test_stochastic_weight_averaging(tmp_path, ours_first, freeze):
    """It adds an epoch without steps that measures BatchNorm for the averaged weights, frozen or not."""
    callback, seen = qat(freeze_step=freeze), Weights()
    swa = StochasticWeightAveraging(0.05, swa_epoch_start=2, annealing_epochs=1)
    module, run = fit(tmp_path, [*ordered(ours_first, callback, swa), seen], max_epochs=4)
    float_run = StochasticWeightAveraging(0.05, swa_epoch_start=2, annealing_epochs=1)
    assert run.global_step == fit(tmp_path, [float_run], max_epochs=4)[1].global_step
    at_epochs = [seen.steps[8 * epoch - 1] for epoch in (1, 2, 3)]
    torch.testing.assert_close(module.head.weight, average_of(at_epochs))
    expected = module.head.weight.detach().abs().amax(1) / 127
    torch.testing.assert_close(module.head.weight_quantizer.parameters_for(module.head.weight)[0], expected)
    frozen = {step for where, step, phase in module.record if where == "train" and phase[1]}
    assert frozen == (set() if freeze is None else {29, 30, 31, 32})
    # The statistics are those of the averaged weights, over the whole of one epoch.
    assert module.bn.num_batches_tracked == 8
    measured = []
    module.eval()
    handle = module.bn.register_forward_pre_hook(lambda _, args: measured.append(args[0].mean((0, 2, 3))))
    with torch.no_grad():
        for x, _ in loader():
            module(x)
    handle.remove()
    torch.testing.assert_close(module.bn.running_mean, torch.stack(measured).mean(0), rtol=0.05, atol=0.01)
    assert_ships(module, callback)


@pytest.mark.parametrize("quantized", [False, True])
def test_stochastic_weight_averaging_goes_on_where_it_was(tmp_path, quantized):
    """In float too, as the witness; before it begins, while the learning rate anneals and after that.

    Not from its own last epoch without steps: plain training that goes on from there has other weights already.
    """

    class Rates(Callback):
        def __init__(self):
            self.seen = {}

        def on_train_batch_end(self, trainer, *_):
            self.seen[trainer.global_step] = trainer.optimizers[0].param_groups[0]["lr"]

    def run(folder, start=None):
        rates = Rates()
        swa = StochasticWeightAveraging(0.01, swa_epoch_start=2, annealing_epochs=2)
        saver = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
        ours = [qat(start_step=3, freeze_step=28)] if quantized else []
        module = Classifier()
        options = dict(max_epochs=5, enable_checkpointing=True)
        trainer(tmp_path, [*ours, swa, saver, rates], **options).fit(module, loader(), ckpt_path=start)
        return module.state_dict(), rates.seen

    whole, rates = run(tmp_path / "whole")
    assert len(set(rates.values())) == 3
    for epoch in range(4):
        again, seen = run(tmp_path / str(epoch), tmp_path / "whole" / f"epoch={epoch}.ckpt")
        assert equal(whole, again), epoch
        assert seen == {step: rate for step, rate in rates.items() if step in seen}
        assert min(seen) == 8 * epoch + 9


def test_stochastic_weight_averaging_without_batchnorm(tmp_path):
    class Plain(Classifier):
        def __init__(self):
            super().__init__()
            self.bn = nn.Identity()

    callback, seen = qat(freeze_step=10), Weights()
    swa = StochasticWeightAveraging(0.05, swa_epoch_start=2)
    module, _ = fit(tmp_path, [callback, swa, seen], Plain(), max_epochs=3)
    torch.testing.assert_close(module.head.weight, average_of([seen.steps[7], seen.steps[15]]))
    expected = module.head.weight.detach().abs().amax(1) / 127
    assert torch.equal(module.head.weight_quantizer.scale, expected)
    assert_ships(module, callback)


@in_any_order
def test_a_checkpoint_in_mid_epoch_holds_the_average_with_the_ranges_of_training(tmp_path, ours_first):
    saver = ModelCheckpoint(tmp_path / "c", filename="{step}", every_n_train_steps=3, save_top_k=-1)
    fit(tmp_path, [*ordered(ours_first, qat(freeze_step=5), WeightAveraging()), saver], enable_checkpointing=True)
    for step in (3, 6):
        checkpoint = torch.load(tmp_path / "c" / f"step={step}.ckpt", weights_only=True)
        average, current = checkpoint["state_dict"], checkpoint["current_model_state"]
        assert average["head.weight_quantizer._extra_state"]["frozen"] is (step == 6)
        assert not torch.equal(average["head.weight"], current["head.weight"])
        ranges = [key for key in current if "input_quantizer" in key and isinstance(current[key], torch.Tensor)]
        assert ranges
        assert all(torch.equal(average[key], current[key]) for key in ranges)

"""Layers lose bits one after another, those first that lose least."""

import pytest
import torch
from classifier import Classifier, data, loader, trainer
from lightning.pytorch.callbacks import Callback
from together import assert_ships, qat
from torch import nn
from torch.nn import functional as F
from torchdata.stateful_dataloader import StatefulDataLoader

import lightning_qat as lq
from lightning_qat.callbacks.layer_order import order_by_loss
from lightning_qat.testing import assert_resume_exact
from lightning_qat.transforms.prepare import prepared_plan, qat_layers


class Deep(Classifier):
    """Three layers of unlike importance; ``forward`` may be left out of ``training_step``."""

    def __init__(self, calls_forward=True, seed=0):
        super().__init__(seed=seed)
        self.calls_forward = calls_forward
        with torch.random.fork_rng():
            torch.manual_seed(seed + 3)
            self.side = nn.Linear(64, 2)
            self.side.weight.data *= 1e-3  # hardly counts

    def forward(self, x):
        return super().forward(x) + self.side(x.flatten(1))

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x) if self.calls_forward else self.forward(x)
        loss = F.cross_entropy(logits, y)
        self.log("train/loss", loss)
        return loss


class Watch(Callback):
    def __init__(self):
        self.bits = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.bits.append({name: layer.weight_quantizer.bits for name, layer in qat_layers(pl_module)})


def run(tmp_path, reduction, *others, module=None, config="int8", **options):
    watch = Watch()
    module = Deep() if module is None else module
    torch.manual_seed(1)
    fit = trainer(tmp_path, [qat(config), reduction, *others, watch], **options)
    fit.fit(module, loader(), loader(8, seed=1))
    return module, watch, fit


@pytest.mark.parametrize("calls_forward", [True, False])
def test_layers_go_one_by_one_over_the_span_and_level_after_level(tmp_path, calls_forward):
    reduction = lq.SensitivityBitReduction([8, 6, 4], start_step=2, end_step=12)
    module = Deep(calls_forward)
    module.lr = 1e-4
    module, watch, fit = run(tmp_path, reduction, module=module, max_epochs=2)
    sums = [sum(bits.values()) for bits in watch.bits]
    assert sums == [24, 24] + [22] * 2 + [20] * 2 + [18] * 2 + [16] * 2 + [14] * 2 + [12] * 4
    assert watch.bits[2]["side"] == 6  # hardly counts, so it goes first
    assert [sorted(order) for order in reduction.orders] == [["conv", "head", "side"]] * 2
    assert reduction.has_final_bits()
    assert fit.callback_metrics["quantization/bits"] == 4
    assert_ships(module)


def test_two_of_them_have_their_own_layers_and_logs(tmp_path):
    first = lq.SensitivityBitReduction([8, 6], start_step=0, end_step=0, match="conv")
    second = lq.SensitivityBitReduction([8, 4], start_step=2, end_step=4, match="[hs]*")
    _, watch, fit = run(tmp_path, first, second)
    assert watch.bits[3] == {"conv": 6, **{name: 4 if name == second.orders[0][0] else 8 for name in ("head", "side")}}
    logged = {key: float(value) for key, value in fit.callback_metrics.items() if key.startswith("quantization/bits")}
    assert logged == {"quantization/bits/conv": 6, "quantization/bits/[hs]*": 4}


def test_several_at_a_time_and_both_kinds(tmp_path):
    reduction = lq.SensitivityBitReduction([8, 4], start_step=0.25, end_step="0.75 epochs", layers_at_once=2,
                                           activations=True)  # fmt: skip
    module, watch, _ = run(tmp_path, reduction)
    assert [sum(bits.values()) for bits in watch.bits] == [24] * 2 + [16] * 4 + [12] * 2
    assert {layer.input_quantizer.bits for _, layer in qat_layers(module)} == {4}


class Asks(Callback):
    """Asks for the order before a batch, and looks whether that left anything behind."""

    def __init__(self, bits=2, names=("conv", "head", "side")):
        self.bits, self.names, self.found = bits, list(names), []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx % 3 == 1:
            self.found.append(order_by_loss(trainer, pl_module, batch, batch_idx, self.names, self.bits))
            self.expected = self.by_hand(pl_module, batch)

    def by_hand(self, module, batch):
        """Change the bits of a copy's layers one by one, in evaluation mode."""
        noise = {}
        for name in self.names:
            copy = lq.prepare(Deep(), prepared_plan(module))
            copy.load_state_dict(module.state_dict())
            copy.eval()
            with torch.no_grad():
                expected = copy(batch[0])
                lq.set_bits(copy, self.bits, name)
                noise[name] = (copy(batch[0]) - expected).double().square().sum().item()
        return sorted(noise, key=noise.get)


@pytest.mark.parametrize("learned", [False, True])
def test_the_order_is_that_of_the_outputs_change_and_measuring_it_changes_nothing(tmp_path, learned):
    config = lq.QATConfig("int8", per_channel=True, learnable_step_size=learned, freeze_step=None if learned else 4)
    states = []
    for asks in (Asks(), None):
        watch = lq.FreezeQuantization(6) if learned else lq.BatchNormFolding()
        module, _, fit = run(tmp_path, watch, *([] if asks is None else [asks]), config=config)
        states.append((module.state_dict(), fit.optimizers[0].state_dict(), dict(fit.callback_metrics)))
        if asks is not None:
            assert asks.found[-1] == asks.expected
            assert len(asks.found) == 3
    (one, first, metrics), (other, second, others) = states
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key], key
    assert str(first) == str(second)
    assert metrics == others


def test_a_layer_without_a_range_yet_is_measured_in_float(tmp_path):
    reduction = lq.SensitivityBitReduction([8, 4], start_step=0, end_step=0)
    plan = lq.QuantizationAwareTraining("int8", calibration_batches=0)
    trainer(tmp_path, [plan, reduction]).fit(Deep(), loader())
    assert len(reduction.orders[0]) == 3


def batches():
    return StatefulDataLoader(data(24), batch_size=4, shuffle=True)


@pytest.mark.parametrize("learned", [False, True])
def test_a_run_interrupted_anywhere_ends_in_the_same_bits(tmp_path, learned):
    config = lq.QATConfig("int8", per_channel=True, learnable_step_size=learned)

    def callbacks():
        options = {"start_step": 0.25, "end_step": 9, "activations": learned}
        return [lq.SensitivityBitReduction([8, 6, 4], **options), qat(config)]

    steps = [1, 2, 3, 4, 7, 8, 9] if not learned else [3, 5]
    assert_resume_exact(Deep, batches, callbacks, steps, folder=tmp_path, witness=False)


def test_a_new_run_begins_anew_and_a_longer_one_goes_on(tmp_path):
    reduction = lq.SensitivityBitReduction([8, 4], start_step=2, end_step=6)
    callbacks = [qat(), reduction]
    for _ in range(2):
        watch = Watch()
        trainer(tmp_path, [*callbacks, watch]).fit(Deep(), loader())
        assert [sum(bits.values()) for bits in watch.bits] == [24] * 2 + [20] * 2 + [16] * 2 + [12] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"start_step": -1}, "start_step=-1"),
        ({"end_step": "soon"}, "end_step='soon'"),
        ({"layers_at_once": 0}, "layers_at_once=0"),
    ],
)
def test_settings_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        lq.SensitivityBitReduction([8, 4], **arguments)


def test_a_span_that_ends_before_it_starts_is_told(tmp_path):
    with pytest.raises(ValueError, match="end_step=0.2 is step 2 of this run, before start_step=4, which is step 4"):
        run(tmp_path, lq.SensitivityBitReduction([8, 4], start_step=4, end_step=0.2))
    reduction = lq.SensitivityBitReduction([8, 4], match="net.*")
    assert "10% of the run to 70% of the run" in reduction.explain()
    endless = trainer(tmp_path, [lq.SensitivityBitReduction([8, 4])], max_epochs=-1, limit_train_batches=2)
    with pytest.raises(ValueError, match="needs the length of the run"):
        endless.fit(Deep(), loader())

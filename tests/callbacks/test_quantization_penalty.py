"""``QuantizationPenalty`` is the penalty added to the loss by hand, however the Trainer optimizes."""

import lightning as L
import pytest
import torch
from classifier import Classifier, data, loader, trainer
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

import lightning_qat as lq
from lightning_qat.testing import assert_rank_equal, assert_resume_exact

ALPHA = 3.0


def quantized_weight(layer):
    """Return it as outside of a step: inside, "64-true" makes float64 the dtype of new tensors, and rounds less."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        return layer.quantized_weight().detach()
    finally:
        torch.set_default_dtype(before)


class ByHand(Classifier):
    """Adds it to the loss, as a graph of ordinary operations."""

    alpha = ALPHA

    def penalty(self):
        layers = (self.conv, self.head)
        errors = [(x.weight - quantized_weight(x)).square().sum() / x.weight.detach().square().sum() for x in layers]
        return sum(errors) / 2 if self.conv.weight_quantizer.quantizing else 0.0

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + self.alpha * self.penalty()


def qat(start_step=0, bits=3, **options):
    config = lq.QATConfig("int8", bits=bits, start_step=start_step, **options)
    return lq.QuantizationAwareTraining(config, certify=False)


def fit(tmp_path, module, *callbacks, rules=None, train=None, **options):
    L.seed_everything(3, verbose=False)
    run = trainer(tmp_path, [rules or qat(), *callbacks], **{"precision": "64-true", **options})
    run.fit(module, train or loader())
    return run


def parameters(module):
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def assert_same_training(one, other, rtol=1e-9, atol=1e-12):
    for name, value in parameters(one).items():
        torch.testing.assert_close(value, other.get_parameter(name).detach(), rtol=rtol, atol=atol)


def distance(one, other):
    pairs = zip(parameters(one).values(), parameters(other).values(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


OPTIONS = {
    "plain": {},
    "accumulation, and a window of three batches": {"accumulate_grad_batches": 5},
    "clipped by norm": {"gradient_clip_val": 0.05},
    "clipped by value": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    "accumulated and clipped, two epochs": {
        "accumulate_grad_batches": 2, "gradient_clip_val": 0.1, "max_epochs": 2,
    },
}  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_it_is_the_penalty_added_to_the_loss(tmp_path, options):
    without, by_hand, ours = Classifier(), ByHand(), Classifier()
    fit(tmp_path, without, **options)
    fit(tmp_path, by_hand, **options)
    fit(tmp_path, ours, lq.QuantizationPenalty(ALPHA), **options)
    assert distance(without, by_hand) > 1e-4  # the witness does something
    assert_same_training(ours, by_hand)


def test_with_bf16_and_with_a_loss_scale(tmp_path):
    """bfloat16 rounds activations; both ways add the same float32 gradient of the penalty to the same others."""
    for plugin in (None, "scaled"):
        found = []
        for module, callbacks in ((ByHand(), []), (Classifier(), [lq.QuantizationPenalty(ALPHA)])):
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
            plugins = [MixedPrecision("16-mixed", "cpu", scaler)] if plugin else []
            options = {"plugins": plugins, "precision": None} if plugin else {"precision": "bf16-mixed"}
            fit(tmp_path, module, *callbacks, **options)
            found.append(module)
        assert_same_training(*found, rtol=1e-3, atol=1e-5)
        assert distance(found[0], Classifier()) > 1e-2


class TwoOptimizers(Classifier):
    """By hand, in turn; ``alpha`` is added to the loss of the layer that the optimizer trains.

    The gradients of the other layer are there too, and not its penalty's: the last one to step cleans nothing up.
    """

    def __init__(self, alpha=0.0):
        super().__init__()
        self.automatic_optimization, self.alpha = False, alpha

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.conv, self.head)]

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        for optimizer, layer in zip(self.optimizers(), (self.conv, self.head), strict=True):
            loss = F.cross_entropy(self(batch[0]), batch[1])
            if self.alpha:
                difference = layer.weight - layer.quantized_weight().detach()  # both inside of the step
                loss = loss + self.alpha / 2 * difference.square().sum() / layer.weight.detach().square().sum()
            self.manual_backward(loss)
            optimizer.step()


def test_two_optimizers_by_hand(tmp_path):
    without, by_hand, ours = TwoOptimizers(), TwoOptimizers(ALPHA), TwoOptimizers()
    fit(tmp_path, without)
    fit(tmp_path, by_hand)
    run = fit(tmp_path, ours, lq.QuantizationPenalty(ALPHA))
    assert distance(without, by_hand) > 1e-4
    assert_same_training(ours, by_hand)
    assert run.callback_metrics["quantization/penalty"] > 0  # of both


def test_nothing_is_added_in_the_float_phase_and_then_it_is(tmp_path):
    without, ours = Classifier(), Classifier()
    fit(tmp_path, without, rules=qat(100))
    run = fit(tmp_path, ours, lq.QuantizationPenalty(ALPHA), rules=qat(100))
    assert distance(without, ours) == 0
    assert "quantization/penalty" not in run.callback_metrics
    by_hand, late = ByHand(), Classifier()
    fit(tmp_path, by_hand, rules=qat(4))
    fit(tmp_path, late, lq.QuantizationPenalty(ALPHA), rules=qat(4))
    assert_same_training(late, by_hand)


def test_alpha_0_changes_no_bit_and_what_is_logged_is_the_penalty(tmp_path):
    without, ours = Classifier(), Classifier()

    seen = []

    class Watch(L.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            seen.append(lq.quantization_penalty(pl_module).item())

    fit(tmp_path, without)
    run = fit(tmp_path, ours, lq.QuantizationPenalty(0.0), Watch())
    assert distance(without, ours) == 0
    assert run.callback_metrics["quantization/penalty"].item() == pytest.approx(seen[-1], rel=1e-6)
    total = fit(tmp_path, Classifier(), lq.QuantizationPenalty(0.0, reduction="sum"))
    assert total.callback_metrics["quantization/penalty"].item() == pytest.approx(2 * seen[-1], rel=1e-6)


def test_a_batch_without_a_loss_adds_nothing(tmp_path):
    class Skipping(Classifier):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) if batch_idx % 2 else None

    class SkippingByHand(ByHand):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) if batch_idx % 2 else None

    for options in ({}, {"accumulate_grad_batches": 3}):
        ours, by_hand = Skipping(), SkippingByHand()
        fit(tmp_path, ours, lq.QuantizationPenalty(ALPHA), **options)
        fit(tmp_path, by_hand, **options)
        assert_same_training(ours, by_hand)


def stateful():
    return StatefulDataLoader(data(24), batch_size=4, shuffle=True)


def penalized():
    return [lq.QuantizationPenalty(ALPHA), qat(2)]


def test_it_resumes_exactly(tmp_path):
    assert_resume_exact(Classifier, stateful, penalized, (1, 3, 8), folder=tmp_path)


class Plain(Classifier):
    """Without BatchNorm, whose statistics are each rank's own."""

    def __init__(self):
        super().__init__()
        self.bn = nn.Identity()


def shuffled():
    return DataLoader(data(16), batch_size=2, shuffle=True)


@pytest.mark.slow
def test_all_ranks_have_the_same(tmp_path):
    assert_rank_equal(Plain, shuffled, penalized, folder=tmp_path)


def test_wrong_settings_are_told(tmp_path):
    for options, message in (
        ({"alpha": -1}, "alpha=-1"), ({"reduction": "max"}, "reduction='max'"), ({"alpha": "much"}, "alpha='much'"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            lq.QuantizationPenalty(**options)
    with pytest.raises(ValueError, match="match='tail' matches no prepared layer"):
        fit(tmp_path, Classifier(), lq.QuantizationPenalty(match="tail"))

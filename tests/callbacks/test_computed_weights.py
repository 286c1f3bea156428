"""Pruned, normed and parametrized weights under the real Trainer: what a forward computes is what ships."""

import pytest
import torch
from classifier import trainer
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torchdata.stateful_dataloader import StatefulDataLoader
from vectors import SAME, Base, assert_ships, batches, fit

import lightning_qat as lq
import lightning_qat.testing
from lightning_qat.nn import QuantizedLayer
from lightning_qat.transforms.phase import restore_bits


class Clipped(nn.Module):
    def forward(self, weight):
        return weight.clamp(-0.2, 0.2)


def normed(how):
    class Normed(Base):
        def build(self):
            self.net = nn.Sequential(how(nn.Linear(8, 8)), nn.ReLU(), how(nn.Linear(8, 2)))

    return Normed


def clip_parametrized(layer):
    parametrize.register_parametrization(layer, "weight", Clipped())
    return layer


class Pruned(Base):
    def build(self):
        super().build()
        prune.l1_unstructured(self.net[0], "weight", amount=0.5)
        prune.ln_structured(self.net[2], "weight", amount=0.25, n=2, dim=1)


@pytest.mark.parametrize("validates", [True, False], ids=["validated", "not validated"])
@pytest.mark.parametrize(
    "module",
    [
        normed(parametrizations.weight_norm), normed(parametrizations.spectral_norm), normed(clip_parametrized),
        normed(parametrizations.orthogonal), normed(torch.nn.utils.weight_norm), normed(torch.nn.utils.spectral_norm),
        Pruned,
    ],
    ids=["weight_norm", "spectral_norm", "parametrize", "orthogonal", "old weight_norm", "old spectral_norm", "pruned"],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
def test_weights_that_are_computed_ship_as_they_are_after_the_last_step(tmp_path, module, validates):
    """Hooks compute such a weight before a forward, so after the last optimizer step it is one step old."""
    model = module()
    qat = lq.QuantizationAwareTraining("int8", calibration_batches=2, certify=validates)
    trainer(tmp_path, [qat], limit_val_batches=1 if validates else 0).fit(model, batches(), batches(8))
    converted = lq.convert(model.eval())
    x = torch.randn(5, 8)
    with torch.no_grad():
        torch.testing.assert_close(converted.logits(x), model.logits(x), **SAME)
    if validates:
        assert qat.certificate.passed
    if module is Pruned:
        assert int((converted.net[0].codes == 0).sum()) >= 32
        assert not converted.net[2].codes[:, :2].any() or int((converted.net[2].codes == 0).all(0).sum()) == 2


def test_reading_a_computed_weight_leaves_no_trace(tmp_path):
    """Witness: plain float training. In training mode each reading of such a weight moves its vectors on."""
    states = []
    for callbacks in ([], [lq.QuantizationAwareTraining("int8", start_step=1000, freeze_step=1001)]):
        module = normed(parametrizations.spectral_norm)()
        trainer(tmp_path, callbacks, max_epochs=2).fit(module, batches(), batches(8))
        states.append(lq.float_state_dict(module.state_dict()))
    plain, ours = states
    assert plain.keys() == ours.keys()
    assert all(torch.equal(plain[key], ours[key]) for key in plain)


class PrunedWithBias(Base):
    def build(self):
        self.net = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
        for name in ("weight", "bias"):
            prune.random_unstructured(self.net[0], name, amount=0.5)


def test_a_pruned_bias_is_folded_with_its_mask(tmp_path):
    module = PrunedWithBias()
    qat = fit(tmp_path, module, limit_val_batches=1)
    converted = assert_ships(module, qat)
    assert isinstance(converted.net[0], QuantizedLayer)
    assert type(converted.net[1]) is not nn.BatchNorm1d
    assert not prune.is_pruned(converted)


def test_counting_flips_leaves_the_vectors_of_a_spectral_norm_where_they_are(tmp_path):
    """Each reading of such a weight in training mode is a power iteration, in a resumed run one more."""
    module = normed(parametrizations.spectral_norm)
    plain, counted = module(), module()
    trainer(tmp_path, [lq.QuantizationAwareTraining("int8", certify=False)]).fit(plain, batches())
    callbacks = [lq.QuantizationAwareTraining("int8", certify=False), lq.WeightOscillation()]
    trainer(tmp_path, callbacks).fit(counted, batches())
    for name, value in plain.state_dict().items():
        assert not isinstance(value, torch.Tensor) or torch.equal(counted.state_dict()[name], value), name
    lq.testing.assert_resume_exact(
        module,
        lambda: StatefulDataLoader(batches().dataset, batch_size=4),
        lambda: [lq.QuantizationAwareTraining("int8", certify=False), lq.WeightOscillation(dampening=0.1)],
        interrupt_at=[2],
        folder=tmp_path,
    )


def test_bits_of_the_plan_come_back_without_a_power_iteration():
    model = lq.prepare(nn.Sequential(parametrizations.spectral_norm(nn.Linear(8, 8))), "int8").train()
    lq.set_bits(model, 4)
    vectors = model[0].parametrizations.weight[0]._u.clone()
    restore_bits(model)
    assert model[0].weight_quantizer.bits == 8
    assert torch.equal(model[0].parametrizations.weight[0]._u, vectors)

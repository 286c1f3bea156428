"""PACT in a Trainer: the decay counts once for each optimizer step, the group is that of learned scales."""

import pytest
import torch
from classifier import Classifier, loader, trainer

import lightning_qat as lq
from lightning_qat.callbacks import QuantizationCallback
from lightning_qat.testing import assert_resume_exact


class Plain(Classifier):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def fit(tmp_path, decay, scale, lr, **options):
    """Train with the clipping value of the head at 255 times ``scale`` to begin with."""

    class Sets(QuantizationCallback):
        def on_train_start(self, trainer, pl_module):
            super().on_train_start(trainer, pl_module)
            pl_module.head.input_quantizer._store(torch.tensor(scale), torch.tensor(0, dtype=torch.int32))

    module = Plain(lr=lr)
    config = lq.QATConfig("int8", pact_decay=decay)
    qat = lq.QuantizationAwareTraining(config, calibration_batches=2, certify=False)
    run = trainer(tmp_path, [qat, lq.LearnedScales(clip=None), Sets()], **options)
    run.fit(module, loader())
    return module, run


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_the_decay_counts_once_for_each_optimizer_step(tmp_path, accumulate):
    """Nothing is clipped, so alpha is pulled in by the decay alone, as a weight by weight decay."""
    module, run = fit(tmp_path, 0.5, 12.0, 0.01, accumulate_grad_batches=accumulate)
    assert float(module.head.input_quantizer.scale) == pytest.approx(12.0 * (1 - 0.005) ** run.global_step, rel=1e-4)


def test_what_is_clipped_moves_alpha_and_the_group_is_its_own(tmp_path):
    module, run = fit(tmp_path, 0.0, 1e-4, 0.1)
    assert float(module.head.input_quantizer.scale) != pytest.approx(1e-4, rel=1e-3)
    groups = run.optimizers[0].param_groups
    assert len(groups[1]["params"]) == 2
    assert groups[1]["weight_decay"] == 0.0
    assert module.conv.weight_quantizer.learned is None


def test_a_run_interrupted_ends_in_the_same_bits(tmp_path):
    def callbacks():
        config = lq.QATConfig("int8", activation_bits=4, pact_decay=0.01, per_channel=True)
        return [lq.QuantizationAwareTraining(config, freeze_step=7), lq.ProgressiveBitReduction({3: 4})]

    def loaders():
        return loader(16)

    assert_resume_exact(Classifier, loaders, callbacks, [4], folder=tmp_path, witness=False)

"""Scales that are derived anew when their bits change: the optimizer forgets those of the other grid."""

import pytest
import torch
from classifier import Classifier, data, loader, trainer
from torch.nn import functional as F
from torchdata.stateful_dataloader import StatefulDataLoader

import lightning_qat as lq
from lightning_qat.testing import assert_resume_exact

CONFIG = lq.QATConfig("int4", activation_bits=4, learnable_step_size=True, per_channel=True)


def qat():
    return lq.QuantizationAwareTraining(CONFIG, calibration_batches=2, certify=False)


class Adam(Classifier):
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 0.01, weight_decay=0.5)


class Two(Classifier):
    """Two optimizers, by hand."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.conv.parameters(), 0.01), torch.optim.AdamW([self.head.weight], 0.01)


def stateful():
    return StatefulDataLoader(data(32), batch_size=4, shuffle=True)


def test_a_run_interrupted_around_the_change_resumes_exactly():
    def callbacks():
        return [qat(), lq.ProgressiveBitReduction({0: 8, 2: 4})]

    options = {"num_sanity_val_steps": 0, "accumulate_grad_batches": 2}
    assert_resume_exact(Adam, stateful, callbacks, [1, 2, 3], **options)


@pytest.mark.parametrize("make", [Adam, Two], ids=["one optimizer", "two by hand"])
def test_the_optimizer_forgets_scales_of_another_grid(tmp_path, make):
    """Their momentum was that of other gradients; weights and what did not change are remembered."""
    module, steps = make(), 5
    start = 3 if module.automatic_optimization else 6  # global_step counts each optimizer's
    reduction = lq.ProgressiveBitReduction({0: 8, start: 4})
    run = trainer(tmp_path, [qat(), reduction], limit_train_batches=steps)
    run.fit(module, loader())
    names = {p: name for name, p in module.named_parameters()}
    seen = {names[p]: int(state["step"]) for o in run.optimizers for p, state in o.state.items()}
    assert seen["conv.weight"] == seen["head.weight"] == steps
    assert seen["conv.weight_quantizer.learned.exponent"] == seen["head.weight_quantizer.learned.exponent"] == 2
    assert seen["head.input_quantizer.learned.exponent"] == steps


def test_what_is_renewed_is_saved():
    module = lq.prepare(Classifier(), CONFIG)
    module.head.weight_quantizer.set_bits(3, module.head.weight)
    assert module.head.weight_quantizer.learned.renewed
    assert not module.conv.weight_quantizer.learned.renewed
    other = lq.prepare(Classifier(), CONFIG)
    other.load_state_dict(module.state_dict())
    assert other.head.weight_quantizer.learned.renewed
    earlier = {key: {"ready": True} if key.endswith("learned._extra_state") else value
               for key, value in module.state_dict().items()}  # fmt: skip
    other.load_state_dict(earlier)
    assert not other.head.weight_quantizer.learned.renewed
